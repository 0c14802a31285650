"""The sections of a report: what is shown of the runs, in tables, figures and items to read."""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mtllama import folders
from mtllama.evaluate import stats
from mtllama.evaluate.bias import bias
from mtllama.evaluate.compare import Agreement, Comparison, Difference, Job, Key, Mean, Run, by_role, differing, jobs_of, primary
from mtllama.evaluate.page import Cell, Grid, Picture, Reading, Section
from mtllama.evaluate.protocols import Record, value
from mtllama.evaluate.sets import SetDifference
from mtllama.tasks.catalog import SAMPLER, find_tasks
from mtllama.tasks.files import read_rows

LEVEL = 0.05
RANK = "rank"
GROUPS = {"unseen data set": "Unseen data sets", "unseen task": "Unseen tasks", "train": "Data sets of the training mixture"}
MEANING = {
    "rank": "the choice with the largest sum of log-probabilities of its tokens and the end marker",
    "rank-mean": "the same, by the mean over the tokens",
    "rank-char": "the same, divided by the characters of the choice",
    "rank-byte": "the same, divided by its UTF-8 bytes",
    "rank-pmi": "the same, less what the choice has without the prompt",
    "generate": "the generated answer, which must be one of the choices word for word after normalisation",
    "mt-llama": "the generated answer, read by MT-LLaMA's original rule",
    "mt-llama-glue": "the same rule with GLUE's map of labels",
}
"""What each protocol takes for the answer."""
MEASURE = "accuracy of ranking the choices, or where nothing was ranked the F1 or accuracy of the generated answer"
METRICS = "metrics.jsonl"
"""What training leaves in a model's folder: a line a step."""
NUM_READINGS = 20
MAX_SHOWN = 3_000
"""Characters of a prompt that are shown; the middle of a longer one is left out."""
MAX_ANSWER = 300
"""Characters of an answer in a table."""

NOTHING = Cell("–")


def percent(number: float | None) -> str:
    """A share as the report writes it."""
    return "–" if number is None else f"{number:.1f}"


def points(number: float) -> str:
    """A difference, always with its sign."""
    return f"{round(round(number, 6), 1) + 0.0:+.1f}".replace("-", "−")


