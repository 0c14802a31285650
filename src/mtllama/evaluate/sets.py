"""Numbers that are of a whole set and no mean over its items (macro-F1, corpus BLEU): intervals, and differences between two models.

Over several templates such a number is the mean of each template's. What is drawn and swapped are items, each with all of its
renderings.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mtllama.evaluate import stats
from mtllama.evaluate.metrics import METRICS, Answer, Counts, OverSet

Answers = Mapping[str, Mapping[Any, Answer]]
"""By template, then by item: what a model answered."""


@dataclass(frozen=True)
class SetValue:
    """A metric of a set, in percent."""

    value: float
    ci95: tuple[float, float]


@dataclass(frozen=True)
class SetValues:
    """A metric of a set over all templates, and through each of those that it says something about."""

    overall: SetValue
    templates: dict[str, SetValue]


@dataclass(frozen=True)
class SetDifference:
    """A metric of one task's whole set under one protocol, of two models over the same items: tuned minus base, in points of percent."""

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
    """Of random swaps of the two models' answers."""
    p_holm: float
    """Adjusted over the tasks that have the metric under the same protocol."""


def set_metrics(names: Sequence[str], answers: Answers) -> list[str]:
    """Those of the named metrics that are of a set and say something about the answers through some template."""
    return [name for name in names if any(_says(METRICS[name].over_set, group) for group in answers.values())]


def set_values(names: Sequence[str], answers: Answers) -> dict[str, SetValues]:
    """The metrics of the whole set among the named ones, with 95% intervals."""
    found = {}
    for name in set_metrics(names, answers):
        counted = _Counted.of(name, answers)
        found[name] = SetValues(counted.measured(), {template: counted.through(template).measured() for template in counted.groups})
    return found


def set_difference(role: str, task: str, protocol: str, name: str, base: Answers, tuned: Answers) -> SetDifference:
    """Two models' numbers over the same items and templates, and what can be said of their difference; its p is not adjusted yet."""
    both = _Counted.of(name, base, tuned)
    num_items = both.num_items // 2

    def values(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        nothing = np.zeros_like(weights)
        return both(np.hstack([weights, nothing])), both(np.hstack([nothing, weights]))

    def differences(weights: np.ndarray) -> np.ndarray:
        before, after = values(weights)
        change: np.ndarray = after - before
        return change

    before, after = (100 * float(each[0]) for each in values(np.ones((1, num_items))))
    low, high = stats.statistic_interval(differences, num_items)
    p = stats.paired_statistic_p(both, num_items)
    return SetDifference(role, task, protocol, name, num_items, before, after, after - before, (100 * low, 100 * high), p, p)


def _says(metric: OverSet | None, group: Mapping[Any, Answer]) -> bool:
    return metric is not None and not (metric.of_choices and any(answer.gold is None for answer in group.values()))


@dataclass(frozen=True)
class _Counted:
    """A metric as a function of how often each item is there; of two models, the second's items stand behind the first's."""

    metric: OverSet
    groups: dict[str, tuple[Counts, list[int]]]
    """Of each template, what was counted of every answer, and the place of each one's item."""
    num_items: int

    @classmethod
    def of(cls, name: str, *models: Answers) -> "_Counted":
        metric = METRICS[name].over_set
        assert metric is not None, name
        said = [template for template, group in models[0].items() if _says(metric, group)]
        items = {item: place for place, item in enumerate(dict.fromkeys(item for template in said for item in models[0][template]))}
        groups = {
            template: (
                # Counted together: how many classes there are to count depends on the answers.
                metric.counts([answer for model in models for answer in model[template].values()]),
                [items[item] + turn * len(items) for turn, model in enumerate(models) for item in model[template]],
            )
            for template in said
        }
        return cls(metric, groups, len(models) * len(items))

    def through(self, template: str) -> "_Counted":
        """One template, and the items that it asks about."""
        counts, _ = self.groups[template]
        return _Counted(self.metric, {template: (counts, list(range(len(counts))))}, len(counts))

    def measured(self) -> SetValue:
        low, high = stats.statistic_interval(self, self.num_items)
        return SetValue(100 * float(self(np.ones((1, self.num_items)))[0]), (100 * low, 100 * high))

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        """(sets, items) -> (sets,). A template that none of a set's items is asked through says nothing about that set."""
        values = np.full((len(self.groups), len(weights)), np.nan)
        for value, (counts, places) in zip(values, self.groups.values(), strict=True):
            mine = weights[:, places]
            there = mine.sum(axis=1) > 0
            value[there] = self.metric.resampled(counts, mine[there])
        means: np.ndarray = np.nanmean(values, axis=0)
        return means
