"""Two runs, or two protocols of one run, over the same items, compared item by item."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from mtllama.errors import UserError
from mtllama.evaluate import metrics, protocols, stats
from mtllama.evaluate.journal import RECORDS
from mtllama.evaluate.protocols import Record
from mtllama.evaluate.runner import guesses, read_run
from mtllama.evaluate.sets import SetDifference, set_difference, set_metrics
from mtllama.tasks.catalog import find_tasks

FIELDS = ("task", "template", "item_id", "row", "kind", "metrics", "prompt", "cut", "choices", "gold", "gold_index", "references")
"""What every record has, whatever was asked."""
ROLES = ("unseen data set", "unseen task", "train")
"""The order in which tasks are shown."""

Key = tuple[str, str, int]
"""Item id, template, and how often that pair came before: an item asked through several templates differs in the middle only."""
Job = tuple[str, str]
"""Task and protocol."""
Values = dict[tuple[str, int], dict[str, float]]
"""By item, then by template."""


@dataclass(frozen=True)
class Difference:
    """One task under one protocol, item by item: tuned minus base, in points of percent.

    An item that several templates ask about is one item, and its values are means over them.
    """

    role: str
    task: str
    protocol: str
    metric: str
    num_items: int
    chance: float | None
    majority: float | None
    base: float
    tuned: float
    difference: float
    ci95: tuple[float, float]
    better: int
    """Items on which tuned has the larger value."""
    worse: int
    detectable: float | None
    """The least true difference that a test of this many items, as much at odds as these, finds four times out of five."""
    p: float
    p_holm: float
    """Adjusted over the tasks by their primary protocols, if this is one; else over the tasks of the same protocol."""


@dataclass(frozen=True)
class Mean:
    """The mean over the tasks of a role, each under its primary protocol."""

    role: str
    tasks: tuple[str, ...]
    protocols: tuple[str, ...]
    num_items: int
    base: float
    tuned: float
    difference: float
    ci95: tuple[float, float]
    p: float


@dataclass(frozen=True)
class Comparison:
    """Two runs over the same items."""

    base: str
    tuned: str
    tasks: tuple[Difference, ...]
    sets: tuple[SetDifference, ...]
    """The metrics of whole sets, of every task and protocol that has one."""
    means: tuple[Mean, ...]
    unmatched: tuple[str, ...]
    """Tasks (and protocols) that only one of the runs has."""


@dataclass(frozen=True)
class Agreement:
    """Two protocols of one run over one task: how often they choose the same, and which is right more often."""

    task: str
    first: str
    second: str
    num_items: int
    chance: float | None
    majority: float | None
    agreement: float
    """Percent of the answers in which both choose the same."""
    before: float
    after: float
    difference: float
    """Second minus first, in points of percent."""
    ci95: tuple[float, float]
    better: int
    worse: int
    detectable: float | None
    p: float
    p_holm: float
    """Adjusted over the tasks that have both protocols."""


Row = TypeVar("Row", Difference, Agreement, SetDifference)


@dataclass(frozen=True)
class Run:
    """One evaluation, its records at hand by task, protocol and item."""

    label: str
    folder: Path
    results: dict[str, Any]
    jobs: dict[Job, dict[Key, Record]]

    @property
    def name(self) -> str:
        """The model's name."""
        return str(self.results["model"]["name"])

    @property
    def tasks(self) -> list[str]:
        """The tasks that were measured."""
        return list(dict.fromkeys(task for task, _ in self.jobs))

    def result(self, job: Job) -> dict[str, Any] | None:
        """The numbers of one task under one protocol."""
        found: dict[str, Any] | None = self.results["tasks"].get(job[0], {}).get(job[1])
        return found

    def ways(self, task: str) -> list[str]:
        """The protocols that judged a task."""
        return [protocol for name, protocol in self.jobs if name == task]

    def answers(self, job: Job) -> dict[str, dict[tuple[str, int], metrics.Answer]]:
        """What each item was answered, by template."""
        found: dict[str, dict[tuple[str, int], metrics.Answer]] = {}
        for (item, template, turn), record in self.jobs[job].items():
            found.setdefault(template, {})[item, turn] = protocols.answer(record)
        return found

    def values(self, job: Job, keys: Iterable[Key] | None = None) -> Values:
        """What each item adds to the task's metric, by template; of some `keys`, or of all."""
        metric = self.results["tasks"][job[0]][job[1]]["metric"]
        items: Values = {}
        for key in self.jobs[job] if keys is None else keys:
            items.setdefault((key[0], key[2]), {})[key[1]] = protocols.value(self.jobs[job][key], metric)
        return items