def p_text(p: float) -> str:
    """A p-value, never as zero."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def number_of(results: Iterable[dict[str, Any] | None], key: str = "n") -> str:
    """A count that runs should share, and all of them where they do not."""
    return "/".join(dict.fromkeys(str(result[key]) for result in results if result))


def value_cell(result: dict[str, Any] | None) -> Cell:
    """The value, and beside it interval, exact match, metrics of the whole set and answers that could not be read."""
    if result is None:
        return NOTHING
    extras = [_interval(result["ci95"])]
    if "em" in result:
        extras.append(f"EM {result['em']:.1f}")
    extras += [f"{name} {result[name]:.1f} {_interval(ends)}" for name, ends in result.get("set_ci95", {}).items()]
    extras += [f"{result[key]} {said}" for key, said in (("unparsed", "unparsed"), ("not_found", "not found")) if result.get(key)]
    return Cell(percent(result["value"]), tuple(extras))


def results(runs: Sequence[Run], comparisons: Sequence[Comparison]) -> Section:
    """Every task by its primary protocol, and the means over the tasks."""
    jobs = primary(jobs_of([run.results for run in runs]))
    pictures = [_bars(runs, jobs, "results", f"Percent: {MEASURE}.")]
    grids = []
    if comparisons:
        rows = [
            [
                Cell(GROUPS[mean.role] + (f", {run.label}" if len(runs) > 2 else "")),
                *map(Cell, (str(len(mean.tasks)), str(mean.num_items), percent(mean.base), percent(mean.tuned))),
                *_difference(mean),
            ]
            for run, comparison in zip(runs[1:], comparisons, strict=True)
            for mean in comparison.means
        ]
        other = "other run" if len(runs) > 2 else runs[1].label
        grids.append(Grid("Means over tasks", ("mean over", "tasks", "items", "base", other, "difference", "p"), rows))
    grids += [_task_grid(GROUPS[role], group, runs, comparisons) for role, group in by_role(jobs)]
    of_sets = _set_grids(jobs, runs, comparisons)
    grids += of_sets
    paragraphs = [
        f"All values are percent. A mean is over the tasks of its group, each by its primary measure: {MEASURE}.",
        "Chance is what guessing gets, majority what always giving the most frequent answer gets. Intervals are 95%: Clopper-Pearson "
        "where every item is right or wrong, else bootstrap over items. Unparsed are generated answers that are none of the choices, or "
        "empty.",
    ]
    if comparisons:
        paragraphs += [
            "Differences are paired: both runs answered the same items, and an item that several templates ask about counts once. Their "
            "intervals are of the paired bootstrap. p is of McNemar's exact test, or, where values are not 0 or 1 and for means, of "
            "random sign flips; both are two-sided. Under it stands p adjusted by Holm's method over all tasks of these tables (in the "
            "tables of another protocol, over the tasks of theirs), and a difference is bold where that is below 0.05.",
            "Better and worse count the items on which a run beats base and the reverse. The last column is the least true difference "
            "that a test with as many items, as much at odds, would find four times out of five (power 80%, level 5%, before Holm). "
            "Smaller ones are likely to be missed.",
        ]
    if of_sets:
        paragraphs.append(
            "Macro-F1 and BLEU are of a whole set, and no item has a value of its own. Their differences are paired, too: the interval is of "
            "the bootstrap that draws the same items for both runs, p of random swaps of the two runs' answers to an item, Holm's p over the "
            "rows of their table."
        )
    return Section("Results", paragraphs, pictures=pictures, grids=grids)


def families(runs: Sequence[Run]) -> Section:
    """The mean over the tasks of each family."""
    from mtllama.evaluate.figures import Bars, draw_bars

    jobs = primary(jobs_of([run.results for run in runs]))
    groups: dict[str, list[Job]] = {}
    for job in jobs:
        groups.setdefault(find_tasks([job[0]])[0].family, []).append(job)
    if len(groups) < 2:
        return Section("By family", [])
    drawn, rows = [], []
    for family, group in groups.items():
        ends: list[tuple[float, float, float] | None] = []
        for run in runs:
            there = [stats.as_table(run.values(job).values()) for job in group if job in run.jobs]
            if len(there) < len(group):  # a mean over other tasks would be compared with it
                ends.append(None)
                continue
            low, high = stats.mean_interval(there)
            ends.append((100 * float(np.mean([stats.item_values(table).mean() for table in there])), 100 * low, 100 * high))
        chances = [next(filter(None, (run.result(job) for run in runs)))["chance"] for job in group]
        chance = None if None in chances else sum(chances) / len(chances)
        drawn.append(Bars(family, tuple(ends), chance, None))
        cells = [NOTHING if end is None else Cell(percent(end[0]), (_interval(end[1:]),)) for end in ends]
        rows.append([Cell(family), Cell(str(len(group))), Cell(", ".join(task for task, _ in group)), Cell(percent(chance)), *cells])
    drawing = draw_bars([("Families of tasks", drawn)], _names(runs), "percent, with 95% intervals")
    said = "; ".join(
        f"{row[0].text}: {', '.join(f'{run.label} {cell.text}' for run, cell in zip(runs, row[4:], strict=True))}" for row in rows
    )
    caption = "Mean over the tasks of a family, each by its primary measure."
    text = "Intervals are of a bootstrap that draws items within their tasks: they say nothing about other tasks of the family."
    grid = Grid("Means by family", ("family", "tasks", "which", "chance", *(run.label for run in runs)), rows)
    return Section(
        "By family",
        [text],
        pictures=[Picture("families", drawing.png, drawing.svg, f"Bars in percent. {said}.", caption)],
        grids=[grid],
    )


def ways(runs: Sequence[Run], comparisons: Sequence[Comparison], agreed: Sequence[Sequence[Agreement]]) -> Section:
    """The protocols of each run side by side: their values, how often they agree, and the items on which they do not."""
    tasks = [task for task in _tasks(runs) if any(len(run.ways(task)) > 1 for run in runs)]
    if not tasks:
        return Section("Protocols", [])
    jobs = jobs_of([run.results for run in runs])
    used = [way for way in _ordered(way for _, way in jobs)]
    paragraphs = [
        "A protocol is a way to read an answer off what a model computed. All protocols below judge the same computation of the same items.",
        "Agreement is the share of answers in which two protocols choose the same, right or wrong, where both apply.",
    ]
    terms = [(way, MEANING.get(way, "")) for way in used]
    generated = [(task, way) for task, way in jobs if way == "generate" and (task, "rank") in jobs]
    pictures = []
    if generated:
        caption = "The same tasks by generated text: the answer must be one of the choices, word for word after normalisation."
        pictures.append(_bars(runs, generated, "generated", caption))
    grids, readings = [], []
    for run, pairs in zip(runs, agreed, strict=True):
        rows = []
        for task in tasks:
            there = [run.result((task, way)) for way in used]
            first = next(filter(None, there), None)
            if first:
                guesses = (Cell(str(first["n"])), Cell(percent(first["chance"])), Cell(percent(first["majority"])))
                values = [value_cell(each) for each in there]
                for i, each in enumerate(there):  # a protocol may apply to some of the templates only
                    if each and each["n"] != first["n"]:
                        values[i] = values[i]._replace(asides=(*values[i].asides, f"n {each['n']}"))
                rows.append([Cell(task), *guesses, *values])
        grids.append(Grid(f"Values under each protocol: {run.label}", ("task", "n", "chance", "majority", *used), rows))
        shares: dict[tuple[str, str], list[float]] = {}
        for pair in pairs:
            shares.setdefault((pair.first, pair.second), []).append(pair.agreement)
        means = {pair: sum(each) / len(each) for pair, each in shares.items()}
        if len(means) > 1:
            grids.append(_matrix(f"Agreement of protocols, mean over tasks: {run.label}", used, means))
    group = "Every other protocol against the primary one"
    for run, pairs in zip(runs, agreed, strict=True):
        chosen = dict(primary(list(run.jobs)))
        rows = [_against(pair) for pair in pairs if chosen[pair.task] == pair.first]
        if rows:
            head = ("task", "protocols", "items", "chance", "majority", "first", "second", "difference", "p", "agreement")
            grid = Grid(f"Second minus first, item by item: {run.label}", (*head, "better/worse", "detectable"), rows)
            readings.append(Reading(group, run.label, [], [grid]))
    if comparisons:
        first_ways = primary(jobs)
        for way in used:
            same = [job for job in jobs if job[1] == way and job not in first_ways]
            if same:
                compared = [_task_grid(f"By {way}", same, runs, comparisons), *_set_grids(same, runs, comparisons)]
                readings.append(Reading("Runs compared under the other protocols", way, [], compared))
    for task in tasks:
        readings += [_disagreement(run, task, pairs) for run, pairs in zip(runs, agreed, strict=True) if len(run.ways(task)) > 1]
    return Section("Protocols", paragraphs, terms, pictures=pictures, grids=grids, readings=readings)


def _ordered(names: Iterable[str]) -> list[str]:
    """Protocols in the order in which they are defined."""
    place = {name: i for i, name in enumerate(MEANING)}
    return sorted(dict.fromkeys(names), key=lambda name: place.get(name, len(place)))


def _matrix(title: str, used: Sequence[str], shares: dict[tuple[str, str], float]) -> Grid:
    def cell(first: str, second: str) -> Cell:
        share = 100.0 if first == second else shares.get((first, second), shares.get((second, first)))
        return NOTHING if share is None or first == second else Cell(percent(share), bar=share / 100)

    known = [way for way in used if any(way in pair for pair in shares)]
    return Grid(title, ("agreement", *known), [[Cell(first), *(cell(first, second) for second in known)] for first in known])


def _against(pair: Agreement) -> list[Cell]:
    return [
        Cell(pair.task),
        Cell(f"{pair.first} → {pair.second}"),
        Cell(str(pair.num_items)),
        *map(Cell, (percent(pair.chance), percent(pair.majority), percent(pair.before), percent(pair.after))),
        *_difference(pair),
        Cell(percent(pair.agreement), bar=pair.agreement / 100),
        *_odds(pair),
    ]


def _disagreement(run: Run, task: str, pairs: Sequence[Agreement]) -> Reading:
    used = _ordered(run.ways(task))
    mine = {(pair.first, pair.second): pair.agreement for pair in pairs if pair.task == task}
    odd = differing(run, task)
    rows = []
    for key, records in odd[:NUM_READINGS]:
        record = next(iter(records.values()))
        answers = [_answer(records.get(way)) for way in used]
        rows.append([Cell(_name(key, run, task)), Cell(_shorten(gold_of(record), MAX_ANSWER)), *answers])
    total = len({key for way in used for key in run.jobs[task, way]})
    grids = [_matrix(f"Agreement on {task}: {run.label}", used, mine)]
    if rows:
        shown = f"the first {len(rows)} of {len(odd)}" if len(odd) > len(rows) else f"{len(odd)}"
        grids.append(Grid(f"Items on which the protocols differ ({shown}); ✓ is right", ("item", "right answer", *used), rows, words=True))
    return Reading("Agreement, task by task", f"{task}, {run.label}: the protocols differ on {len(odd)} of {total} items", [], grids)


def templates(runs: Sequence[Run]) -> Section:
    """How much a value depends on the template that asked."""
    from mtllama.evaluate.figures import Strip, draw_strips

    several = [job for job in jobs_of([run.results for run in runs]) if any(len(_templates(run.result(job))) > 1 for run in runs)]
    chosen = primary(several)
    if not chosen:
        return Section("Templates", [])
    panels, rows, readings, said = [], [], [], []
    for role, group in by_role(chosen):
        strips = []
        for job in group:
            there = [run.result(job) for run in runs]
            spreads = [result["over_templates"] if result else None for result in there]
            first: dict[str, Any] = next(filter(None, there))
            strips.append(
                Strip(
                    job[0],
                    tuple(tuple(each["value"] for each in _templates(result).values()) if result else None for result in there),
                    tuple((spread["q1"], spread["median"], spread["q3"]) if spread else None for spread in spreads),
                    first["chance"],
                )
            )
            for run, result, spread in zip(runs, there, spreads, strict=True):
                if result and spread:
                    keys = ("mean", "median", "q1", "q3", "min", "max", "spread")
                    mean, *others = (Cell(percent(spread[key])) for key in keys)
                    guesses = (Cell(percent(result["chance"])), Cell(percent(result["majority"])))
                    mean = Cell(mean.text, (_interval(result["ci95"]),))
                    rows.append([Cell(job[0]), Cell(run.label), Cell(str(len(_templates(result)))), *guesses, mean, *others])
                    said.append(f"{job[0]}, {run.label}: {percent(spread['min'])} to {percent(spread['max'])}")
            names = dict.fromkeys(name for result in there for name in _templates(result))
            lines = [[Cell(name), *(value_cell(_templates(result).get(name)) for result in there)] for name in names]
            grid = Grid(f"{job[0]} ({job[1]}), template by template", ("template", *(run.label for run in runs)), lines)
            readings.append(Reading("Template by template", f"{job[0]}: {len(names)} templates", [], [grid]))
        panels.append((GROUPS[role], strips))
    drawing = draw_strips(panels, _names(runs), "percent; a dot is a template")
    caption = "Each dot is one template; the thick line is the middle half of them, the tick their median."
    head = (
        "task",
        "run",
        "templates",
        "chance",
        "majority",
        "mean",
        "median",
        "first quartile",
        "third quartile",
        "least",
        "most",
        "spread",
    )
    return Section(
        "Templates",
        [
            "The same items, asked through several templates. The interval is of the mean over the templates, with items drawn: the "
            "answers of one item through several templates are not independent. The spread is the most less the least."
        ],
        pictures=[Picture("templates", drawing.png, drawing.svg, f"Dots in percent. {'; '.join(said)}.", caption)],
        grids=[Grid("Spread over templates", head, rows)],
        readings=readings,
    )


def _templates(result: dict[str, Any] | None) -> dict[str, dict[str, Any]]:
    return result["templates"] if result else {}


def answers(runs: Sequence[Run]) -> Section:
    """Which answers are given, whatever is asked, and what is known behind them."""
    labelled, placed = [], []
    for task in _tasks(runs):
        for run in runs:
            found = bias(run.jobs.get((task, RANK), {}).values())
            if found is None:
                continue
            right, given = (
                Cell(" / ".join(percent(share) for share in shares), (" / ".join(found.labels),)) for shares in (found.gold, found.given)
            )
            row = [Cell(task), Cell(run.label), right, given]
            if found.shortest is None:
                values = (found.accuracy, found.balanced, found.calibrated, found.separation)
                labelled.append([*row, *(Cell(percent(value)) for value in values)])
            else:
                placed.append([*row, *(Cell(percent(value)) for value in (*found.shortest, found.accuracy, found.calibrated))])
    head = ("task", "run", "right", "answered")
    grids = [
        Grid("Labels", (*head, "accuracy", "balanced accuracy", "calibrated", "separation"), labelled),
        Grid("Places and lengths", (*head, "shortest is right", "shortest is answered", "accuracy", "calibrated"), placed),
    ]
    return Section(
        "Answers given",
        [
            "How often each answer is right and how often it is given, by ranking with the sum. A model that gives one answer nearly everywhere gets what the "
            "majority column says, whether it knows the task or not. Balanced accuracy is the mean over the labels of how many of their items are answered "
            "with them. Calibrated is the accuracy after what the model gives each label on average over the set is divided out (batch calibration, "
            "Zhou et al. 2024): it sees all items at once, so it shows how much of a result is a leaning to one label, and is no protocol. Separation, for "
            "two labels, is how often an item of the second label leans to it more than an item of the first does: 50 is no knowledge at all.",
        ],
        grids=[grid for grid in grids if grid.rows],
    )


def contamination(runs: Sequence[Run]) -> Section:
    """The values with and without the items that occur in the training data."""
    grids, recipes = [], []
    for run in runs:
        rows = []
        for task, way in primary(list(run.jobs)):
            result: dict[str, Any] = run.results["tasks"][task][way]
            parts = result.get("contamination")
            if parts is None:
                continue
            found, clean = parts["found"], parts["clean"]
            change = NOTHING if clean is None else Cell(points(clean["value"] - result["value"]))
            count = found["n"] if found else 0
            share = Cell(str(count), (f"{100 * count / result['n']:.1f}%",), bar=count / result["n"])
            guesses = (Cell(percent(result["chance"])), Cell(percent(result["majority"])))
            rows.append(
                [Cell(task), Cell(way), Cell(str(result["n"])), share, *guesses, *map(value_cell_of, (result, clean, found)), change]
            )
        if rows:
            head = ("task", "by", "n", "found", "chance", "majority", "all items", "without them", "only them", "change without them")
            grids.append(Grid(f"With and without what was found: {run.label}", head, rows))
            recipes.append(f"{run.label}: {run.results['contamination']['recipe']}")
    text = (
        "Items whose text occurs in the training data of a recipe, and the values with and without them. A model that was not "
        f"trained by that recipe is not touched by what is found. Recipes: {'; '.join(recipes)}."
    )
    return Section("Items found in the training data", [text], grids=grids)


def value_cell_of(part: dict[str, Any] | None) -> Cell:
    """A value and its interval, of results that hold nothing else."""
    return NOTHING if part is None else Cell(percent(part["value"]), (_interval(part["ci95"]),))


def published(runs: Sequence[Run]) -> list[Section]:
    """Other models' published numbers beside ours, and whether they can be counts of the items they are said to be of."""
    sections = []
    jobs = jobs_of([run.results for run in runs])
    for source in yaml.safe_load(resources.files("mtllama.evaluate").joinpath("published.yaml").read_text(encoding="utf-8")):
        rows = []
        scores: dict[str, list[list[float]]] = source["tasks"]
        for _, group in by_role(jobs):
            chosen = primary(group)
            for job in (job for job in group if job[0] in scores and (job in chosen or job[1] in source["ours"])):
                theirs = [Cell(f"{score[0]:.1f}", tuple(f"EM {em:.1f}" for em in score[1:])) for score in scores[job[0]]]
                result: dict[str, Any] = next(filter(None, (run.result(job) for run in runs)))
                guesses = (Cell(percent(result["chance"])), Cell(percent(result["majority"])))
                rows.append([Cell(job[0]), *theirs, *guesses, *(value_cell(run.result(job)) for run in runs), Cell(job[1])])
        if not rows:
            continue
        shown = list(dict.fromkeys(row[0].text for row in rows))
        heads = (*(f"{model} (published)" for model in source["models"]), "chance", "majority", *(f"ours: {run.label}" for run in runs))
        paragraphs = [f"{source['about']} Source: {source['source']} ({source['url']}). Accuracy, or F1 with exact match (EM), in percent."]
        paragraphs += [f"About {find_tasks([task])[0].title}: {text}" for task, text in source["caveats"].items() if task in shown]
        counted = {task: [score[0] for score in scores[task]] for task in shown if source["counts"] and len(scores[task][0]) == 1}
        paragraphs += [odd for task, figures in counted.items() for odd in _unreachable(task, figures)]
        readings = []
        if counted:
            grid = Grid(
                "Published accuracies as counts of right answers",
                ("task", "split", "items", "remark"),
                [row for task, figures in counted.items() for row in _counts(task, figures)],
                words=True,
            )
            readings.append(
                Reading("Which counts the published accuracies can be", "Every figure against the size of every split", [], [grid])
            )
        warnings = []
        if sampled(runs):
            warnings = ["Not comparable: our columns are on the embedded sampler data, the published ones on the real data sets."]
        grids = [Grid("Published and ours", ("task", *heads, "our protocol"), rows)]
        sections.append(Section(source["title"], paragraphs, warnings=warnings, grids=grids, readings=readings))
    return sections


