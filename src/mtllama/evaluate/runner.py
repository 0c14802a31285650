"""One model over a suite of tasks: rows -> items -> raw records -> protocols -> records.jsonl and results.json.

Cut off, the same call goes on: what was asked stands in `<out>.partial`, and only what is missing is asked again.
"""

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mtllama import config as configs
from mtllama import folders
from mtllama.errors import UserError
from mtllama.evaluate import protocols, sets, stats
from mtllama.evaluate.ask import ask, boundary
from mtllama.evaluate.items import EvalConfig, Item, TaskItems, load_items
from mtllama.evaluate.journal import RECORDS, Block, Journal, Ranks, json_line
from mtllama.evaluate.lm_eval_layout import LM_EVAL_RESULTS, lm_eval_results
from mtllama.evaluate.protocols import PMI, Judgement, Kind, Record
from mtllama.model.engine import Answering
from mtllama.progress import progress, say
from mtllama.tasks.files import read_rows

if TYPE_CHECKING:
    from mtllama.data.contamination import Report
    from mtllama.data.mixture import MixtureConfig

SCHEMA = 2
RESULTS = "results.json"
BLOCK = 256
"""Renderings that are asked in one go: enough to sort by length, few enough that a kill loses little."""


@dataclass(frozen=True)
class Seen:
    """What the training data of the model shares with the tasks."""

    recipe: str
    report: "Report"

    @classmethod
    def of(cls, recipe: str, mixture: "MixtureConfig", tasks: Sequence[TaskItems]) -> "Seen":
        """Compare a mixture's training rows with all rows of the tasks."""
        from mtllama.data import contamination  # Grain, behind the mixture, takes seconds to import
        from mtllama.data.mixture import kept_passages, passages

        return cls(recipe, contamination.check(kept_passages(mixture), [passages(each.rows) for each in tasks]))


def evaluate(
    engine: Answering,
    config: EvalConfig,
    out: Path,
    *,
    overwrite: bool = False,
    ranks: Ranks | None = None,
    loaded: tuple[list[TaskItems], dict[str, str]] | None = None,
    mixture: "tuple[str, MixtureConfig] | None" = None,
) -> dict[str, Any]:
    """Measure a model; writes `results.json` and `records.jsonl` into `out` and returns the results.

    `loaded`: what `load_items` gave for this config, where that was called before. `mixture`: what the model was trained on, and what to call it: items that occur in it are told apart. All ranks.
    """
    ranks = ranks or Ranks()
    out = out.resolve()  # "." has no name for a folder beside it, and is another folder once the results are there
    if ranks.rank == 0:
        folders.require_new(out, overwrite=overwrite)
    tasks, missing = loaded or load_items(config)
    say_first = say if ranks.rank == 0 else _silent
    for reason in missing.values():
        say_first(f"left out: {reason}")
    described = engine.describe()
    asked = {
        "model": described["weights_sha256"],
        **({"fingerprint": described["fingerprint"]} if "fingerprint" in described else {}),
        "format": engine.encoder.format.name,
        "dtype": described.pop("dtype"),
        "boundary": boundary(engine),
        "suite": config.suite,
        "split": config.split,
        "templates": config.asked_templates,
        "limit": config.limit,
        "seed": config.seed,
        "protocols": list(config.asked_protocols),
        "max_new_tokens": {each.task.name: each.task.max_new_tokens for each in tasks},
        "stop": {each.task.name: list(each.task.stop) for each in tasks},
        "data_sha256": {each.task.name: each.sha256 for each in tasks},
        "versions": folders.versions(),
    }
    journal = Journal(out.with_name(out.name + ".partial"), asked, _blocks(tasks), ranks, overwrite=overwrite)
    done = False
    try:
        _ask_all(engine, journal, tasks, ranks)
        ranks.wait()
        if ranks.rank == 0:
            whole = {
                "schema": SCHEMA,
                **asked,
                "model": described,
                "missing": missing,
                "tasks": {},
            }
            seen = Seen.of(mixture[0], mixture[1], tasks) if mixture else None
            if mixture and seen:
                whole["contamination"] = {
                    "recipe": mixture[0],
                    "mixture": configs.to_dict(mixture[1]),
                    "rows": dict(seen.report.train_sizes),
                }
            _finish(journal.records(), tasks, whole, seen, out, overwrite=overwrite)
            done = True
        ranks.wait()
    finally:
        journal.close(remove=done)
    return dict(folders.read_json(out / RESULTS))