def read(folder: Path, label: str) -> Run:
    """A run of an evaluation folder, its records checked against its results."""
    results, records = read_run(folder)
    run = Run(label, folder, results, by_job(results, records, folder / RECORDS))
    for task, protocol in jobs_of([results]):
        expected, found = results["tasks"][task][protocol]["n"], len(run.jobs.get((task, protocol), ()))
        if expected != found:
            raise UserError(f"{folder / RECORDS} has {found} records of {task} ({protocol}), its results {expected}: evaluate again")
    return run


def by_job(results: Mapping[str, Any], records: Iterable[Record], source: Path = Path(RECORDS)) -> dict[Job, dict[Key, Record]]:
    """Records by task and protocol, as that protocol judges them, then by item; the protocols are those of the results."""
    jobs: dict[Job, dict[Key, Record]] = {}
    for number, record in enumerate(records, start=1):
        try:
            every = _judged(results, record)
        except UserError as error:
            raise UserError(f"{source}, line {number}: {error}") from None
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{source}, line {number}: the record is damaged ({type(error).__name__}: {error}); evaluate again") from error
        for judged in every:
            group = jobs.setdefault((judged["task"], judged["protocol"]), {})
            turn = 0
            while (key := (judged["item_id"], judged["template"], turn)) in group:
                turn += 1
            group[key] = judged
    return jobs


def _judged(results: Mapping[str, Any], record: Record) -> Iterable[Record]:
    """A record as each protocol of the results judges it."""
    lacking = [name for name in FIELDS if name not in record]
    if lacking:
        raise UserError(f"the record has no {lacking[0]!r}; evaluate again")
    measured = results["tasks"].get(record["task"], {})
    return [protocols.view(record, protocol) for protocol in protocols.of_record(record) if protocol in measured]


def compare(base: Run, tuned: Run, *, advance: Callable[..., None] = lambda num=1, note="": None) -> Comparison:
    """Tuned minus base over the same items (item id and template); runs over different items are refused."""
    jobs = [job for job in base.jobs if job in tuned.jobs]
    if not jobs:
        raise UserError("the runs have no task and protocol in common; evaluate both with the same suite, tasks and protocols")
    pairs: dict[Job, _Pairs] = {}
    for job in jobs:
        _require_same_items(job, base.jobs[job], tuned.jobs[job])
        pairs[job] = _Pairs.of(base.values(job), tuned.values(job))
        advance(note=job[0])
    tasks, whole, means = [], [], []
    for role, group in by_role(jobs):
        for job in group:
            result = base.results["tasks"][job[0]][job[1]]
            tested = pairs[job].tested()
            before, after = tested.pop("before"), tested.pop("after")
            known = {key: result[key] for key in ("metric", "chance", "majority")}
            tasks.append(Difference(role=role, task=job[0], protocol=job[1], base=before, tuned=after, p_holm=1.0, **known, **tested))
            names = next(iter(base.jobs[job].values()))["metrics"]
            answers = base.answers(job), tuned.answers(job)
            whole += [set_difference(role, *job, name, *answers) for name in set_metrics(names, answers[0])]
        chosen = primary(group)
        every = [pairs[job].differences for job in chosen]
        before = 100 * float(np.mean([stats.item_values(pairs[job].before).mean() for job in chosen]))
        after = 100 * float(np.mean([stats.item_values(pairs[job].after).mean() for job in chosen]))
        names, ways = zip(*chosen, strict=True)
        ci95, p = _percent(stats.mean_interval([pairs[job].drawn for job in chosen])), stats.paired_p(every)
        means.append(Mean(role, names, ways, sum(map(len, every)), before, after, after - before, ci95, p))
    unmatched = tuple(
        f"{task} ({protocol})" for task, protocol in dict.fromkeys((*base.jobs, *tuned.jobs)) if (task, protocol) not in pairs
    )
    headline = set(primary(jobs_of([base.results, tuned.results])))

    def shown_in(row: Difference | SetDifference) -> str:
        return "" if (row.task, row.protocol) in headline else row.protocol

    return Comparison(
        base.name,
        tuned.name,
        tuple(_adjusted(tasks, shown_in)),
        tuple(_adjusted(whole, shown_in)),
        tuple(means),
        unmatched,
    )


def agreements(run: Run, *, advance: Callable[..., None] = lambda num=1, note="": None) -> list[Agreement]:
    """Every two protocols of a task, over the items that both judged."""
    found = []
    for task in run.tasks:
        advance(note=f"protocols of {run.label}, {task}")
        for first, second in itertools.combinations(run.ways(task), 2):
            left, right = run.jobs[task, first], run.jobs[task, second]
            both = [key for key in left if key in right]
            if not both:
                continue
            same = sum(_choice(left[key]) == _choice(right[key]) for key in both)
            tested = _Pairs.of(run.values((task, first), both), run.values((task, second), both)).tested()
            known: dict[str, Any] = guesses([left[key] for key in both])
            found.append(Agreement(task=task, first=first, second=second, agreement=100 * same / len(both), p_holm=1.0, **known, **tested))
    return _adjusted(found, lambda row: (row.first, row.second))