def _splits(task: str) -> dict[str, int]:
    """The splits that a published accuracy may be of, and their sizes."""
    return {split: n for split, n in find_tasks([task])[0].splits.items() if not split.startswith("train")}


def _counts(task: str, figures: Sequence[float]) -> list[list[Cell]]:
    return [
        [Cell(task), Cell(split), Cell(f"{n:,}"), Cell("; ".join(remark(figure, n) for figure in figures))]
        for split, n in _splits(task).items()
    ]


def _unreachable(task: str, figures: Sequence[float]) -> list[str]:
    """A sentence for every figure that cannot be a count of some split."""
    found = []
    for figure in figures:
        odd = {split: n for split, n in _splits(task).items() if not stats.reachable(figure, n)}
        fits = [f"the {n:,} items of {split}" for split, n in _splits(task).items() if split not in odd]
        if odd:
            said = " and ".join(f"{remark(figure, n)}, so it is not of {split}" for split, n in odd.items())
            found.append(f"About {find_tasks([task])[0].title}: {said}. It fits {' and '.join(fits) or 'no split'}.")
    return found


def remark(figure: float, n: int, digits: int = 1) -> str:
    """Whether a published percentage can be a count among `n` items, in words."""
    counts = stats.reachable(figure, n, digits)
    if counts:
        which = f"{counts[0]:,}" + (f" to {counts[-1]:,}" if len(counts) > 1 else "")
        return f"{figure:.{digits}f} is {which} of {n:,}"
    near = [f"{k:,} right are {100 * k / n:.{digits}f}" for k in (counts.start - 1, counts.start) if 0 <= k <= n]
    return f"{figure:.{digits}f} is no k/{n:,} ({', '.join(near)})"