def _silent(text: str) -> None:
    pass


def _blocks(tasks: Sequence[TaskItems]) -> list[Block]:
    """All that is asked, in the order of the records: task by task, first the scores. A row is never torn apart."""
    blocks = []
    for each in tasks:
        for kind in dict.fromkeys(protocols.kind(protocol) for protocol in each.protocols):
            wanted = [item for item in each.items if kind == "generate" or item.choices is not None]
            block: list[Item] = []
            for item in wanted:
                if len(block) >= BLOCK and item.row != block[-1].row:
                    blocks.append(Block(kind, block))
                    block = []
                block.append(item)
            if block:
                blocks.append(Block(kind, block))
    return blocks


def _ask_all(engine: Answering, journal: Journal, tasks: Sequence[TaskItems], ranks: Ranks) -> None:
    pmi = {each.task.name for each in tasks if PMI in each.protocols}
    left = journal.left()
    total, there = (sum(len(block.items) for block in blocks) for blocks in (journal.mine, left))
    if there < total and ranks.rank == 0:
        say(f"going on: {total - there} of {total} answers are there")
    with _progress(ranks, total, total - there) as advance:
        for block in left:
            task = block.items[0].task
            journal.append(ask(block.kind, engine, block.items, unconditional=task in pmi, advance=functools.partial(advance, note=task)))


@contextlib.contextmanager
def _progress(ranks: Ranks, total: int, done: int) -> Iterator[Callable[..., None]]:
    if ranks.rank:
        yield lambda num=1, note="": None
    else:
        with progress("evaluate", total, done=done) as advance:
            yield advance


def _finish(
    records: Sequence[Record], tasks: Sequence[TaskItems], whole: dict[str, Any], seen: Seen | None, out: Path, *, overwrite: bool
) -> None:
    by_task: dict[tuple[str, Kind], list[Record]] = {}
    for record in records:
        by_task.setdefault((record["task"], record["kind"]), []).append(record)
    for each in tasks:
        for protocol in each.protocols:
            mine = by_task.get((each.task.name, protocols.kind(protocol)), [])
            result = summarize([record for record in mine if protocol in protocols.of_record(record)], protocol)
            if seen:
                result["contamination"] = _with_and_without(mine, protocol, seen.report.items(each.task.name))
            result |= {
                "split": each.rows.split,
                "note": each.rows.note,
                "data": Path(each.rows.origin).name,
                "data_sha256": each.sha256,
                "split_rows": len(each.rows.rows),
                "skipped": each.skipped,
            }
            whole["tasks"].setdefault(each.task.name, {})[protocol] = result
    with folders.new_folder(out, overwrite=overwrite) as folder:
        (folder / RECORDS).write_text("".join(json_line(record) for record in records), encoding="utf-8")
        folders.write_json(folder / RESULTS, whole)
        folders.write_json(folder / LM_EVAL_RESULTS, lm_eval_results(whole))


def summarize(records: Sequence[Record], protocol: str) -> dict[str, Any]:
    """The result of one task under one protocol; shares in percent.

    With several templates the value is the mean over them, and its interval is over rows: the renderings of a row are not
    independent of each other.
    """
    judged = [(record, protocols.judge(record, protocol)) for record in records]
    by_template: dict[str, list[tuple[Record, Judgement]]] = {}
    for record, judgement in judged:
        by_template.setdefault(record["template"], []).append((record, judgement))
    answers = {name: {record["row"]: judgement.answer for record, judgement in group} for name, group in by_template.items()}
    of_set = sets.set_values(records[0]["metrics"], answers)
    templates = {
        name: _summary(group, {metric: each.templates[name] for metric, each in of_set.items() if name in each.templates})
        for name, group in by_template.items()
    }
    metric = next(iter(judged[0][1].values))
    by_row: dict[int, dict[str, dict[str, float]]] = {}
    for record, judgement in judged:
        by_row.setdefault(record["row"], {})[record["template"]] = judgement.values
    tables = {
        name: stats.as_table({template: values[name] for template, values in row.items()} for row in by_row.values())
        for name in judged[0][1].values
    }
    low, high = stats.clustered_interval(tables[metric])
    each = list(templates.values())
    result: dict[str, Any] = {"protocol": protocol, "metric": metric}
    result |= {
        name: _mean([template.get(name) for template in each]) for name in dict.fromkeys(name for t in each for name in t["metrics"])
    }
    result |= {"value": result[metric], "ci95": [100 * low, 100 * high], "n": len(judged), "rows": len(by_row)}
    errors = {name: stats.standard_error(table) for name, table in tables.items()}
    result["stderr"] = {name: None if error is None else 100 * error for name, error in errors.items()}
    result["set_ci95"] = {name: list(each.overall.ci95) for name, each in of_set.items()}
    result |= guesses(records)
    result |= {name: sum(template[name] for template in each) for name in ("unparsed", "not_found", "cut", "at_limit")}
    return result | {"over_templates": _spread([template["value"] for template in each]), "templates": templates}


