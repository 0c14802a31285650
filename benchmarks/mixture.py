"""Rendered and tokenised examples a second: our mixture beside `datasets` + Jinja + tokenizer in a `.map`.

Both read the same rows from the same local files, through the same promptsource templates, with the same tokenizer, in one
process each, one after the other. The peer is what a careful user would write: templates compiled once, plain Jinja. It is
measured with one row a call, and with batches of 1,000 rows a call. Start-up and memory are those of fresh processes.

    python benchmarks/mixture.py --data DATA/train --promptsource PATH [--num 20000]

The last line of the output is one JSON document.
"""

import argparse
import functools
import json
import os
import platform
import resource
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "true"

from mtllama.data.mixture import Mixture, MixtureConfig

FAR = 19_999_999
"""An index at the end of MT-LLaMA's 20 million examples."""
MAX_LENGTH = 2048
BATCH = 256
REPEATS = 3


def config(arguments: argparse.Namespace) -> MixtureConfig:
    return MixtureConfig(dir=arguments.data, templates=f"promptsource:{arguments.promptsource}", tasks=("t0-train",))


def encoder(name: str) -> Any:
    from mtllama.data.prompt import PromptEncoder, find_format
    from mtllama.model.find import find_model, load_tokenizer

    return PromptEncoder(load_tokenizer(find_model(name).files), find_format("plain"), MAX_LENGTH)


def ours(arguments: argparse.Namespace) -> dict[str, Any]:
    """Draw, render and encode the first N indices; also gives the (set, row, template) of each, for the peer."""
    mixture, encode = Mixture(config(arguments)), encoder(arguments.model).encode_batch
    mixture.draw(0)
    began = time.perf_counter()
    for stream in mixture.streams:  # once in a process, the rows of conditional prompts are looked for: timed by itself
        stream[0]
    scan = time.perf_counter() - began
    began, tokens, examples = time.perf_counter(), 0, 0
    for start in range(0, arguments.num, BATCH):
        drawn = [mixture[index] for index in range(start, min(start + BATCH, arguments.num))]
        for each in encode([(example.inputs, example.targets) for example in drawn if example]):
            examples, tokens = examples + 1, tokens + (len(each.ids) if each else 0)
    seconds = time.perf_counter() - began
    return {"examples": examples, "tokens": tokens, "seconds": seconds, "examples_per_second": examples / seconds, "scan_seconds": scan}


def pairs(arguments: argparse.Namespace) -> dict[str, list[tuple[int, str]]]:
    """What our first N draws are made of, by data set."""
    mixture = Mixture(config(arguments))
    found: dict[str, list[tuple[int, str]]] = {}
    for index in range(arguments.num):
        draw = mixture.draw(index)
        if draw.example:
            found.setdefault(draw.task, []).append((draw.row, draw.template))
    return found


def peer(arguments: argparse.Namespace, batched: bool) -> dict[str, Any]:
    """`datasets.map` over the same rows and templates. Reading the files and compiling the templates is not timed."""
    import datasets
    import jinja2

    from mtllama.model.find import find_model, load_tokenizer
    from mtllama.tasks.catalog import catalog, load_rows
    from mtllama.tasks.promptsource import read_templates

    datasets.disable_progress_bars()
    datasets.disable_caching()
    tokenizer = load_tokenizer(find_model(arguments.model).files)
    eos = tokenizer.eos_token_id
    environment = jinja2.Environment()
    environment.filters["choice"] = lambda options: options[0]
    environment.filters["most_frequent"] = lambda items: sorted(set(items), key=lambda item: -items.count(item))
    environment.globals["zip"] = zip
    compiled = functools.cache(environment.from_string)
    jobs = []
    for name, drawn in pairs(arguments).items():
        rows = load_rows(catalog()[name], arguments.data, "train")  # derived columns and sub-sets as ours has them
        index = {rows.number(place): place for place in range(len(rows.rows))}
        table = datasets.Dataset.from_list([rows.rows[index[row]] for row, _ in drawn])
        templates = {t.name: t for t in read_templates(arguments.promptsource, catalog()[name].promptsource or "")}
        jobs.append((table, [templates[template] for _, template in drawn]))

    def render(row: dict[str, Any], template: Any) -> tuple[str, str]:
        values = dict(row)
        if template.answer_choices:
            values["answer_choices"] = [part.strip() for part in compiled(template.answer_choices).render(**row).split("|||")]
        source = template.jinja.replace("}}", " | string | truncate(2048) }}")
        inputs, targets = (part.strip() for part in compiled(source).render(**values).split("|||"))
        return inputs, targets

    def one(row: dict[str, Any], index: int, templates: list[Any]) -> dict[str, Any]:
        inputs, targets = render(row, templates[index])
        prompt = tokenizer(inputs, truncation=True, max_length=MAX_LENGTH, add_special_tokens=False)["input_ids"]
        answer = [*tokenizer(" " + targets, add_special_tokens=False)["input_ids"], eos]
        return {"input_ids": prompt + answer, "num_target": len(answer)}

    def many(rows: dict[str, list[Any]], indices: list[int], templates: list[Any]) -> dict[str, Any]:
        texts = [render({name: rows[name][place] for name in rows}, templates[i]) for place, i in enumerate(indices)]
        prompts = tokenizer([text for text, _ in texts], truncation=True, max_length=MAX_LENGTH, add_special_tokens=False)["input_ids"]
        answers = tokenizer([" " + text for _, text in texts], add_special_tokens=False)["input_ids"]
        return {
            "input_ids": [[*prompt, *answer, eos] for prompt, answer in zip(prompts, answers, strict=True)],
            "num_target": [len(answer) + 1 for answer in answers],
        }

    for _, templates in jobs:
        for template in templates:
            compiled(template.jinja.replace("}}", " | string | truncate(2048) }}"))
    began, tokens, examples = time.perf_counter(), 0, 0
    for table, templates in jobs:
        options = {"fn_kwargs": {"templates": templates}, "with_indices": True, "remove_columns": table.column_names}
        made = table.map(many, batched=True, batch_size=1000, **options) if batched else table.map(one, **options)
        examples += len(made)
        tokens += sum(len(ids) for ids in made.data.column("input_ids").combine_chunks().to_pylist()) if arguments.count else 0
    seconds = time.perf_counter() - began
    return {"examples": examples, "seconds": seconds, "examples_per_second": examples / seconds}


