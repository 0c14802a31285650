"""The file in lm-eval's layout: lm-eval's own code reads it, and its numbers are those that lm-eval would have computed."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mtllama.evaluate import metrics, protocols, runner
from mtllama.evaluate.items import EvalConfig
from mtllama.evaluate.lm_eval_layout import LM_EVAL_RESULTS, lm_eval_results, metric_name
from mtllama.model.engine import Engine
from mtllama.model.find import find_model
from mtllama.model.load import load_model
from mtllama.tasks.catalog import catalog

RANKED = ("acc,rank", "acc,rank-mean", "acc,rank-char", "acc,rank-byte", "acc,rank-pmi", "acc,generate", "acc,mt-llama")
FACTS = {"split": "validation", "data": "validation.jsonl", "split_rows": 100}


@pytest.fixture(scope="module")
def run(pico: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "pico"
    engine = Engine(load_model(find_model(str(pico)), dtype="float32"))
    runner.evaluate(engine, EvalConfig(tasks=("squad", "sst2", "openbookqa"), limit=15), out)
    return out


def their(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / LM_EVAL_RESULTS).read_text(encoding="utf-8")))


def results_of(records: Sequence[dict[str, Any]], *ways: str) -> dict[str, Any]:
    """The part of results.json that the layout reads, of one task."""
    task = records[0]["task"]
    return {
        "model": {"name": "pico", "parameters": 1},
        "max_new_tokens": {task: 64},
        "stop": {task: ["\n"]},
        "data_sha256": {task: "0"},
        "versions": {"mtllama": "1", "transformers": "5"},
        **dict.fromkeys(("dtype", "limit", "seed", "format", "boundary", "suite", "templates")),
        "tasks": {task: {way: runner.summarize(records, way) | FACTS for way in ways}},
    }


def ranked(row: int, right: bool, template: str = "one", names: Sequence[str] = ("accuracy",)) -> dict[str, Any]:
    choices = {"choices": ["a", "b"], "gold_index": row % 2, "gold": "ab"[row % 2], "references": ["ab"[row % 2]]}
    first = right == (row % 2 == 0)
    scores = {"logprobs": [[-1.0], [-2.0]] if first else [[-2.0], [-1.0]], "unconditional": None, "cut": False}
    return {"task": "cb", "template": template, "row": row, "kind": "score", "metrics": list(names)} | choices | scores


def spoken(row: int, text: str, task: str, names: Sequence[str]) -> dict[str, Any]:
    answer = {"choices": None, "gold_index": None, "gold": "the cat sat on it", "references": ["the cat sat on it"], "cut": False}
    return {"task": task, "template": "one", "row": row, "kind": "generate", "metrics": list(names), "text": text} | answer


def test_lm_evals_own_table_shows_every_task_protocol_and_metric(run: Path) -> None:
    utils = pytest.importorskip("lm_eval.utils")
    found = their(run)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in utils.make_table(found).splitlines()[2:]]
    expected = sorted(key for entry in found["results"].values() for key in entry if "," in key and "_stderr" not in key)
    assert sorted(f"{row[4]},{row[2]}" for row in rows) == expected and len(rows) == 7 + 7 + 2 * 2
    shown, task = {}, ""
    for row in rows:
        task = row[0] or task
        assert (row[3], row[5], row[7]) == ("0", "↑", "±")
        shown[task, f"{row[4]},{row[2]}"] = row[6], row[8]
    for name, entry in found["results"].items():
        for key in entry.keys() & {"acc,rank", "f1,generate"}:
            metric, _, way = key.partition(",")
            assert shown[name, key] == (f"{entry[key]:.4f}", f"{entry[f'{metric}_stderr,{way}']:.4f}")
    assert len({value for value, _ in shown.values()}) > 3


def test_values_and_standard_errors_are_those_that_lm_eval_makes_of_the_items(run: Path) -> None:
    utils = pytest.importorskip("lm_eval.evaluator_utils")
    from lm_eval.api.metrics import mean

    results, records = runner.read_run(run)
    compared = 0
    for task, by_protocol in results["tasks"].items():
        raw: dict[tuple[str, str], list[float]] = {}
        for record in records:
            for way in protocols.of_record(record) if record["task"] == task else ():
                view = protocols.view(record, way)
                if record["choices"]:
                    said, gold = (metrics.normalize(text) for text in (view["prediction"], record["gold"]))
                    raw.setdefault(("acc", way), []).append(float(said == gold))
                else:
                    raw.setdefault(("f1", way), []).append(metrics.f1(view["prediction"], record["references"]))
                    raw.setdefault(("exact_match", way), []).append(metrics.exact_match(view["prediction"], record["references"]))
        assert {way for _, way in raw} == set(by_protocol)
        lm_evals = SimpleNamespace(task_name=task, aggregation=lambda: dict.fromkeys(("acc", "f1", "exact_match"), mean))
        numbers, num = utils._compute_task_aggregations(lm_evals, raw)
        assert their(run)["results"][task] == {
            "name": task,
            "alias": task,
            "sample_len": num,
            **{k: pytest.approx(v) for k, v in numbers.items()},
        }
        compared += sum(0 < value < 1 for value in numbers.values())
    assert compared > 20


def test_the_file_has_lm_evals_fields_and_a_name_that_its_readers_look_for(run: Path) -> None:
    schema = pytest.importorskip("lm_eval.result_schema")
    from lm_eval.utils import get_results_filenames

    found = their(run)
    assert set(found) - {"mtllama"} <= set(schema.EvalResults.__annotations__)
    assert {"results", "configs", "versions", "n-shot", "higher_is_better", "n-samples", "config", "model_name"} <= set(found)
    tasks = {"squad", "sst2", "openbookqa"}
    for key in ("results", "configs", "versions", "n-shot", "higher_is_better", "n-samples", "task_hashes"):
        assert set(found[key]) == tasks, key
    assert set(found["config"]) <= set(schema._EvalConfig.__annotations__)
    assert found["n-samples"]["sst2"] == {"original": 80, "effective": 15}
    assert found["higher_is_better"] == {"squad": {"f1": True, "exact_match": True}, "sst2": {"acc": True}, "openbookqa": {"acc": True}}
    assert [found["configs"][task]["output_type"] for task in ("squad", "sst2")] == ["generate_until", "multiple_choice"]
    assert tuple(key for key in found["results"]["sst2"] if "," in key and "_stderr" not in key) == RANKED
    names = [str(file) for file in run.iterdir()]
    assert get_results_filenames(names) == [str(run / LM_EVAL_RESULTS)] and len(names) > 2


def test_it_is_made_of_the_results_alone(run: Path) -> None:
    assert lm_eval_results(runner.read_run(run)[0]) == their(run)


def test_templates_that_repeat_an_answer_make_no_standard_error_smaller() -> None:
    once, many = (
        lm_eval_results(results_of([ranked(row, row % 3 > 0, str(t)) for row in range(12) for t in range(num)], "rank"))["results"]["cb"]
        for num in (1, 6)
    )
    assert once == many and once["sample_len"] == 12
    assert once["acc_stderr,rank"] == pytest.approx((8 / 12 * 4 / 12 / 11) ** 0.5)


def test_metrics_of_whole_sets_stand_under_lm_evals_names_and_scale() -> None:
    pytest.importorskip("sacrebleu")
    records = [ranked(row, row % 3 > 0, names=("accuracy", "macro-f1")) for row in range(12)]
    results = results_of(records, "rank")
    cb = lm_eval_results(results)["results"]["cb"]
    assert cb["f1,rank"] == pytest.approx(results["tasks"]["cb"]["rank"]["macro-f1"] / 100) and cb["f1_stderr,rank"] == "N/A"
    texts = [spoken(row, text, "common_gen", ("rouge1", "bleu")) for row, text in enumerate(("the cat sat on it", "the cat sat on me"))]
    generated = lm_eval_results(results_of(texts, "generate"))["results"]["common_gen"]
    assert 50 < generated["bleu,generate"] < 100 and generated["bleu_stderr,generate"] == "N/A"
    assert generated["rouge1,generate"] == pytest.approx(0.9) and generated["rouge1_stderr,generate"] == pytest.approx(0.1)
    make_table = pytest.importorskip("lm_eval.utils").make_table
    assert "N/A" in make_table(lm_eval_results(results))


def test_of_one_row_no_standard_error_is_known() -> None:
    found = lm_eval_results(results_of([ranked(0, True)], "rank"))["results"]["cb"]
    assert (found["acc,rank"], found["acc_stderr,rank"]) == (1.0, "N/A")


def test_accuracy_without_choices_is_an_exact_match() -> None:
    found = lm_eval_results(results_of([spoken(row, "The cat sat on it.", "qasc", ("accuracy",)) for row in range(2)], "generate"))
    assert found["results"]["qasc"]["exact_match,generate"] == 1.0 and "acc,generate" not in found["results"]["qasc"]


def test_no_two_metrics_of_a_task_have_one_name() -> None:
    assert metric_name("mlqa-em-de", choices=False) == "exact_match" and metric_name("mlqa-f1-de", choices=False) == "f1"
    renamed = {task.name: [metric_name(name, choices=True) for name in task.metrics] for task in catalog().values()}
    assert all(len(names) == len(set(names)) for names in renamed.values()) and len(renamed) > 100
    assert {"acc", "f1", "exact_match", "bleu", "rougeL"} <= {name for names in renamed.values() for name in names}