def differing(run: Run, task: str) -> list[tuple[Key, dict[str, Record]]]:
    """The items of a task on which its protocols do not all choose the same, with every protocol's record."""
    ways = run.ways(task)
    keys = dict.fromkeys(key for way in ways for key in run.jobs[task, way])
    records = ((key, {way: run.jobs[task, way][key] for way in ways if key in run.jobs[task, way]}) for key in keys)
    return [(key, there) for key, there in records if len({_choice(record) for record in there.values()}) > 1]


def _choice(record: Record) -> str | None:
    """What was chosen, so that protocols can be asked whether they agree: a choice's text, or the normalised answer."""
    if record["choices"]:
        index = record["predicted_index"]
        return None if index is None else str(record["choices"][index])
    return metrics.normalize(record["prediction"])


@dataclass(frozen=True)
class _Pairs:
    """(items, templates) before and after, in one order of both."""

    before: np.ndarray
    after: np.ndarray

    @classmethod
    def of(cls, left: Values, right: Values) -> "_Pairs":
        ordered = [{template: right[item][template] for template in values} for item, values in left.items()]
        return cls(stats.as_table(left.values()), stats.as_table(ordered))

    @property
    def differences(self) -> list[float]:
        """What each item adds to the difference."""
        return list((stats.item_values(self.after) - stats.item_values(self.before)).tolist())

    @property
    def drawn(self) -> list[float] | np.ndarray:
        """What a bootstrap draws: where templates ask different items, items with all that they were asked."""
        change: np.ndarray = self.after - self.before
        return change if np.isnan(change).any() else self.differences

    def tested(self) -> dict[str, Any]:
        """The fields that a difference and an agreement share, in percent."""
        differences, drawn = self.differences, self.drawn
        effect = stats.detectable_effect(stats.item_deviations(drawn).tolist() if isinstance(drawn, np.ndarray) else drawn)
        before, after = (100 * float(stats.item_values(side).mean()) for side in (self.before, self.after))
        return {
            "num_items": len(differences),
            "before": before,
            "after": after,
            "difference": after - before,
            "ci95": _percent(stats.mean_interval([drawn])),
            "better": sum(each > 0 for each in differences),
            "worse": sum(each < 0 for each in differences),
            "detectable": None if effect is None else 100 * effect,
            "p": stats.paired_p([differences]),
        }


def _percent(ends: tuple[float, float]) -> tuple[float, float]:
    return 100 * ends[0], 100 * ends[1]


def _adjusted(rows: Sequence[Row], family: Callable[[Row], Any]) -> list[Row]:
    """Rows with Holm's p over those of the same family."""
    adjusted = list(rows)
    for name in dict.fromkeys(map(family, rows)):
        places = [i for i, row in enumerate(rows) if family(row) == name]
        for i, p in zip(places, stats.holm([rows[i].p for i in places]), strict=True):
            adjusted[i] = replace(rows[i], p_holm=p)
    return adjusted


def _require_same_items(job: Job, left: Mapping[Key, Record], right: Mapping[Key, Record]) -> None:
    advice = "evaluate both with the same data, split, templates, limit and seed"
    odd = sorted(left.keys() ^ right.keys())
    if odd:
        raise UserError(
            f"{job[0]} ({job[1]}): the runs hold different items ({len(left)} and {len(right)}; {odd[0][0]} is in one only); {advice}"
        )
    for key, record in left.items():
        if (record["gold"], record["choices"]) != (right[key]["gold"], right[key]["choices"]):
            raise UserError(f"{job[0]} ({job[1]}): item {key[0]} has another answer or other choices in each run; {advice}")


def jobs_of(runs: Iterable[dict[str, Any]]) -> list[Job]:
    """Every task and protocol that any of the results has, in their order."""
    return list(dict.fromkeys((task, protocol) for run in runs for task, by_protocol in run["tasks"].items() for protocol in by_protocol))


def by_role(jobs: Sequence[Job]) -> list[tuple[str, list[Job]]]:
    """The jobs of each role that has any; an unknown task is an error."""
    roles = {task: find_tasks([task])[0].role for task, _ in jobs}
    groups = [(role, [job for job in jobs if roles[job[0]] == role]) for role in ROLES]
    return [(role, group) for role, group in groups if group]


def primary(jobs: Sequence[Job]) -> list[Job]:
    """One protocol a task: ranking by sum where it was measured, else generation, else the first there is."""
    ways: dict[str, list[str]] = {}
    for task, protocol in jobs:
        ways.setdefault(task, []).append(protocol)
    return [(task, next((way for way in ("rank", "generate") if way in there), there[0])) for task, there in ways.items()]
