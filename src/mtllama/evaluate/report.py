"""Evaluations side by side: the table of the terminal, the paired comparison, and the report (Markdown, one HTML file, figures)."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from mtllama import folders
from mtllama.errors import UserError
from mtllama.evaluate import protocols
from mtllama.evaluate.compare import Comparison, Difference, Job, Key, Mean, Run, by_role, compare, jobs_of, primary, read
from mtllama.evaluate.page import Cell, Grid, Page, Picture, Reading, Section, to_html, to_markdown
from mtllama.progress import progress
from mtllama.tasks.catalog import SAMPLER
from mtllama.tasks.files import read_rows

__all__ = ["Comparison", "Difference", "Mean", "compare", "table", "write_report"]

LEVEL = 0.05
GROUPS = {"unseen data set": "Unseen data sets", "unseen task": "Unseen tasks", "train": "Data sets of the training mixture"}
SETTINGS = ("format", "dtype", "suite", "limit", "seed", "versions")
"""What should be the same in all runs; where it is not, the report says so."""
PROTOCOLS = {"rank": "ranking the choices", "generate": "generating the answer"}
ANSWERS = {"rank": "ranked first", "generate": "generated"}
MEASURE = "accuracy of ranking the choices, or where nothing was ranked the F1 or accuracy of the generated answer"
METRICS = "metrics.jsonl"
"""What training leaves in a model's folder: a line a step."""
NUM_READINGS = 4
MAX_SHOWN = 3_000
"""Characters of a prompt that are shown; the middle of a longer one is left out."""


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
            values = [_line(_value(result)) for result in results]
            rows.append([task, protocol, first["metric"], _count(results), _percent(first["chance"]), _percent(first["majority"]), *values])
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


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _points(value: float) -> str:
    return f"{round(round(value, 6), 1) + 0.0:+.1f}".replace("-", "−")


def _p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _line(cell: Cell) -> str:
    return " ".join((cell.text, *cell.asides))


def _count(results: Sequence[dict[str, Any] | None]) -> str:
    return "/".join(dict.fromkeys(str(result["n"]) for result in results if result))


def _value(result: dict[str, Any] | None) -> Cell:
    """The value, and beside it interval, exact match and unparsed answers."""
    if result is None:
        return Cell("–")
    extras = [f"[{result['ci95'][0]:.1f}, {result['ci95'][1]:.1f}]"]
    if "em" in result:
        extras.append(f"EM {result['em']:.1f}")
    if result["unparsed"]:
        extras.append(f"{result['unparsed']} unparsed")
    return Cell(_percent(result["value"]), tuple(extras))


def write_report(runs: Sequence[Path], out: Path, *, overwrite: bool = False) -> list[Path]:
    """Write the report of some evaluation folders, the first of which is the base; returns the files."""
    if not runs:
        raise UserError("a report needs at least one folder made by: mtllama eval MODEL --out FOLDER")
    folders.require_new(out, overwrite=overwrite)
    for run in runs:
        if out.resolve() in (run.resolve(), *run.resolve().parents):
            raise UserError(f"{out} holds the run {run}, which the report would replace; choose another --out")
    loaded = [read(run, label) for run, label in zip(runs, _labels(len(runs)), strict=True)]
    with progress("compare", sum(len(run.jobs) for run in loaded[1:])) as advance:
        base = (loaded[0].results, loaded[0].records)
        comparisons = [compare(base, (run.results, run.records), advance=advance) for run in loaded[1:]]
    sections = [_results(loaded, comparisons), _published(loaded), _training(loaded), _readings(loaded), _provenance(loaded)]
    page = Page(
        "Zero-shot evaluation",
        [(run.label, run.name) for run in loaded],
        _headline(loaded, comparisons),
        _notes(loaded, comparisons),
        [section for section in sections if section.pictures or section.grids or section.readings],
    )
    numbers = {
        "headline": page.lead,
        "notes": page.notes,
        "runs": [{"label": run.label, "run": str(run.folder)} | run.results for run in loaded],
        "comparisons": [asdict(comparison) for comparison in comparisons],
    }
    with folders.new_folder(out, overwrite=overwrite) as folder:
        (folder / "figures").mkdir()
        for picture in (picture for section in page.sections for picture in section.pictures):
            (folder / "figures" / picture.name).write_bytes(picture.png)
        folders.write_text(folder / "report.md", to_markdown(page))
        folders.write_text(folder / "report.html", to_html(page))
        folders.write_json(folder / "comparison.json", numbers)
        names = sorted(file.relative_to(folder) for file in folder.rglob("*") if file.is_file())
    return [out / name for name in names]