def training(runs: Sequence[Run]) -> Section:
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
        names = sorted({family for line in lines for family in line["families"]})
        series, rows = [], []
        for name in ("all", *names):
            steps = [(line["step"], line["families"].get(name) if name != "all" else line) for line in lines]
            there = [(step, part["loss"], part["targets"]) for step, part in steps if part]
            targets = [count for _, _, count in there]
            if name == "all":  # its count runs on over the steps
                targets = [count - before for before, count in zip([0, *targets], targets, strict=False)]
            # A step that found nothing to train on, or whose loss was no number, has none to draw.
            known = [(step, loss, count) for (step, loss, _), count in zip(there, targets, strict=True) if loss is not None]
            if not known:
                continue
            targets = [count for _, _, count in known]
            smoothed = smooth([loss for _, loss, _ in known], targets, window)
            series.append((name, [step for step, _, _ in known], smoothed))
            rows.append([Cell(name), Cell(str(sum(targets))), Cell(f"{smoothed[0]:.3f}"), Cell(f"{smoothed[-1]:.3f}")])
        if not series:
            continue
        said = "; ".join(f"{row[0].text}: {row[2].text} to {row[3].text}" for row in rows)
        about = f"{len(lines)} steps, smoothed by an exponential mean weighted by target tokens, window {window}"
        drawing = draw_losses(series)
        caption = f"Loss of {run.label} ({run.name}) over {about}."
        name = f"loss-{run.label.replace(' ', '-')}"
        section.pictures.append(Picture(name, drawing.png, drawing.svg, f"Loss by step. {said}.", caption))
        section.grids.append(Grid(f"Loss of {run.label} by family", ("family", "target tokens", "first", "last"), rows))
    return section


