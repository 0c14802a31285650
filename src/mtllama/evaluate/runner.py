"""One model over a suite of tasks: rows -> items -> records.jsonl and results.json."""

import functools
import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtllama import folders
from mtllama.errors import MissingDataError, UserError
from mtllama.evaluate import protocols, stats
from mtllama.evaluate.protocols import Item, Record
from mtllama.model.engine import Engine
from mtllama.progress import progress, say
from mtllama.tasks.catalog import SAMPLER, Rows, Task, data_folder, find_tasks, load_rows
from mtllama.tasks.files import read_rows

SCHEMA = 1
RESULTS, RECORDS = "results.json", "records.jsonl"
SUITES = {
    "mt-llama": ("squad", "xquad-en", "tydiqa-en", "mlqa-en", "sst2", "openbookqa", "copa", "winogrande", "wic", "mnli", "rte"),
    SAMPLER: ("squad", "sst2", "openbookqa", "copa", "winogrande", "wic", "mnli", "rte"),
}
"""`sampler` reads the embedded data, `mt-llama` the real sets."""


@dataclass(frozen=True)
class EvalConfig:
    """What is measured."""

    suite: str = SAMPLER
    tasks: tuple[str, ...] = ()
    """Names out of the suite; none means all of them."""
    data_dir: Path | None = None
    split: str | None = None
    protocols: tuple[str, ...] = protocols.PROTOCOLS
    limit: int | None = None
    """Items a task: a seeded sample without replacement, in file order, the same for every model and protocol."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.suite not in SUITES:
            raise UserError(f"unknown suite {self.suite!r}; choose one of {', '.join(SUITES)}")
        for protocol in self.protocols:
            if protocol not in (*protocols.PROTOCOLS, protocols.PRIMARY):
                raise UserError(f"unknown protocol {protocol!r}; choose among {', '.join(protocols.PROTOCOLS)}, {protocols.PRIMARY}")
        if self.limit is not None and self.limit < 1:
            raise UserError(f"--limit is {self.limit}; at least 1 is needed")


@dataclass(frozen=True)
class TaskItems:
    """The items of one task, by template."""

    task: Task
    rows: Rows
    items: list[Item]
    skipped: int
    """Rows to which a template does not apply."""


def load_items(config: EvalConfig) -> tuple[list[TaskItems], dict[str, str]]:
    """Items of every task whose data is there, and for the others why not.

    A task that was named is required; a task that is only part of the suite may be missing.
    """
    find_tasks(config.tasks)
    for name in config.tasks:
        if name not in SUITES[config.suite]:
            raise UserError(f"{name} is not in the suite {config.suite}; it has: {', '.join(SUITES[config.suite])}")
    folder = data_folder(config.data_dir if config.data_dir is not None else Path(SAMPLER) if config.suite == SAMPLER else None)
    found, missing = [], {}
    for task in find_tasks(name for name in SUITES[config.suite] if not config.tasks or name in config.tasks):
        try:
            rows = load_rows(task, folder, config.split)
        except UserError as error:
            absent = isinstance(error, MissingDataError) or "the hub" in str(error)
            if config.tasks or not absent:
                raise
            missing[task.name] = str(error)
            continue
        found.append(_task_items(task, rows, config))
    if not found:
        raise UserError(f"no data for any task of the suite {config.suite}: {next(iter(missing.values()))}")
    return found, missing


def _task_items(task: Task, rows: Rows, config: EvalConfig) -> TaskItems:
    items, skipped = [], 0
    for index in sample_indices(len(rows.rows), config.limit, f"{config.seed}/{task.name}"):
        for template in task.prompts[:1]:
            example = rows.render(index, template, seed=config.seed)
            if example is None:
                skipped += 1
                continue
            references = task.row_references(rows.rows[index], example)
            items.append(
                Item(
                    task.name, task.metric, template.name, rows.row_id(index), example.inputs, example.targets, example.choices, references
                )
            )
    if not items:
        raise UserError(f"{rows.origin}: no row has a label, so {task.name} cannot be judged; use another --split")
    return TaskItems(task, rows, items, skipped)


def sample_indices(n: int, limit: int | None, seed: str) -> list[int]:
    """A seeded sample of row numbers without replacement, in file order."""
    if limit is None or limit >= n:
        return list(range(n))
    return sorted(random.Random(seed).sample(range(n), limit))


def evaluate(engine: Engine, config: EvalConfig, out: Path, *, overwrite: bool = False) -> dict[str, Any]:
    """Measure a model; writes `results.json` and `records.jsonl` into `out` and returns the results."""
    folders.require_new(out, overwrite=overwrite)
    tasks, missing = load_items(config)
    for reason in missing.values():
        say(f"left out: {reason}")
    jobs = [(each, protocol) for each in tasks for protocol in protocols.resolve(config.protocols, each.items[0])]
    if not jobs:
        raise UserError(f"the protocol {','.join(config.protocols)} applies to none of the tasks; ranking needs choices: add generate")
    results: dict[str, Any] = {}
    with folders.new_folder(out, overwrite=overwrite) as folder, open(folder / RECORDS, "w", encoding="utf-8") as handle:
        with progress("evaluate", sum(len(each.items) for each, _ in jobs)) as advance:
            for each, protocol in jobs:
                records = protocols.run(protocol, engine, each.items, functools.partial(advance, note=each.task.name))
                for record in records:
                    handle.write(json.dumps(record, ensure_ascii=False) + "\n")
                results.setdefault(each.task.name, {})[protocol] = summarize(each, records)
        whole = {
            "schema": SCHEMA,
            "model": engine.loaded.describe(),
            "format": engine.loaded.format.name,
            "dtype": str(engine.loaded.dtype).removeprefix("torch."),
            "suite": config.suite,
            "seed": config.seed,
            "limit": config.limit,
            "versions": folders.versions(),
            "missing": missing,
            "tasks": results,
        }
        folders.write_json(folder / RESULTS, whole)
    return whole


def summarize(each: TaskItems, records: Sequence[Record]) -> dict[str, Any]:
    """The result of one task under one protocol; shares in percent."""
    result = _summary(each.task.metric, records)
    by_template: dict[str, list[Record]] = {}
    for record in records:
        by_template.setdefault(record["template"], []).append(record)
    result.update(
        split=each.rows.split,
        note=each.rows.note,
        data=Path(each.rows.origin).name,
        skipped=each.skipped,
        templates={name: _summary(each.task.metric, group) for name, group in by_template.items()},
    )
    return result


def _summary(metric: str, records: Sequence[Record]) -> dict[str, Any]:
    values = [protocols.value(record, metric) for record in records]
    low, high = stats.interval(values)
    percent = 100 * sum(values) / len(values)
    result: dict[str, Any] = {"metric": metric, "value": percent, metric: percent, "ci95": [100 * low, 100 * high], "n": len(records)}
    if metric == "f1":
        result["em"] = 100 * sum(record["em"] for record in records) / len(records)
    ranked = [record for record in records if record["choices"]]
    golds = Counter(record["gold_index"] for record in ranked)
    result["chance"] = 100 * sum(1 / len(record["choices"]) for record in ranked) / len(ranked) if ranked else None
    result["majority"] = 100 * max(golds.values()) / len(ranked) if ranked else None
    result["unparsed"] = sum(bool(record.get("unparsed")) for record in records)
    result["cut"] = sum(record["cut"] for record in records)
    return result


def read_run(folder: Path) -> tuple[dict[str, Any], list[Record]]:
    """Results and records of an evaluation folder."""
    if not (folder / RESULTS).is_file():
        raise UserError(f"{folder} has no {RESULTS}; give a folder made by: mtllama eval MODEL --out {folder}")
    results = folders.read_json(folder / RESULTS)
    if not isinstance(results, dict) or results.get("schema") != SCHEMA:
        raise UserError(f"{folder / RESULTS} is not of schema {SCHEMA}; evaluate again")
    return results, list(read_rows(folder / RECORDS))
