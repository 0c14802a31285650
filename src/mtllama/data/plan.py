"""What a mixture will draw, before anything is drawn: by task (data set x prompt), by data set, by family."""

from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Any

from mtllama.data.mixture import Mixture, MixtureConfig, task_name
from mtllama.data.prompt import PromptEncoder
from mtllama.tasks.catalog import Task, find_tasks
from mtllama.tasks.template import Example

SAMPLED = 32
"""Draws of each stream that the expected tokens are estimated from."""
OVERSAMPLED = 1.05
"""A task is called oversampled where its rate is above its rows by more than this factor."""
SHOWN = 5
"""Tasks that a warning names."""


def plan(mixture: Mixture, draws: int, encoder: PromptEncoder | None = None) -> dict[str, Any]:
    """The plan of a mixture whose data is at hand, for `draws` draws; with an encoder, the expected tokens too."""
    rows, idle = [], []
    for stream in mixture.streams:
        examples = [draw.example for draw in (stream[i] for i in range(min(SAMPLED, stream.num_rows))) if draw.example]
        one, tokens = stream.rate / len(stream.templates), _mean_tokens(examples, encoder)
        if not examples:
            idle += [task_name(stream.task, template) for template in stream.templates]
        for template in stream.templates:
            rows.append(_row(stream.task, stream.family, template, stream.num_rows, one, tokens))
    warnings = [*mixture.remarks(), *(f"{task} asks none of its rows: its draws are skipped" for task in idle)]
    sizes: dict[str, int] = {}
    for part in mixture.parts:
        sizes[part.task] = sizes.get(part.task, 0) + part.num_rows
    return _whole(rows, sizes, draws, warnings)


def published(names: Sequence[str], config: MixtureConfig, draws: int) -> dict[str, Any]:
    """The plan of data sets as they were published, from the catalogue alone: nothing is read.

    The prompts are those of T0's mixture for its sets, else the catalogue's.
    """
    rows, sizes = [], {}
    for task in find_tasks(names):
        templates = task.p3_templates or tuple(prompt.name for prompt in task.prompts)
        size = sizes[task.name] = _published_size(task)
        one = config.set_rate(task, size, len(templates)) / len(templates)
        for template in templates:
            rows.append(_row(task.name, task.family, template, task.p3_rows.get(template, size), one, None))
    return _whole(rows, sizes, draws, [])


def _published_size(task: Task) -> int:
    return task.splits["train"] if "train" in task.splits else max(task.splits.values())


def _mean_tokens(examples: Sequence[Example], encoder: PromptEncoder | None) -> float | None:
    if encoder is None:
        return None
    encoded = encoder.encode_batch([(example.inputs, example.targets) for example in examples])
    lengths = [len(each.ids) for each in encoded if each]
    return sum(lengths) / len(lengths) if lengths else 0.0


def _row(task: str, family: str, template: str, num_rows: int, rate: Fraction, tokens: float | None) -> dict[str, Any]:
    return {
        "task": task_name(task, template),
        "set": task,
        "template": template,
        "family": family,
        "rows": num_rows,
        "rate": rate,
        "tokens": tokens,
    }


def _whole(rows: list[dict[str, Any]], sizes: dict[str, int], draws: int, warnings: list[str]) -> dict[str, Any]:
    total = sum((row["rate"] for row in rows), Fraction(0))
    for row in rows:
        share = row["rate"] / total
        row["share"], row["draws"] = float(share), float(share * draws)
        row["passes"] = row["draws"] / row["rows"]
        row["tokens"] = None if row["tokens"] is None else row["tokens"] * row["draws"]
    often = sorted((row for row in rows if row["rate"] > OVERSAMPLED * row["rows"]), key=lambda row: -row["rate"] / row["rows"])
    if often:
        named = ", ".join(f"{row['task']} ({float(row['rate'] / row['rows']):.1f} x)" for row in often[:SHOWN])
        more = f" and {len(often) - SHOWN} more" if len(often) > SHOWN else ""
        warnings.append(f"{len(often)} tasks are oversampled (their rate is above the rows that they apply to): {named}{more}")
    sets = [_sum("set", name, group, sizes[name]) for name, group in _grouped(rows, "set")]
    families = [
        _sum("family", name, group, sum(sizes[each] for each in dict.fromkeys(r["set"] for r in group)))
        for name, group in _grouped(rows, "family")
    ]
    tokens = None if any(row["tokens"] is None for row in rows) else sum(row["tokens"] for row in rows)
    for row in (*rows, *sets, *families):
        row["rate"] = _number(row["rate"])
    return {
        "sets": len(sets),
        "tasks": len(rows),
        "total_rate": _number(total),
        "draws": draws,
        "tokens": tokens,
        "rows": rows,
        "by_set": sets,
        "by_family": families,
        "oversampled": [row["task"] for row in often],
        "warnings": warnings,
    }


def _grouped(rows: Iterable[dict[str, Any]], key: str) -> list[tuple[str, list[dict[str, Any]]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row[key], []).append(row)
    return list(groups.items())


def _sum(key: str, name: str, group: Sequence[dict[str, Any]], num_rows: int) -> dict[str, Any]:
    draws = sum(row["draws"] for row in group)
    tokens = [row["tokens"] for row in group]
    return {
        key: name,
        "family": group[0]["family"],
        "rows": num_rows,
        "templates": len(group),
        "rate": sum((row["rate"] for row in group), Fraction(0)),
        "share": sum(row["share"] for row in group),
        "draws": draws,
        "passes": draws / num_rows,
        "tokens": None if None in tokens else sum(tokens),
    }


def _number(value: Fraction) -> int | float:
    return int(value) if value.denominator == 1 else float(value)
