"""Two runs over the same items, compared item by item."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mtllama.errors import UserError
from mtllama.evaluate import protocols, stats
from mtllama.evaluate.protocols import Record
from mtllama.evaluate.runner import RECORDS, read_run
from mtllama.tasks.catalog import find_tasks

ROLES = ("unseen data set", "unseen task", "train")
"""The order in which tasks are shown."""

Key = tuple[str, str, int]
"""Item id, template, and how often that pair came before."""
Job = tuple[str, str]
"""Task and protocol."""


@dataclass(frozen=True)
class Difference:
    """One task under one protocol, item by item: tuned minus base, in points of percent."""

    role: str
    task: str
    protocol: str
    metric: str
    num_items: int
    base: float
    tuned: float
    difference: float
    ci95: tuple[float, float]
    p: float
    p_holm: float
    """Adjusted over the tasks of the same protocol."""


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
    means: tuple[Mean, ...]
    unmatched: tuple[str, ...]
    """Tasks (and protocols) that only one of the runs has."""


@dataclass(frozen=True)
class Run:
    """One evaluation, its records at hand by task, protocol and item."""

    label: str
    folder: Path
    results: dict[str, Any]
    records: list[Record]
    jobs: dict[Job, dict[Key, Record]]

    @property
    def name(self) -> str:
        """The model's name."""
        return str(self.results["model"]["name"])

    def result(self, job: Job) -> dict[str, Any] | None:
        """The numbers of one task under one protocol."""
        found: dict[str, Any] | None = self.results["tasks"].get(job[0], {}).get(job[1])
        return found


def read(folder: Path, label: str) -> Run:
    """A run of an evaluation folder, its records checked against its results."""
    results, records = read_run(folder)
    jobs = by_job(records)
    for task, protocol in jobs_of([results]):
        expected, found = results["tasks"][task][protocol]["n"], len(jobs.get((task, protocol), ()))
        if expected != found:
            raise UserError(f"{folder / RECORDS} has {found} records of {task} ({protocol}), its results {expected}: evaluate again")
    return Run(label, folder, results, records, jobs)


def compare(
    base: tuple[dict[str, Any], Sequence[Record]],
    tuned: tuple[dict[str, Any], Sequence[Record]],
    *,
    advance: Callable[..., None] = lambda num=1, note="": None,
) -> Comparison:
    """Tuned minus base over the same items (item id and template); runs over different items are refused."""
    left, right = by_job(base[1]), by_job(tuned[1])
    jobs = [job for job in left if job in right]
    if not jobs:
        raise UserError("the runs have no task and protocol in common; evaluate both with the same suite, tasks and protocols")
    pairs = {job: _paired(job, base[0]["tasks"][job[0]][job[1]]["metric"], left[job], right[job]) for job in jobs}
    differences: dict[Job, list[float]] = {job: (after - before).tolist() for job, (before, after) in pairs.items()}
    ps = {}
    for job in jobs:
        ps[job] = stats.paired_p([differences[job]])
        advance(note=job[0])
    adjusted: dict[Job, float] = {}
    for protocol in protocols.PROTOCOLS:
        same = [job for job in jobs if job[1] == protocol]
        adjusted.update(zip(same, stats.holm([ps[job] for job in same]), strict=True))
    tasks, means = [], []
    for role, group in by_role(jobs):
        for job in group:
            before, after = (100 * float(values.mean()) for values in pairs[job])
            low, high = stats.mean_difference_interval([differences[job]])
            metric = base[0]["tasks"][job[0]][job[1]]["metric"]
            tasks.append(
                Difference(
                    role,
                    *job,
                    metric,
                    len(differences[job]),
                    before,
                    after,
                    after - before,
                    (100 * low, 100 * high),
                    ps[job],
                    adjusted[job],
                )
            )
        chosen = primary(group)
        before, after = (100 * float(np.mean([pairs[job][i].mean() for job in chosen])) for i in (0, 1))
        every = [differences[job] for job in chosen]
        low, high = stats.mean_difference_interval(every)
        names, ways = zip(*chosen, strict=True)
        means.append(
            Mean(role, names, ways, sum(map(len, every)), before, after, after - before, (100 * low, 100 * high), stats.paired_p(every))
        )
    unmatched = tuple(f"{task} ({protocol})" for task, protocol in dict.fromkeys((*left, *right)) if (task, protocol) not in pairs)
    return Comparison(base[0]["model"]["name"], tuned[0]["model"]["name"], tuple(tasks), tuple(means), unmatched)


def _paired(job: Job, metric: str, left: dict[Key, Record], right: dict[Key, Record]) -> tuple[np.ndarray, np.ndarray]:
    """The values of both runs in one order of items."""
    advice = "evaluate both with the same data, split, limit and seed"
    odd = sorted(left.keys() ^ right.keys())
    if odd:
        raise UserError(
            f"{job[0]} ({job[1]}): the runs hold different items ({len(left)} and {len(right)}; {odd[0][0]} is in one only); {advice}"
        )
    for key, record in left.items():
        if (record["gold"], record["choices"]) != (right[key]["gold"], right[key]["choices"]):
            raise UserError(f"{job[0]} ({job[1]}): item {key[0]} has another answer or other choices in each run; {advice}")
    before, after = (np.array([protocols.value(records[key], metric) for key in left]) for records in (left, right))
    return before, after


def by_job(records: Iterable[Record]) -> dict[Job, dict[Key, Record]]:
    """Records by task and protocol, then by item."""
    jobs: dict[Job, dict[Key, Record]] = {}
    for record in records:
        group = jobs.setdefault((record["task"], record["protocol"]), {})
        turn = 0
        while (key := (record["item_id"], record["template"], turn)) in group:
            turn += 1
        group[key] = record
    return jobs


def jobs_of(runs: Iterable[dict[str, Any]]) -> list[Job]:
    """Every task and protocol that any of the results has, in their order."""
    return list(dict.fromkeys((task, protocol) for run in runs for task, by_protocol in run["tasks"].items() for protocol in by_protocol))


def by_role(jobs: Sequence[Job]) -> list[tuple[str, list[Job]]]:
    """The jobs of each role that has any; an unknown task is an error."""
    roles = {task: find_tasks([task])[0].role for task, _ in jobs}
    groups = [(role, [job for job in jobs if roles[job[0]] == role]) for role in ROLES]
    return [(role, group) for role, group in groups if group]


def primary(jobs: Sequence[Job]) -> list[Job]:
    """One protocol a task: ranking where it was measured, else generation."""
    return [job for job in jobs if job[1] == "rank" or (job[0], "rank") not in jobs]