def readings(runs: Sequence[Run]) -> Section:
    """Some items of each task, chosen by rule: the first ones of each kind of outcome."""
    kinds = ("right", "wrong") if len(runs) == 1 else (f"{runs[1].label} better", "base better", "both right", "both wrong")
    shown = []
    for _, group in by_role(list(runs[0].jobs)):
        for job in primary(group):
            chosen: dict[str, list[Key]] = {kind: [] for kind in kinds}
            metric = runs[0].results["tasks"][job[0]][job[1]]["metric"]
            for key in runs[0].jobs[job]:
                values = [value(run.jobs[job][key], metric) for run in runs[:2] if key in run.jobs.get(job, {})]
                if len(values) == len(runs[:2]):
                    chosen[_kind(values, kinds)].append(key)
            turns = [(turn, kind, key) for kind in kinds for turn, key in enumerate(chosen[kind][:NUM_READINGS])]
            first = sorted(turns, key=lambda each: each[0])[:NUM_READINGS]
            shown += [_reading(runs, job, key, kind) for kind in kinds for _, k, key in first if k == kind]
    text = (
        f"Up to {NUM_READINGS} items a task, chosen by rule and not by merit: the first of each kind of outcome ({', '.join(kinds)}), then "
        "the second, and so on. ✓ stands before a right answer. A score is what the choices were ranked by; the percentage and the bar "
        "under it are the choice's share when the scores are turned into probabilities among the choices."
    )
    return Section("Items to read", [text], readings=shown)


