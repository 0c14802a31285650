"""Zero-shot evaluation beside lm-eval's `hf` model: seconds for the same items, memory, start-up, and the floor of matrix products.

    python benchmarks/evaluate.py --data DIR [--limit N] [--repeat 1] [--starts 5] [--out FILE]

Both load the same model in bf16 and do the same sets, in turns within one run, each in a process of its own that waits while the other
works. `DIR` holds the data sets as `--data-dir` of `mtllama eval` has them:

openbookqa    4 choices of several tokens, each with its end marker
winogrande    2 choices of several tokens, each with its end marker
one-token     MNLI's prompts with its 3 answers as one token each, without end marker
squad         greedy text, at most 64 new tokens, to the first line break wherever it stands, behind the prompt that lm-eval's own
              SQuAD task has (behind ours a base model says the end marker or a line break at once, and nothing is generated)

Ids are made once and given to both (lm-eval's generation takes text, and makes the same ids of it; that is checked). Seconds are those
of the set alone, after loading and one item; start-up is from the start of the process to the end of its first item, with the files in
the page cache. A set during which a process had much less than its cores is called disturbed. The floor is what the matrix products of
the blocks and of the head need at the processor's own rate, each prompt once, each token of an answer once, the head on rows that are
read, taken before and after the sets. lm-eval is installed into a virtual environment of its own under --peers at the first run. The
last line of the output is one JSON document.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from evaluate_peer import Job, serve

from train import UNDISTURBED, VERSIONS, FailedError, faster, hardware, last_line, linears, peer_python, products, say

HERE = Path(__file__).resolve().parent
PEER = ("lm-eval[hf]==0.4.13", *(f"{name}=={version}" for name, version in VERSIONS.items()))
MAX_NEW_TOKENS, STOP = 64, ["\n"]
ASKED = {"openbookqa": 3.0, "winogrande": 1.5, "one-token": 1.5, "squad": 1.5}
"""How many times as fast as lm-eval each set is meant to be."""
NUM = {"one-token": 1000, "squad": 300}
"""Items of a set, where it has more."""
SQUAD = "Title: {title}\n\nBackground: {context}\n\nQuestion: {question}\n\nAnswer:"
WIDTHS = {"blocks": 1024, "steps": 64, "head": 128}
"""Rows of the matrix products that are timed."""


# Items


def sets_of(data: Path, model: Path, limit: int | None) -> dict[str, dict[str, Any]]:
    """Name -> kind and items: ids of the prompt, and those of the answers or the prompt's text."""
    from mtllama.data.prompt import DEFAULT_FORMAT, PromptEncoder, find_format
    from mtllama.model.find import load_tokenizer
    from mtllama.tasks.catalog import find_tasks, load_rows

    tokenizer = load_tokenizer(model)
    ranking, bare = (PromptEncoder(tokenizer, find_format(name), 2048) for name in (DEFAULT_FORMAT, "plain"))

    def questions(count: int | None) -> dict[str, Any]:
        (task,) = find_tasks(["squad"])
        rows = load_rows(task, data, None).rows
        texts = [SQUAD.format(**rows[index]) for index in range(len(rows) if count is None else min(count, len(rows)))]
        items = [{"prompt": bare.prompt_ids(text, room=MAX_NEW_TOKENS)[0], "text": text} for text in texts]
        if any(item["prompt"] != tokenizer(item["text"]).input_ids for item in items):
            raise FailedError("the tokenizer makes other ids of a prompt's text than we do, so generation would not be of the same prompts")
        return {"kind": "generate", "items": items}

    def examples(name: str, count: int | None) -> list[Any]:
        (task,) = find_tasks([name])
        rows = load_rows(task, data, None)
        found = [rows.render(index, task.prompts[0]) for index in range(len(rows.rows) if count is None else min(count, len(rows.rows)))]
        return [each for each in found if each is not None]

    sets: dict[str, dict[str, Any]] = {}
    for name, task in (("openbookqa", "openbookqa"), ("winogrande", "winogrande"), ("one-token", "mnli")):
        items = []
        for example in examples(task, limit or NUM.get(name)):
            prompt, _ = ranking.prompt_ids(example.inputs, room=MAX_NEW_TOKENS)
            answers = [ranking.answer_ids(choice) for choice in example.choices]
            if name == "one-token":
                answers = [answer[: -len(ranking.end_ids)] for answer in answers]
                if any(len(answer) != 1 for answer in answers):
                    raise FailedError("an answer of the one-token set has several tokens with this model; take another model")
            items.append({"prompt": prompt, "answers": answers})
        sets[name] = {"kind": "score", "items": items}
    sets["squad"] = questions(limit or NUM["squad"])
    return sets