def start(arguments: argparse.Namespace) -> dict[str, Any]:
    """From the start of a process to its first example, and to the one at the end of 20 million."""
    began = time.perf_counter()
    mixture = Mixture(config(arguments))
    first = mixture[0]
    seconds = time.perf_counter() - began
    far = mixture[FAR]
    assert first is not None and far is not None
    return {"to_first_example": seconds, "far": far.inputs[:40]}


def memory(arguments: argparse.Namespace) -> dict[str, Any]:
    """Peak memory of drawing and encoding examples from all over the first 20 million."""
    mixture, encode = Mixture(config(arguments)), encoder(arguments.model).encode_batch
    step = FAR // arguments.num
    for start in range(0, FAR, BATCH * step):
        drawn = [mixture[index] for index in range(start, min(start + BATCH * step, FAR), step)]
        encode([(example.inputs, example.targets) for example in drawn if example])
    return {"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def in_new_process(what: str, argv: list[str]) -> dict[str, Any]:
    began = time.perf_counter()
    done = subprocess.run([sys.executable, __file__, *argv, "--only", what], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return {**json.loads(done.stdout.splitlines()[-1]), "process_seconds": time.perf_counter() - began}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--promptsource", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--num", type=int, default=20_000)
    parser.add_argument("--only", choices=["ours", "peer", "peer-batched", "start", "memory"])
    parser.add_argument("--count", action="store_true", help="count the peer's tokens (not timed fairly)")
    arguments = parser.parse_args()
    if arguments.only:
        jobs = {"ours": ours, "start": start, "memory": memory}
        job = jobs.get(arguments.only) or functools.partial(peer, batched=arguments.only == "peer-batched")
        print(json.dumps(job(arguments)))
        return
    argv, rates = sys.argv[1:], {}
    for what in ("ours", "peer", "peer-batched"):
        runs = [in_new_process(what, argv) for _ in range(REPEATS)]
        rates[what] = sorted(runs, key=lambda run: run["examples_per_second"])[len(runs) // 2]
        print(f"{what}: {[round(run['examples_per_second']) for run in runs]} examples/s")
    starts = [in_new_process("start", argv) for _ in range(REPEATS)]
    used = in_new_process("memory", argv)
    result = {
        "benchmark": "mixture",
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "versions": {name: metadata.version(name) for name in ("mtllama", "datasets", "jinja2", "tokenizers", "transformers", "grain")},
        "examples": rates["ours"]["examples"],
        "ours": {
            "examples_per_second": round(rates["ours"]["examples_per_second"]),
            "tokens_per_second": round(rates["ours"]["tokens"] / rates["ours"]["seconds"]),
        },
        "map": {"examples_per_second": round(rates["peer"]["examples_per_second"])},
        "map_batched": {"examples_per_second": round(rates["peer-batched"]["examples_per_second"])},
        "times_map": round(rates["ours"]["examples_per_second"] / rates["peer"]["examples_per_second"], 2),
        "times_map_batched": round(rates["ours"]["examples_per_second"] / rates["peer-batched"]["examples_per_second"], 2),
        "seconds_to_find_rows_of_conditional_prompts": round(rates["ours"]["scan_seconds"], 2),
        "seconds_to_first_example": round(sorted(run["to_first_example"] for run in starts)[1], 2),
        "seconds_of_that_process": round(sorted(run["process_seconds"] for run in starts)[1], 2),
        "peak_mb": round(used["peak_mb"]),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
