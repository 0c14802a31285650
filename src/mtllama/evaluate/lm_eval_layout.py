"""Results in the layout of lm-evaluation-harness, for whatever reads its `results_*.json`: a pure function of our own results.

A protocol stands where lm-eval names a filter (`acc,rank-char`), and a metric has lm-eval's name for it. Ranking is `acc` under every
protocol: lm-eval's `acc_norm` divides by characters as well, but scores no end marker. Numbers are shares of 1, BLEU excepted, which
lm-eval counts to 100. A standard error is that of the mean over rows, as lm-eval's is, a row's value being the mean over its templates;
of a metric of a whole set it is not known (`N/A`).
"""

from collections.abc import Mapping
from typing import Any

from mtllama.evaluate.protocols import RANKS

LM_EVAL_RESULTS = "results_lm-eval.json"
"""Where lm-eval has a date in the name, which would make two files of the same run differ."""
NAMES = {"em": "exact_match", "macro-f1": "f1"}
"""What lm-eval calls a metric (macro-F1: in its task cb), where it is not our name."""


def lm_eval_results(results: Mapping[str, Any]) -> dict[str, Any]:
    """What lm-eval would have written of an evaluation's `results.json`."""
    tasks: dict[str, dict[str, dict[str, Any]]] = results["tasks"]
    named = {task: _metrics(task, by_protocol) for task, by_protocol in tasks.items()}
    better = {task: {key.partition(",")[0]: True for key in _keys(metrics)} for task, metrics in named.items()}
    model = results["model"]
    return {
        "results": named,
        "group_subtasks": {},
        "configs": {task: _config(task, by_protocol, list(better[task]), results) for task, by_protocol in tasks.items()},
        "versions": dict.fromkeys(tasks, results["versions"]["mtllama"]),  # prompts and rules come with the package
        "n-shot": dict.fromkeys(tasks, 0),
        "higher_is_better": better,
        "n-samples": {
            task: {"original": next(iter(by_protocol.values()))["split_rows"], "effective": named[task]["sample_len"]}
            for task, by_protocol in tasks.items()
        },
        "config": {
            "model": "mtllama",
            "model_args": model["name"],
            "model_num_parameters": model["parameters"],
            "model_dtype": results["dtype"],
            "limit": results["limit"],
            "random_seed": results["seed"],
        },
        "task_hashes": {task: results["data_sha256"][task] for task in tasks},
        "model_source": "mtllama",
        "model_name": model["name"],
        "transformers_version": results["versions"]["transformers"],
        "mtllama": {key: results[key] for key in ("model", "format", "boundary", "suite", "templates", "versions")},
    }


def metric_name(name: str, *, choices: bool) -> str:
    """What lm-eval calls one of our metrics; accuracy without choices is an exact match."""
    if name == "accuracy":
        return "acc" if choices else "exact_match"
    if name.startswith("mlqa-"):  # the language is the task's
        name = name.split("-")[1]
    return NAMES.get(name, name)


def _metrics(task: str, by_protocol: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    found = {"name": task, "alias": task, "sample_len": max(result["rows"] for result in by_protocol.values())}
    for protocol, result in by_protocol.items():
        for name in (*result["stderr"], *result["set_ci95"]):
            theirs, whole = metric_name(name, choices=result["chance"] is not None), 1 if name == "bleu" else 100
            error = result["stderr"].get(name)
            found[f"{theirs},{protocol}"] = result[name] / whole
            found[f"{theirs}_stderr,{protocol}"] = "N/A" if error is None else error / whole
    return found


def _keys(metrics: Mapping[str, Any]) -> list[str]:
    return [key for key in metrics if "," in key and "_stderr," not in key]


def _config(task: str, by_protocol: Mapping[str, dict[str, Any]], metrics: list[str], results: Mapping[str, Any]) -> dict[str, Any]:
    """What lm-eval says of a task, as far as it has a meaning here."""
    first = next(iter(by_protocol.values()))
    return {
        "task": task,
        "dataset_path": first["data"],
        "test_split": first["split"],
        "output_type": "multiple_choice" if any(protocol in RANKS for protocol in by_protocol) else "generate_until",
        "generation_kwargs": {"max_gen_toks": results["max_new_tokens"][task], "until": results["stop"][task], "do_sample": False},
        "num_fewshot": 0,
        "metric_list": [{"metric": name, "higher_is_better": True} for name in metrics],
        "filter_list": [{"name": protocol} for protocol in by_protocol],
        "metadata": {"templates": list(first["templates"])},
    }