def _kind(values: Sequence[float], kinds: Sequence[str]) -> str:
    right = values[0] >= 0.5
    if len(values) == 1 or values[0] == values[1]:
        return kinds[-2] if right else kinds[-1]
    return kinds[0] if values[1] > values[0] else kinds[1]


def _reading(runs: Sequence[Run], job: Job, key: Key, kind: str) -> Reading:
    records = [run.jobs.get(job, {}).get(key) for run in runs]
    prompts: dict[str, list[str]] = {}
    answers = []
    used = _ordered(way for run in runs for way in run.ways(job[0]))
    for run, record in zip(runs, records, strict=True):
        if record is not None:
            prompts.setdefault(_shorten(record["prompt"], MAX_SHOWN), []).append(run.label)
        answers.append([Cell(run.label), *(_answer(run.jobs.get((job[0], way), {}).get(key)) for way in used)])
    first = runs[0].jobs[job][key]
    texts = [("Prompt" if len(prompts) == 1 else f"Prompt of {', '.join(labels)}", prompt) for prompt, labels in prompts.items()]
    grids = [Grid("Answers", ("run", *used), answers, words=True)]
    if first["scores"]:
        columns = [_scores(record) for record in records]
        rows = [
            [Cell(choice + (" (right)" if i == first["gold_index"] else "")), *(column[i] if column else NOTHING for column in columns)]
            for i, choice in enumerate(first["choices"])
        ]
        grids.append(Grid(f"Scores ({job[1]})", ("choice", *(run.label for run in runs)), rows))
    return Reading(job[0], f"{_name(key, runs[0], job[0])}: {kind}", [*texts, ("Right answer", gold_of(first))], grids)


