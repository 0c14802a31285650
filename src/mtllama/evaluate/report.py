"""Evaluations side by side: the table of the terminal, and the report (Markdown, one HTML file, figures, numbers)."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mtllama import folders
from mtllama.errors import UserError
from mtllama.evaluate import sections
from mtllama.evaluate.compare import Agreement, Comparison, Run, agreements, by_role, compare, differing, jobs_of, primary, read
from mtllama.evaluate.page import Cell, Page, to_html, to_markdown
from mtllama.evaluate.sections import GROUPS, LEVEL, number_of, p_text, percent, points, value_cell
from mtllama.progress import progress

SETTINGS = ("format", "dtype", "suite", "templates", "limit", "seed", "boundary", "versions")
"""What should be the same in all runs; where it is not, the report says so."""
NUMBERS, DIFFERING = "comparison.json", "differing.jsonl"


def table(runs: Sequence[dict[str, Any]]) -> str:
    """A plain-text table of one or more results: a row per task and protocol; shares in percent with 95% intervals."""
    labels = _labels(len(runs))
    rows = [["task", "protocol", "metric", "n", "chance", "majority", *labels]]
    titles = {}
    for role, group in by_role(jobs_of(runs)):
        titles[len(rows)] = GROUPS[role]
        for task, protocol in group:
            results = [run["tasks"].get(task, {}).get(protocol) for run in runs]
            first = next(filter(None, results))
            values = [_line(value_cell(result)) for result in results]
            rows.append(
                [task, protocol, first["metric"], number_of(results), percent(first["chance"]), percent(first["majority"]), *values]
            )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        f"{label}: {run['model']['name']} ({run['format']}, {run['dtype']}, suite {run['suite']})"
        for label, run in zip(labels, runs, strict=True)
    ]
    for number, row in enumerate(rows):
        if number in titles:
            lines += ["", titles[number]]
        cells = [cell.rjust(width) if 3 <= i <= 5 else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _labels(num: int) -> list[str]:
    return ["model"] if num == 1 else ["base", "tuned"] if num == 2 else ["base", *(f"run {i}" for i in range(2, num + 1))]


def _line(cell: Cell) -> str:
    return " ".join((cell.text, *cell.asides))


def write_report(runs: Sequence[Path], out: Path, *, overwrite: bool = False) -> list[Path]:
    """Write the report of some evaluation folders, the first of which is the base; returns the files."""
    if not runs:
        raise UserError("a report needs at least one folder made by: mtllama eval MODEL --out FOLDER")
    folders.require_new(out, overwrite=overwrite)
    for folder in runs:
        if out.resolve() in (folder.resolve(), *folder.resolve().parents):
            raise UserError(f"{out} holds the run {folder}, which the report would replace; choose another --out")
    loaded = [read(folder, label) for folder, label in zip(runs, _labels(len(runs)), strict=True)]
    with progress("compare", sum(len(run.jobs) for run in loaded[1:]) + sum(len(run.tasks) for run in loaded)) as advance:
        comparisons = [compare(loaded[0], run, advance=advance) for run in loaded[1:]]
        agreed = [agreements(run, advance=advance) for run in loaded]
    page = _page(loaded, comparisons, agreed)
    numbers = {
        "headline": page.lead,
        "notes": page.notes,
        "runs": [{"label": run.label, "run": str(run.folder)} | run.results for run in loaded],
        "comparisons": [asdict(comparison) for comparison in comparisons],
        "agreements": [{"label": run.label, "pairs": [asdict(pair) for pair in pairs]} for run, pairs in zip(loaded, agreed, strict=True)],
    }
    with folders.new_folder(out, overwrite=overwrite) as folder:
        (folder / "figures").mkdir()
        for picture in (picture for section in page.sections for picture in section.pictures):
            (folder / "figures" / f"{picture.name}.png").write_bytes(picture.png)
            folders.write_text(folder / "figures" / f"{picture.name}.svg", picture.svg)
        folders.write_text(folder / "report.md", to_markdown(page))
        folders.write_text(folder / "report.html", to_html(page))
        folders.write_json(folder / NUMBERS, numbers)
        odd = _differing(loaded)
        if odd:
            folders.write_text(folder / DIFFERING, odd)
        names = sorted(file.relative_to(folder) for file in folder.rglob("*") if file.is_file())
    return [out / name for name in names]


def _page(runs: Sequence[Run], comparisons: Sequence[Comparison], agreed: Sequence[Sequence[Agreement]]) -> Page:
    every = [
        sections.results(runs, comparisons),
        sections.families(runs),
        sections.ways(runs, comparisons, agreed),
        sections.answers(runs),
        sections.templates(runs),
        sections.contamination(runs),
        *sections.published(runs),
        sections.training(runs),
        sections.readings(runs),
        sections.provenance(runs),
    ]
    return Page(
        "Zero-shot evaluation",
        [(run.label, run.name) for run in runs],
        _headline(runs, comparisons),
        _notes(runs, comparisons),
        [section for section in every if section.pictures or section.grids or section.readings],
    )


def _differing(runs: Sequence[Run]) -> str:
    """Every item on which protocols of a run choose differently, a JSON line each."""
    lines = []
    for run in runs:
        for task in run.tasks:
            for (item_id, template, _), records in differing(run, task):
                line = {
                    "run": run.label,
                    "task": task,
                    "item_id": item_id,
                    "template": template,
                    "right_answer": sections.gold_of(next(iter(records.values()))),
                    "answers": {way: record["prediction"] for way, record in records.items()},
                    "right": [way for way, record in records.items() if record["correct"]],
                }
                lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    return "".join(lines)


def _headline(runs: Sequence[Run], comparisons: Sequence[Comparison]) -> list[str]:
    lines = []
    for run, comparison in zip(runs[1:], comparisons, strict=True):
        for mean in comparison.means:
            verdict = "no difference shown" if mean.p >= LEVEL else f"{run.label} is {'better' if mean.difference > 0 else 'worse'}"
            lines.append(
                f"{GROUPS[mean.role]} ({len(mean.tasks)}): mean {mean.base:.1f} → {mean.tuned:.1f} from base to {run.label}, "
                f"difference {points(mean.difference)} points, 95% interval [{points(mean.ci95[0])}, {points(mean.ci95[1])}], "
                f"p {p_text(mean.p) if mean.p < 0.001 else f'= {p_text(mean.p)}'}: {verdict}."
            )
    if not comparisons:
        for role, group in by_role(list(runs[0].jobs)):
            values = [runs[0].results["tasks"][task][protocol]["value"] for task, protocol in primary(group)]
            lines.append(f"{GROUPS[role]} ({len(values)}): mean {sum(values) / len(values):.1f}.")
    ranked = [job for job in runs[0].jobs if job[1] == "rank"]
    if ranked:
        counts = (f"{run.label} on {sum(_above(run.result(job)) for job in ranked)} of {len(ranked)}" for run in runs)
        lines.append(f"Above both chance and the most frequent answer by its whole interval (ranking): {', '.join(counts)} tasks.")
    return lines


def _above(result: dict[str, Any] | None) -> bool:
    return result is not None and result["ci95"][0] > max(result["chance"], result["majority"])


def _notes(runs: Sequence[Run], comparisons: Sequence[Comparison]) -> list[str]:
    """What a reader must know before believing a number."""
    notes = []
    if sections.sampled(runs):
        notes.append(
            "These numbers are on the embedded sampler data, not on the real data sets: they are not comparable with published ones."
        )
    if not comparisons:
        notes.append("One run alone: nothing is compared.")
    for key in SETTINGS:
        settings: list[Any] = [run.results.get(key) for run in runs]
        if all(isinstance(setting, dict) for setting in settings):
            parts = dict.fromkeys(part for setting in settings for part in setting)
            notes += [_unlike(f"{key}, {part}", runs, [setting.get(part) for setting in settings]) for part in parts]
        else:
            notes.append(_unlike(key, runs, settings))
    notes = [note for note in notes if note]
    digests = {run.results["model"].get("weights_sha256") for run in runs}
    if len(runs) > 1 and len(digests) == 1 and None not in digests:
        notes.append("All runs measured the same weights.")
    for run, comparison in zip(runs[1:], comparisons, strict=True):
        if comparison.unmatched:
            notes.append(f"Not compared, because only one of base and {run.label} has it: {', '.join(comparison.unmatched)}.")
    for reason in dict.fromkeys(reason for run in runs for reason in run.results["missing"].values()):
        without = [run.label for run in runs if reason in run.results["missing"].values()]
        notes.append(f"Missing in {'all runs' if len(without) == len(runs) > 1 else ' and '.join(without)}: {reason}.")
    return notes


def _unlike(name: str, runs: Sequence[Run], values: Sequence[Any]) -> str:
    """A note on a setting in which the runs differ, else nothing."""
    said = [json.dumps(value, ensure_ascii=False) for value in values]
    if len(set(said)) == 1:
        return ""
    return f"The runs differ in {name}: {'; '.join(f'{run.label} {text}' for run, text in zip(runs, said, strict=True))}."
