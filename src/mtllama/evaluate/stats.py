"""Intervals and paired tests. All random draws are seeded, so a report is the same every time."""

from collections.abc import Sequence

import numpy as np
from scipy import stats

RESAMPLES = 10_000


def exact_interval(num_correct: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Clopper-Pearson interval of a share."""
    interval = stats.binomtest(num_correct, n).proportion_ci(level, method="exact")
    return float(interval.low), float(interval.high)


def bootstrap_interval(values: Sequence[float], level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean."""
    array = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(seed)
    means = np.concatenate([array[rng.integers(0, len(array), (500, len(array)))].mean(axis=1) for _ in range(RESAMPLES // 500)])
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95% interval of a mean of per-item values: exact where they are all 0 or 1, else bootstrap."""
    if all(value in (0.0, 1.0) for value in values):
        return exact_interval(int(sum(values)), len(values))
    return bootstrap_interval(values)


def paired_p(differences: Sequence[Sequence[float]], seed: int = 0) -> float:
    """Two-sided p of the mean over tasks of mean per-item differences, by random sign flips.

    `differences` holds one sequence a task. Under the hypothesis that two models do not differ, the sign of every
    item's difference is as good as a coin's; flips are drawn independently over all items. For a single task of 0/1
    values this is McNemar's exact test up to sampling. The estimate counts the observed draw itself, so p > 0.
    """
    arrays = [np.asarray(task, dtype=np.float64) for task in differences]
    observed = abs(np.mean([array.mean() for array in arrays]))
    rng = np.random.default_rng(seed)
    extreme = 0
    for _ in range(RESAMPLES // 500):
        means = [(rng.choice((-1.0, 1.0), (500, len(array))) * array).mean(axis=1) for array in arrays]
        extreme += int((np.abs(np.mean(means, axis=0)) >= observed - 1e-12).sum())
    return (extreme + 1) / (RESAMPLES + 1)


def mean_difference_interval(differences: Sequence[Sequence[float]], level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Bootstrap interval of the mean over tasks of mean per-item differences; items are drawn within their task."""
    arrays = [np.asarray(task, dtype=np.float64) for task in differences]
    rng = np.random.default_rng(seed)
    draws = []
    for _ in range(RESAMPLES // 500):
        means = [array[rng.integers(0, len(array), (500, len(array)))].mean(axis=1) for array in arrays]
        draws.append(np.mean(means, axis=0))
    low, high = np.quantile(np.concatenate(draws), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment: the chance of even one false alarm among all `ps` stays below the level."""
    adjusted, largest = [0.0] * len(ps), 0.0
    for rank, index in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[index]))
        adjusted[index] = largest
    return adjusted