def _headline(runs: Sequence[Run], comparisons: Sequence[Comparison]) -> list[str]:
    lines = []
    for run, comparison in zip(runs[1:], comparisons, strict=True):
        for mean in comparison.means:
            verdict = "no difference shown" if mean.p >= LEVEL else f"{run.label} is {'better' if mean.difference > 0 else 'worse'}"
            lines.append(
                f"{GROUPS[mean.role]} ({len(mean.tasks)}): mean {mean.base:.1f} → {mean.tuned:.1f} from base to {run.label}, "
                f"difference {_points(mean.difference)} points, 95% interval [{_points(mean.ci95[0])}, {_points(mean.ci95[1])}], "
                f"p {_equal(mean.p)}: {verdict}."
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


def _equal(p: float) -> str:
    return _p(p) if p < 0.001 else f"= {_p(p)}"


def _above(result: dict[str, Any] | None) -> bool:
    return result is not None and result["ci95"][0] > max(result["chance"], result["majority"])


def _sampled(runs: Sequence[Run]) -> bool:
    return any(run.results["suite"] == SAMPLER for run in runs)


def _notes(runs: Sequence[Run], comparisons: Sequence[Comparison]) -> list[str]:
    """What a reader must know before believing a number."""
    notes = []
    if _sampled(runs):
        notes.append(
            "These numbers are on the embedded sampler data, not on the real data sets: they are not comparable with published ones."
        )
    if not comparisons:
        notes.append("One run alone: nothing is compared.")
    for key in SETTINGS:
        values = [json.dumps(run.results[key]) for run in runs]
        if len(set(values)) > 1:
            notes.append(f"The runs differ in {key}: {'; '.join(f'{run.label} {value}' for run, value in zip(runs, values, strict=True))}.")
    digests = {run.results["model"].get("weights_sha256") for run in runs}
    if len(runs) > 1 and len(digests) == 1 and None not in digests:
        notes.append("All runs measured the same weights.")
    for run, comparison in zip(runs[1:], comparisons, strict=True):
        if comparison.unmatched:
            notes.append(f"Not compared, because only one of base and {run.label} has it: {', '.join(comparison.unmatched)}.")
    for run in runs:
        notes += [f"Missing in {run.label}: {reason}." for reason in run.results["missing"].values()]
    return notes


def _results(runs: Sequence[Run], comparisons: Sequence[Comparison]) -> Section:
    jobs = jobs_of([run.results for run in runs])
    pictures = [_picture(runs, primary(jobs), "results.png", f"Percent: {MEASURE}.")]
    generated = [(task, protocol) for task, protocol in jobs if protocol == "generate" and (task, "rank") in jobs]
    if generated:
        caption = "The same tasks by generated text: the answer must be one of the choices, word for word after normalisation."
        pictures.append(_picture(runs, generated, "generated.png", caption))
    grids = []
    if comparisons:
        head = ("mean over", "tasks", "items", "base", "other run", "difference", "p")
        rows = [
            [
                Cell(GROUPS[mean.role] + (f", {run.label}" if len(runs) > 2 else "")),
                *map(Cell, (str(len(mean.tasks)), str(mean.num_items), _percent(mean.base), _percent(mean.tuned))),
                *_difference(mean, mean.p),
            ]
            for run, comparison in zip(runs[1:], comparisons, strict=True)
            for mean in comparison.means
        ]
        grids.append(Grid("Means", head if len(runs) > 2 else (*head[:4], "tuned", *head[5:]), rows))
    for role, group in by_role(jobs):
        for protocol in protocols.PROTOCOLS:
            same = [job for job in group if job[1] == protocol]
            if same:
                grids.append(_task_grid(f"{GROUPS[role]}, by {PROTOCOLS[protocol]}", same, runs, comparisons))
    paragraphs = [
        f"All values are percent. A mean is over the tasks of its group, each by its primary measure: {MEASURE}.",
        "Chance is what guessing gets, majority what always giving the most frequent answer gets. Intervals are 95%: Clopper-Pearson "
        "where every item is right or wrong, else bootstrap over items. Unparsed are generated answers that are none of the choices, or "
        "empty.",
    ]
    if comparisons:
        paragraphs.append(
            "Differences are paired: both runs answered the same items. p is of a two-sided sign-flip test; beside it stands p adjusted by "
            "Holm's method over the tasks of the same protocol, and a difference is bold where that is below 0.05."
        )
    return Section("Results", paragraphs, pictures=pictures, grids=grids)


def _difference(row: Difference | Mean, p: float) -> list[Cell]:
    low, high = row.ci95
    return [Cell(_points(row.difference), (f"[{_points(low)}, {_points(high)}]",), strong=p < LEVEL), Cell(_p(row.p))]


def _task_grid(title: str, jobs: Sequence[Job], runs: Sequence[Run], comparisons: Sequence[Comparison]) -> Grid:
    head = ["task", "n", "chance", "majority", *(run.label for run in runs)]
    for run in runs[1:]:
        head += [f"difference{f', {run.label}' if len(runs) > 2 else ''}", "p", "p (Holm)"]
    rows = []
    for job in jobs:
        results = [run.result(job) for run in runs]
        first: dict[str, Any] = next(filter(None, results))
        row = [Cell(job[0]), Cell(_count(results)), Cell(_percent(first["chance"])), Cell(_percent(first["majority"]))]
        row += [_value(result) for result in results]
        for comparison in comparisons:
            found = next((each for each in comparison.tasks if (each.task, each.protocol) == job), None)
            row += [*_difference(found, found.p_holm), Cell(_p(found.p_holm))] if found else [Cell("–")] * 3
        rows.append(row)
    return Grid(title, tuple(head), rows)


def _picture(runs: Sequence[Run], jobs: Sequence[Job], name: str, caption: str) -> Picture:
    from mtllama.evaluate.figures import Bars, draw_bars  # matplotlib takes a second to load, and a table needs none

    panels, said = [], []
    for role, group in by_role(jobs):
        rows = []
        for job in group:
            results = [run.result(job) for run in runs]
            first: dict[str, Any] = next(filter(None, results))
            ends = tuple((result["value"], *result["ci95"]) if result else None for result in results)
            rows.append(Bars(job[0], ends, first["chance"], first["majority"]))
            guess = "" if first["chance"] is None else f" (chance {first['chance']:.1f})"
            said.append(
                f"{job[0]}: {', '.join(f'{run.label} {_value(result).text}' for run, result in zip(runs, results, strict=True))}{guess}"
            )
        panels.append((GROUPS[role], rows))
    png = draw_bars(panels, [f"{run.label}: {run.name}" for run in runs], "percent, with 95% intervals")
    return Picture(name, png, f"Bars in percent. {'; '.join(said)}.", caption)


def _published(runs: Sequence[Run]) -> Section:
    """The original's numbers beside ours."""
    published = yaml.safe_load(resources.files("mtllama.evaluate").joinpath("published.yaml").read_text(encoding="utf-8"))
    rows = []
    for _, group in by_role(jobs_of([run.results for run in runs])):
        for job in primary(group):
            if job[0] in published["tasks"]:
                theirs = [Cell(f"{score[0]:.1f}", tuple(f"EM {em:.1f}" for em in score[1:])) for score in published["tasks"][job[0]]]
                rows.append([Cell(job[0]), *theirs, *(_value(run.result(job)) for run in runs), Cell(job[1])])
    head = ("task", *(f"{model} (published)" for model in published["models"]), *(f"ours: {run.label}" for run in runs), "our protocol")
    paragraphs = [
        f"{published['models'][1]} is another model, of 7 billion parameters, measured under its own protocol: {published['protocol']}. "
        f"Source: {published['source']} ({published['url']}). Accuracy, or F1 with exact match (EM), in percent.",
        *(
            f"About {caveat}"
            for caveat in published["caveats"]
            if any(row[0].text == caveat.partition(":")[0].lower().replace("-", "") for row in rows)
        ),
    ]
    warnings = (
        ["Not comparable: our columns are on the embedded sampler data, the published ones on the real data sets."]
        if _sampled(runs)
        else []
    )
    return Section("Beside the published MT-LLaMA", paragraphs, warnings=warnings, grids=[Grid("", head, rows)] if rows else [])


def _training(runs: Sequence[Run]) -> Section:
    """Losses of the models whose training left its log beside their weights."""
    from mtllama.evaluate.figures import draw_losses, smooth

    section = Section("Training loss", [])
    for run in runs[1:] or runs:
        folder = Path(run.results["model"]["folder"])
        manifest = folders.read_manifest(folder) or {}
        if not (folder / METRICS).is_file() or manifest.get("recipe") != run.results["model"].get("recipe"):
            continue  # no log, or the folder was trained anew since this run
        lines = read_rows(folder / METRICS)
        window = max(1, len(lines) // 20)
        families = sorted({family for line in lines for family in line["families"]})
        series, rows = [], []
        for name in ("all", *families):
            steps = [(line["step"], line["families"].get(name) if name != "all" else line) for line in lines]
            there = [(step, part["loss"], part["targets"]) for step, part in steps if part]
            targets = [count for _, _, count in there]
            if name == "all":  # its count runs on over the steps
                targets = [count - before for before, count in zip([0, *targets], targets, strict=False)]
            smoothed = smooth([loss for _, loss, _ in there], targets, window)
            series.append((name, [step for step, _, _ in there], smoothed))
            rows.append([Cell(name), Cell(str(sum(targets))), Cell(f"{smoothed[0]:.3f}"), Cell(f"{smoothed[-1]:.3f}")])
        said = "; ".join(f"{row[0].text}: {row[2].text} to {row[3].text}" for row in rows)
        about = f"{len(lines)} steps, smoothed by an exponential mean weighted by target tokens, window {window}"
        caption = f"Loss of {run.label} ({run.name}) over {about}."
        section.pictures.append(Picture(f"loss-{run.label.replace(' ', '-')}.png", draw_losses(series), f"Loss by step. {said}.", caption))
        section.grids.append(Grid(f"Loss of {run.label} by family", ("family", "target tokens", "first", "last"), rows))
    return section


def _readings(runs: Sequence[Run]) -> Section:
    """A few items of each task, chosen by rule: the first ones of each kind of outcome."""
    kinds = ("right", "wrong") if len(runs) == 1 else (f"{runs[1].label} better", "base better", "both right", "both wrong")
    readings = []
    for _, group in by_role(list(runs[0].jobs)):
        for job in primary(group):
            chosen: dict[str, list[Key]] = {kind: [] for kind in kinds}
            metric = runs[0].results["tasks"][job[0]][job[1]]["metric"]
            for key in runs[0].jobs[job]:
                values = [protocols.value(run.jobs[job][key], metric) for run in runs[:2] if key in run.jobs.get(job, {})]
                if len(values) == len(runs[:2]):
                    chosen[_kind(values, kinds)].append(key)
            turns = [(turn, kind, key) for kind in kinds for turn, key in enumerate(chosen[kind][:NUM_READINGS])]
            first = sorted(turns, key=lambda each: each[0])[:NUM_READINGS]
            readings += [_reading(runs, job, key, kind) for kind in kinds for _, k, key in first if k == kind]
    text = (
        f"{NUM_READINGS} items a task, chosen by rule and not by merit: the first of each kind of outcome ({', '.join(kinds)}), then the "
        "second. A score is the sum of the log-probabilities of a choice's tokens and the end marker."
    )
    return Section("Items to read", [text], readings=readings)


def _kind(values: Sequence[float], kinds: Sequence[str]) -> str:
    right = values[0] >= 0.5
    if len(values) == 1 or values[0] == values[1]:
        return kinds[-2] if right else kinds[-1]
    return kinds[0] if values[1] > values[0] else kinds[1]


def _reading(runs: Sequence[Run], job: Job, key: Key, kind: str) -> Reading:
    records = [run.jobs.get(job, {}).get(key) for run in runs]
    prompts: dict[str, list[str]] = {}
    answers = []
    ways = [protocol for protocol in protocols.PROTOCOLS if any((job[0], protocol) in run.jobs for run in runs)]
    for run, record in zip(runs, records, strict=True):
        if record is not None:
            prompts.setdefault(_shorten(record["prompt"]), []).append(run.label)
        said = [run.jobs.get((job[0], protocol), {}).get(key) for protocol in ways]
        answers.append(
            [
                Cell(run.label),
                *(
                    Cell("–") if each is None else Cell(_shorten(each["prediction"]) or "(nothing)", strong=each["correct"])
                    for each in said
                ),
            ]
        )
    first = runs[0].jobs[job][key]
    gold = first["gold"] if isinstance(first["gold"], str) else " / ".join(first["gold"])
    texts = [("Prompt" if len(prompts) == 1 else f"Prompt of {', '.join(labels)}", prompt) for prompt, labels in prompts.items()]
    grids = [Grid("Answers", ("run", *(ANSWERS[way] for way in ways)), answers, words=True)]
    if first["scores"]:
        rows = [
            [Cell(choice + (" (gold)" if i == first["gold_index"] else ""))]
            + [Cell(f"{record['scores'][i]:.2f}", strong=record["predicted_index"] == i) if record else Cell("–") for record in records]
            for i, choice in enumerate(first["choices"])
        ]
        grids.append(Grid("Scores", ("choice", *(run.label for run in runs)), rows))
    return Reading(job[0], f"Item {key[0]}: {kind}", [*texts, ("Gold", gold)], grids)


def _shorten(text: str) -> str:
    half = MAX_SHOWN // 2
    return text if len(text) <= MAX_SHOWN else f"{text[:half]}\n[{len(text) - 2 * half} characters left out]\n{text[-half:]}"


def _provenance(runs: Sequence[Run]) -> Section:
    facts: dict[str, list[str]] = {}
    for run in runs:
        model, recipe = run.results["model"], run.results["model"].get("recipe")
        described = {
            "model": model["name"],
            "run folder": str(run.folder),
            "parameters": f"{model['parameters']:,}" if model.get("parameters") else "",
            "weights, SHA-256": str(model.get("weights_sha256") or "")[:16],
            "delta": str(model.get("delta") or "none"),
            "recipe": "none" if not recipe else ", ".join(f"{key} {value}" for key, value in recipe.get("train", recipe).items()),
            **{key: "none" if run.results[key] is None else str(run.results[key]) for key in SETTINGS if key != "versions"},
            "versions": ", ".join(f"{package} {version}" for package, version in run.results["versions"].items()),
            "missing tasks": "; ".join(run.results["missing"].values()) or "none",
        }
        for key, value in described.items():
            facts.setdefault(key, []).append(value)
    counts = []
    for job in jobs_of([run.results for run in runs]):
        results = [run.result(job) for run in runs]
        columns = [" / ".join(dict.fromkeys(f"{result['split']} {result['note']}".strip() for result in results if result))]
        columns += [" / ".join(dict.fromkeys(result["data"] for result in results if result))]
        columns += [
            " / ".join("–" if result is None else str(result[key]) for result in results) for key in ("n", "skipped", "cut", "unparsed")
        ]
        counts.append([Cell(" ".join(job)), *map(Cell, columns)])
    order = "" if len(runs) == 1 else f" ({' / '.join(run.label for run in runs)})"
    return Section(
        "Provenance",
        [
            f"Counts{order}: items; rows to which a template does not apply; prompts that were cut to fit; answers that are none of the "
            "choices, or empty.",
        ],
        grids=[
            Grid(
                "Runs",
                ("setting", *(run.label for run in runs)),
                [[Cell(key), *map(Cell, values)] for key, values in facts.items()],
                words=True,
            ),
            Grid("Data and counts", ("task, protocol", "split", "file", "n", "skipped", "cut", "unparsed"), counts),
        ],
    )