def _scores(record: Record | None) -> list[Cell]:
    """Each choice's score, with its share among the choices."""
    if record is None or not record["scores"]:
        return []
    scores = record["scores"]
    weights = [math.exp(score - max(scores)) for score in scores]
    shares = [weight / sum(weights) for weight in weights]
    return [
        Cell(f"{score:.2f}".replace("-", "−"), (f"{100 * share:.0f}%",), strong=record["predicted_index"] == i, bar=share)
        for i, (score, share) in enumerate(zip(scores, shares, strict=True))
    ]


def _answer(record: Record | None) -> Cell:
    if record is None:
        return NOTHING
    text = _shorten(record["prediction"], MAX_ANSWER) or "(nothing)"
    return Cell(f"✓ {text}" if record["correct"] else text, strong=bool(record["correct"]))


def gold_of(record: Record) -> str:
    """The right answer, or all that are accepted."""
    gold = record.get("references") or record["gold"]
    return gold if isinstance(gold, str) else " / ".join(dict.fromkeys(gold))


def _name(key: Key, run: Run, task: str) -> str:
    """An item in words; its template only where there are several."""
    several = any(len(_templates(run.result((task, way)))) > 1 for way in run.ways(task))
    return f"Item {key[0]}" + (f", template {key[1]}" if several else "") + (f", time {key[2] + 1}" if key[2] else "")


def _shorten(text: str, length: int) -> str:
    half = length // 2
    return text if len(text) <= length else f"{text[:half]}\n[{len(text) - 2 * half} characters left out]\n{text[-half:]}"


def provenance(runs: Sequence[Run]) -> Section:
    """What was measured, of what, with what."""
    facts: dict[str, list[str]] = {}
    own = ("schema", "model", "tasks", "missing", "versions", "contamination", "data_sha256")
    settings = list(dict.fromkeys(key for run in runs for key in run.results if key not in own))
    for run in runs:
        model, recipe = run.results["model"], run.results["model"].get("recipe")
        described = {
            "model": model["name"],
            "run folder": str(run.folder),
            "parameters": f"{model['parameters']:,}" if model.get("parameters") else "",
            "weights, SHA-256": str(model.get("weights_sha256") or "")[:16],
            "delta": str(model.get("delta") or "none"),
            "recipe": "none" if not recipe else ", ".join(f"{key} {value}" for key, value in recipe.get("train", recipe).items()),
            **{key.replace("_", " "): _said(run.results.get(key)) for key in settings},
            "versions": ", ".join(f"{package} {version}" for package, version in run.results["versions"].items()),
            "missing tasks": "; ".join(run.results["missing"].values()) or "none",
        }
        for key, text in described.items():
            facts.setdefault(key, []).append(text)
    counts = []
    for job in jobs_of([run.results for run in runs]):
        there = [run.result(job) for run in runs]
        columns = [" / ".join(dict.fromkeys(f"{result['split']} {result['note']}".strip() for result in there if result))]
        columns += [" / ".join(dict.fromkeys(result["data"] for result in there if result))]
        columns += [
            " / ".join("–" if result is None else str(result.get(key, "–")) for result in there)
            for key in ("n", "skipped", "cut", "unparsed", "at_limit")
        ]
        counts.append([Cell(" ".join(job)), *map(Cell, columns)])
    order = "" if len(runs) == 1 else f" ({' / '.join(run.label for run in runs)})"
    text = (
        f"Counts{order}: answers; rows to which a template does not apply; prompts that were cut to fit; answers that are none of the "
        "choices, or empty; generated answers that ended at the limit of their tokens."
    )
    head = ("task, protocol", "split", "file", "n", "skipped", "cut", "unparsed", "at the limit")
    table = [[Cell(key), *map(Cell, values)] for key, values in facts.items()]
    return Section(
        "Provenance",
        [text],
        grids=[Grid("Runs", ("setting", *(run.label for run in runs)), table, words=True), Grid("Data and counts", head, counts)],
    )