def describe(each: dict[str, Any]) -> dict[str, Any]:
    """Items and tokens; `shared`: each prompt counted once; `repeated`: once for each answer, as separate rows have it."""
    items = each["items"]
    prompts = sorted(len(item["prompt"]) for item in items)
    found = {"items": len(items), "prompt_tokens": sum(prompts), "median_prompt": prompts[len(prompts) // 2]}
    if each["kind"] == "generate":
        return found
    fed = sum(len(answer) - 1 for item in items for answer in item["answers"])
    answers = sum(len(item["answers"]) for item in items)
    tokens_of_answers = sum(len(answer) for item in items for answer in item["answers"])
    return {
        **found,
        "answers": answers,
        "tokens_of_answers": tokens_of_answers,
        "shared": sum(prompts) + fed,
        "repeated": sum(len(item["prompt"]) * len(item["answers"]) for item in items) + fed,
        "rows_read": len(items) + fed,
    }


# Processes


class Worker:
    """A process with its model loaded, which does one set after another."""

    def __init__(self, command: Sequence[str | Path], log: Path, threads: int) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        self.log, began = log, time.perf_counter()
        with open(log, "ab") as errors:
            self.process = subprocess.Popen(
                [*map(str, command)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=environment, text=True
            )
        self.about = self._answer()
        self.start_seconds = time.perf_counter() - began

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            raise FailedError(f"{last_line(self.log.read_text(errors='replace'))} (all of it: {self.log})")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def do(self, name: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(name + "\n")
        self.process.stdin.flush()
        return self._answer()

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def ours(job: Job) -> None:
    """What a process of ours does."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sets = json.loads(Path(job.sets).read_text(encoding="utf-8"))

    import torch

    from mtllama.model.engine import Branches, Engine
    from mtllama.model.find import find_model
    from mtllama.model.load import load_model

    torch.set_num_threads(job.threads)
    engine = Engine(load_model(find_model(job.model), dtype=job.dtype))  # type: ignore[arg-type]

    def do(kind: str, items: list[dict[str, Any]]) -> list[Any]:
        if kind == "score":
            scores = engine.score([Branches(item["prompt"], item["answers"]) for item in items])
            return [[sum(tokens) for tokens in answers] for answers in scores]

        def text(new: list[int]) -> str:
            return str(engine.tokenizer.decode(new, skip_special_tokens=True))

        def stopped(new: list[int]) -> bool:
            return any(stop in text(new) for stop in job.stop)

        prompts = [item["prompt"] for item in items]
        found = engine.continue_ids(prompts, max_new_tokens=job.max_new_tokens, ended=stopped)
        return [text(new).split(job.stop[0])[0] for new in found]

    serve(sets, do, {"dtype": str(engine.loaded.dtype)}, out)


# Results


def rates_of(model: Path) -> dict[str, float]:
    """GFLOP/s in bf16 of the blocks' products for a pass and for a step of generation, and of the head's."""
    import torch

    _, first, config = linears(model)
    head = [(config.vocab_size, config.hidden_size)]
    found = {what: products(head if what == "head" else first, width, torch.bfloat16)["forward"] for what, width in WIDTHS.items()}
    say(f"matrix products in bfloat16, GFLOP/s: {found}")
    return found


def floor(model: Path, rates: dict[str, float], about: dict[str, Any], new_tokens: int) -> dict[str, float]:
    """Seconds that the matrix products of a set need at these rates, and their GFLOP."""
    shapes, _, config = linears(model)
    block, head = 2 * sum(out * size for out, size in shapes) / 1e9, 2 * config.vocab_size * config.hidden_size / 1e9
    if "shared" in about:
        blocks, steps, rows = about["shared"], 0, about["rows_read"]
    else:  # the last token is not fed
        blocks, steps, rows = about["prompt_tokens"], new_tokens - about["items"], new_tokens
    seconds = block * blocks / rates["blocks"] + block * steps / rates["steps"] + head * rows / rates["head"]
    return {"gflop": round(block * (blocks + steps) + head * rows, 1), "seconds": round(seconds, 2)}


def summary(runs: Sequence[dict[str, Any]], items: int, threads: int) -> dict[str, Any]:
    """The median of the runs of one side on one set."""
    seconds = [run["seconds"] for run in runs]
    middle = sorted(runs, key=lambda run: run["seconds"])[len(runs) // 2]
    cores = middle["cpu_seconds"] / middle["seconds"]
    return {
        "seconds": round(middle["seconds"], 2),
        "runs": [round(each, 2) for each in seconds],
        "items_per_second": round(items / middle["seconds"], 2),
        "cpu_seconds": round(middle["cpu_seconds"], 2),
        "cores_used": round(cores, 2),
        "disturbed": cores < UNDISTURBED * threads,
        "peak_mb": max(run["peak_mb"] for run in runs),
    }


def agreement(kind: str, ours: Sequence[Any], theirs: Sequence[Any]) -> dict[str, Any]:
    """How like the results are; both compute in bfloat16, each with its own order of sums."""
    if kind == "generate":
        return {"same_text": round(sum(a == b for a, b in zip(ours, theirs, strict=True)) / len(ours), 4)}
    pairs = [(x, y) for a, b in zip(ours, theirs, strict=True) for x, y in zip(a, b, strict=True)]
    same = sum(a.index(max(a)) == b.index(max(b)) for a, b in zip(ours, theirs, strict=True))
    distances = sorted(abs(x - y) for x, y in pairs)
    return {
        "same_choice": round(same / len(ours), 4),
        "median_difference": round(distances[len(distances) // 2], 4),
        "largest_difference": round(distances[-1], 4),
    }


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        ours(Job(**json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))))
        return
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mtllama-benchmarks"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--limit", type=int, metavar="N", help="items a set (default: all; of MNLI 1,000, of SQuAD 300)")
    parser.add_argument("--only", choices=list(ASKED), action="append", help="may be repeated; default: all sets")
    parser.add_argument("--threads", type=int, default=2, metavar="N")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="lm-eval's (default: %(default)s)")
    parser.add_argument("--repeat", type=int, default=1, metavar="N", help="times each set is done by each, in turns")
    parser.add_argument("--starts", type=int, default=5, metavar="N", help="times each is started (default: %(default)s)")
    parser.add_argument("--peers", type=Path, default=cache / "peers", metavar="DIR", help="the peer's environment (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=cache / "work" / "evaluate", metavar="DIR", help="default: %(default)s")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the JSON document there")
    arguments = parser.parse_args()
    if min(arguments.repeat, arguments.starts) < 1:
        parser.error("--repeat and --starts must be 1 or more")

    import torch

    from mtllama.model.find import find_model

    torch.set_num_threads(arguments.threads)
    about, model = hardware(), find_model(arguments.model).folder
    work: Path = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    sets = {name: each for name, each in sets_of(arguments.data, model, arguments.limit).items() if name in (arguments.only or ASKED)}
    data = {name: describe(each) for name, each in sets.items()}
    say(f"items: {data}")
    (work / "sets.json").write_text(json.dumps(sets), encoding="utf-8")
    job = {"model": str(model), "sets": str(work / "sets.json"), "dtype": "bfloat16", "threads": arguments.threads}
    job |= {"batch_size": arguments.batch_size, "max_new_tokens": MAX_NEW_TOKENS, "stop": STOP}
    (work / "job.json").write_text(json.dumps(job), encoding="utf-8")
    commands: dict[str, list[str | Path]] = {
        "ours": [sys.executable, HERE / "evaluate.py", "--worker", work / "job.json"],
        "lm-eval": [peer_python(arguments.peers.resolve(), "lm-eval", PEER), HERE / "evaluate_peer.py", work / "job.json"],
    }
    rates = rates_of(model)
    starts: dict[str, list[float]] = {side: [] for side in commands}
    workers: dict[str, Worker] = {}
    for number in range(arguments.starts):
        for side, command in commands.items():
            worker = Worker(command, work / f"{side}.log", arguments.threads)
            starts[side].append(round(worker.start_seconds, 2))
            say(f"{side}: first item after {worker.start_seconds:.2f} s")
            if number + 1 < arguments.starts:
                worker.end()
            else:
                workers[side] = worker
    runs: dict[str, dict[str, list[dict[str, Any]]]] = {name: {side: [] for side in commands} for name in sets}
    for _ in range(arguments.repeat):
        for name in sets:
            for side, worker in workers.items():
                run = worker.do(name)
                runs[name][side].append(run)
                say(f"{name}, {side}: {run['seconds']:.2f} s, {run['cpu_seconds']:.2f} s of processor time, peak {run['peak_mb']} MB")
    for worker in workers.values():
        worker.end()
    rates = faster(rates, rates_of(model))
    results: dict[str, Any] = {}
    for name, each in sets.items():
        found = {side: summary(runs[name][side], len(each["items"]), arguments.threads) for side in commands}
        mine, theirs = found["ours"], found["lm-eval"]
        outputs = [runs[name][side][0]["results"] for side in commands]
        limit = floor(model, rates, data[name], new_tokens(model, outputs[0]) if each["kind"] == "generate" else 0)
        results[name] = {
            **found,
            "times_as_fast": round(theirs["seconds"] / mine["seconds"], 2),
            "times_as_fast_by_processor_time": round(theirs["cpu_seconds"] / mine["cpu_seconds"], 2),
            "asked": ASKED[name],
            "floor": limit,
            "fraction_of_floor": round(limit["seconds"] / mine["seconds"], 3),
            "agreement": agreement(each["kind"], *outputs),
        }
        say(f"{name}: {results[name]['times_as_fast']} times as fast as lm-eval, {results[name]['fraction_of_floor']} of the floor")
    result = {
        "benchmark": "evaluate",
        "hardware": about,
        "python": platform.python_version(),
        "versions": {"mtllama": metadata.version("mtllama"), **VERSIONS},
        "peer": {"packages": list(PEER), **workers["lm-eval"].about},
        "model": arguments.model,
        "setting": {"dtype": "bfloat16", "threads": arguments.threads, "lm_eval_batch_size": arguments.batch_size},
        "data": data,
        "start_to_first_item_seconds": {side: {"median": statistics.median(each), "runs": each} for side, each in starts.items()},
        "products_gflops": rates,
        "results": results,
    }
    text = json.dumps(result)
    if arguments.out:
        arguments.out.write_text(text + "\n", encoding="utf-8")
    print(text)


def new_tokens(model: Path, texts: Sequence[str]) -> int:
    """Tokens that were generated, at least: those of the texts, and one that ended each."""
    from mtllama.model.find import load_tokenizer

    tokenizer = load_tokenizer(model)
    return sum(len(tokenizer(text).input_ids) + 1 for text in texts)


if __name__ == "__main__":
    main()