def guesses(records: Sequence[Record]) -> dict[str, float | None]:
    """What guessing gets and what the most frequent right position gets, in percent: means over the templates, like a value."""
    by_template: dict[str, list[Record]] = {}
    for record in records:
        by_template.setdefault(record["template"], []).append(record)
    each = [_guesses(group) for group in by_template.values()]
    return {name: _mean([template[name] for template in each]) for name in ("chance", "majority")}


def _guesses(records: Sequence[Record]) -> dict[str, float | None]:
    ranked = [record for record in records if record["choices"]]
    golds = Counter(record["gold_index"] for record in ranked)
    return {
        "chance": 100 * sum(1 / len(record["choices"]) for record in ranked) / len(ranked) if ranked else None,
        "majority": 100 * max(golds.values()) / len(ranked) if ranked else None,
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _spread(values: Sequence[float]) -> dict[str, float]:
    """How a value differs from template to template; quartiles by linear interpolation."""
    low, first, median, third, high = (float(value) for value in np.quantile(values, (0, 0.25, 0.5, 0.75, 1)))
    return {
        "templates": len(values),
        "mean": sum(values) / len(values),
        "median": median,
        "q1": first,
        "q3": third,
        "min": low,
        "max": high,
        "spread": high - low,
    }


def _summary(judged: Sequence[tuple[Record, Judgement]], of_set: dict[str, sets.SetValue]) -> dict[str, Any]:
    """The result of one template; `of_set`: the metrics that only its whole set has."""
    judgements = [judgement for _, judgement in judged]
    metric = next(iter(judgements[0].values))
    low, high = stats.interval([judgement.values[metric] for judgement in judgements])
    values = {name: 100 * sum(judgement.values[name] for judgement in judgements) / len(judgements) for name in judgements[0].values}
    values |= {name: each.value for name, each in of_set.items()}
    result: dict[str, Any] = {name: values[name] for name in judged[0][0]["metrics"] if name in values}
    return result | {
        "metric": metric,
        "metrics": list(result),
        "value": result[metric],
        "ci95": [100 * low, 100 * high],
        "set_ci95": {name: list(each.ci95) for name, each in of_set.items()},
        "n": len(judged),
        **_guesses([record for record, _ in judged]),
        "unparsed": sum(judgement.unparsed for judgement in judgements),
        "not_found": sum(judgement.not_found for judgement in judgements),
        "cut": sum(record["cut"] for record, _ in judged),
        "at_limit": sum(record.get("at_limit", False) for record, _ in judged),
    }


def _with_and_without(records: Sequence[Record], protocol: str, found: Collection[int]) -> dict[str, Any]:
    """The results on the rows that occur in the training data, and on the others; none where there are none."""
    fits = [record for record in records if protocol in protocols.of_record(record)]
    parts = {
        "found": [record for record in fits if record["row"] in found],
        "clean": [record for record in fits if record["row"] not in found],
    }
    results = {name: summarize(part, protocol) if part else None for name, part in parts.items()}
    kept = ("value", "ci95", "n", "rows")
    return {name: {key: result[key] for key in kept} if result else None for name, result in results.items()}


def read_run(folder: Path) -> tuple[dict[str, Any], list[Record]]:
    """Results and raw records of an evaluation folder."""
    if not (folder / RESULTS).is_file():
        raise UserError(f"{folder} has no {RESULTS}; give a folder made by: mtllama eval MODEL --out {folder}")
    results = folders.read_json(folder / RESULTS)
    if not isinstance(results, dict) or results.get("schema") != SCHEMA:
        raise UserError(f"{folder / RESULTS} is not of schema {SCHEMA}; evaluate again")
    lacking = [name for name in ("model", "suite", "missing", "versions", "tasks") if name not in results]
    if lacking:
        raise UserError(f"{folder / RESULTS} has no {lacking[0]!r}; evaluate again")
    return results, list(read_rows(folder / RECORDS))