def _said(setting: Any) -> str:
    if setting is None:
        return "none"
    if isinstance(setting, dict):
        return ", ".join(f"{key} {_said(part)}" for key, part in setting.items()) or "none"
    return setting if isinstance(setting, str) else ", ".join(map(_said, setting)) if isinstance(setting, list) else json.dumps(setting)


def sampled(runs: Sequence[Run]) -> bool:
    """Whether a run is on the embedded data."""
    return any(run.results["suite"] == SAMPLER for run in runs)


def _interval(ends: Sequence[float], write: Callable[[float], str] = percent) -> str:
    return f"[{write(ends[0])}, {write(ends[1])}]"


def _names(runs: Sequence[Run]) -> list[str]:
    return [f"{run.label}: {run.name}" for run in runs]


def _tasks(runs: Sequence[Run]) -> list[str]:
    jobs = jobs_of([run.results for run in runs])
    return list(dict.fromkeys(task for _, group in by_role(jobs) for task, _ in group))


def _difference(row: Difference | Mean | Agreement | SetDifference) -> list[Cell]:
    """The difference, bold where it is significant, and its p; for one of several tasks, by Holm's p beside it."""
    holm = None if isinstance(row, Mean) else row.p_holm
    sure = (row.p if holm is None else holm) < LEVEL
    asides = () if holm is None else (f"Holm {p_text(holm)}",)
    return [Cell(points(row.difference), (_interval(row.ci95, points),), strong=sure), Cell(p_text(row.p), asides)]


def _odds(row: Difference | Agreement) -> list[Cell]:
    return [Cell(f"{row.better} / {row.worse}"), NOTHING if row.detectable is None else Cell(f"±{row.detectable:.1f}")]


def _task_grid(title: str, jobs: Sequence[Job], runs: Sequence[Run], comparisons: Sequence[Comparison]) -> Grid:
    head = ["task", "by", "n", "chance", "majority", *(run.label for run in runs)]
    for run in runs[1:]:
        mark = f", {run.label}" if len(runs) > 2 else ""
        head += [f"{word}{mark}" for word in ("difference", "p", "better/worse", "detectable")]
    rows = []
    for job in jobs:
        there = [run.result(job) for run in runs]
        first: dict[str, Any] = next(filter(None, there))
        row = [Cell(job[0]), Cell(job[1], (first["metric"],)), Cell(number_of(there))]
        row += [Cell(percent(first["chance"])), Cell(percent(first["majority"])), *map(value_cell, there)]
        for comparison in comparisons:
            found = next((each for each in comparison.tasks if (each.task, each.protocol) == job), None)
            row += [*_difference(found), *_odds(found)] if found else [NOTHING] * 4
        rows.append(row)
    return Grid(title, tuple(head), rows)


def _set_grids(jobs: Sequence[Job], runs: Sequence[Run], comparisons: Sequence[Comparison]) -> list[Grid]:
    """The metrics of whole sets of these jobs, compared: a table for each run that base is compared with, where there are any."""
    grids = []
    for run, comparison in zip(runs[1:], comparisons, strict=True):
        rows = [
            [
                *map(Cell, (row.task, row.protocol, row.metric, str(row.num_items), percent(row.base), percent(row.tuned))),
                *_difference(row),
            ]
            for row in comparison.sets
            if (row.task, row.protocol) in jobs
        ]
        if rows:
            title = "Metrics of whole sets" + (f", {run.label}" if len(runs) > 2 else "")
            grids.append(Grid(title, ("task", "by", "metric", "items", runs[0].label, run.label, "difference", "p"), rows))
    return grids


def _bars(runs: Sequence[Run], jobs: Sequence[Job], name: str, caption: str) -> Picture:
    from mtllama.evaluate.figures import Bars, draw_bars  # matplotlib takes a second to load, and a table needs none

    panels, said = [], []
    for role, group in by_role(jobs):
        rows = []
        for job in group:
            there = [run.result(job) for run in runs]
            first: dict[str, Any] = next(filter(None, there))
            ends = tuple((result["value"], *result["ci95"]) if result else None for result in there)
            rows.append(Bars(job[0], ends, first["chance"], first["majority"]))
            guess = "" if first["chance"] is None else f" (chance {first['chance']:.1f})"
            values = ", ".join(f"{run.label} {value_cell(result).text}" for run, result in zip(runs, there, strict=True))
            said.append(f"{job[0]}: {values}{guess}")
        panels.append((GROUPS[role], rows))
    drawing = draw_bars(panels, _names(runs), "percent, with 95% intervals")
    return Picture(name, drawing.png, drawing.svg, f"Bars in percent. {'; '.join(said)}.", caption)
