"""Intervals, paired tests and what a number can be. All random draws are seeded, so a report is the same every time.

Values are shares from 0 to 1. Where several templates ask about one item, their values belong together: the functions
take a table (items, templates), NaN where a template does not ask an item, and items are what is drawn, flipped and counted.
What is estimated is the mean over templates of their means; where every template asks every item, that is the mean of the items' means.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction

import numpy as np
from scipy import optimize, stats

RESAMPLES = 10_000
BLOCK = 500
"""Resamples that are held in memory at a time."""
SET_RESAMPLES = 1_000
POWER = 0.8

Floats = Sequence[float]
Table = Sequence[Floats] | np.ndarray
"""(items, templates)"""
Resampled = Callable[[np.ndarray], np.ndarray]
"""(sets, answers), how often each answer stands in a set -> (sets,), the number of interest of each set."""


def as_table(items: Iterable[Mapping[str, float]]) -> np.ndarray:
    """(items, templates): the values of each item by template, NaN where a template does not ask it."""
    rows = list(items)
    names = list(dict.fromkeys(name for row in rows for name in row))
    return np.array([[row.get(name, math.nan) for name in names] for row in rows], dtype=np.float64)


def item_values(table: Table) -> np.ndarray:
    """(items,): what each item adds; their mean is the mean over templates of their means.

    Where every template asks every item it is the mean of the item's values, else each is weighted by how few items its template asks.
    Of differences it is what changes its sign where two models' answers to the item are swapped.
    """
    array = np.asarray(table, dtype=np.float64)
    there = ~np.isnan(array)
    if there.all():
        means: np.ndarray = array.mean(axis=1)
        return means
    weighted: np.ndarray = (np.where(there, array, 0.0) * (len(array) / there.sum(axis=0))).mean(axis=1)
    return weighted


def item_deviations(table: Table) -> np.ndarray:
    """(items,): the same as far as chance is concerned: how many templates ask an item is no deviation of the item's."""
    array = np.asarray(table, dtype=np.float64)
    there = ~np.isnan(array)
    return item_values(array) if there.all() else item_values(array - np.nanmean(array, axis=0))


def standard_error(table: Table) -> float | None:
    """Standard error of the mean over templates, by the sample's standard deviation over items; of one item it is not known."""
    values = item_deviations(table)
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


def exact_interval(num_correct: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Clopper-Pearson interval of a share."""
    interval = stats.binomtest(num_correct, n).proportion_ci(level, method="exact")
    return float(interval.low), float(interval.high)


def bootstrap_interval(values: Floats, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean."""
    return mean_interval([values], level, seed)


def mean_interval(tasks: Sequence[Floats | np.ndarray], level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean over tasks of their means; items are drawn within their task.

    A task is the values of its items, or a table of them. With paired differences for values it is the paired bootstrap.
    """
    rng = np.random.default_rng(seed)
    return _ends(np.mean([_resampled_means(np.asarray(task, dtype=np.float64), rng) for task in tasks], axis=0), level)


def interval(values: Floats) -> tuple[float, float]:
    """95% interval of a mean of per-item values: exact where they are all 0 or 1, else bootstrap."""
    if all(value in (0.0, 1.0) for value in values):
        return exact_interval(int(sum(values)), len(values))
    return bootstrap_interval(values)


def clustered_interval(table: Table) -> tuple[float, float]:
    """95% interval of the mean over templates of their means: however many templates ask, the items are what was drawn."""
    array = np.asarray(table, dtype=np.float64)
    return mean_interval([array]) if np.isnan(array).any() else interval(item_values(array).tolist())


def statistic_interval(resampled: Resampled, n: int, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of a number that is of the whole set and no mean (macro-F1, corpus BLEU), by 1,000 resamples."""
    rng = np.random.default_rng(seed)
    weights = (rng.multinomial(n, np.full(n, 1 / n), BLOCK).astype(np.float64) for _ in range(SET_RESAMPLES // BLOCK))
    return _ends(np.concatenate([resampled(each) for each in weights]), level)


def paired_statistic_p(resampled: Resampled, n: int, seed: int = 0) -> float:
    """Two-sided p of the difference between two models of a number of the whole set, by 1,000 random swaps.

    `resampled` is over 2n answers, the first model's and then the second's to the same items. Under the hypothesis that
    the models do not differ, either may have given either of the two answers to an item.
    """
    rng = np.random.default_rng(seed)

    def differences(swaps: np.ndarray) -> np.ndarray:
        kept = np.hstack([1.0 - swaps, swaps])
        return resampled(1.0 - kept) - resampled(kept)

    observed = abs(differences(np.zeros((1, n)))[0])
    drawn = np.concatenate([differences(rng.integers(0, 2, (BLOCK, n)).astype(np.float64)) for _ in range(SET_RESAMPLES // BLOCK)])
    return (int((np.abs(drawn) >= observed - 1e-12).sum()) + 1) / (SET_RESAMPLES + 1)


def mcnemar_p(won: int, lost: int) -> float:
    """McNemar's exact two-sided p, in closed form: of the items on which two models differ, each is as good as a coin's toss."""
    return float(stats.binomtest(won, won + lost).pvalue) if won + lost else 1.0


def paired_p(differences: Sequence[Floats], seed: int = 0) -> float:
    """Two-sided p of the mean over tasks of mean per-item differences.

    `differences` holds one sequence a task. Under the hypothesis that two models do not differ, the sign of every
    item's difference is as good as a coin's. For one task of right and wrong answers the share of sign patterns that
    are as extreme as the one seen is McNemar's exact p; else patterns are drawn, independently over all items. (A
    bootstrap's p calls too many small sets significant; sign flips hold their level for any number of items.) The estimate
    counts the observed pattern itself, so p > 0.
    """
    arrays = [np.asarray(task, dtype=np.float64) for task in differences]
    if len(arrays) == 1 and np.isin(arrays[0], (-1.0, 0.0, 1.0)).all():
        return mcnemar_p(int((arrays[0] > 0).sum()), int((arrays[0] < 0).sum()))
    observed = abs(np.mean([array.mean() for array in arrays]))
    rng = np.random.default_rng(seed)
    means = np.mean([_flipped_means(array, rng) for array in arrays], axis=0)
    return (int((np.abs(means) >= observed - 1e-12).sum()) + 1) / (RESAMPLES + 1)


def clustered_paired_p(differences: Table, seed: int = 0) -> float:
    """Two-sided p of one task's mean difference where several templates ask about an item: an item's sign flips as a whole."""
    return paired_p([item_values(differences).tolist()], seed)


def holm(ps: Floats) -> list[float]:
    """Holm's step-down adjustment: the chance of even one false alarm among all `ps` stays below the level."""
    adjusted, largest = [0.0] * len(ps), 0.0
    for rank, index in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[index]))
        adjusted[index] = largest
    return adjusted


def detectable_effect(differences: Floats, level: float = 0.05, power: float = POWER) -> float | None:
    """The smallest true difference that a paired test on as many items, as much at odds as these, finds with `power`.

    Right and wrong answers: the power of McNemar's exact test with the share of items at odds that was seen. Other values: of the
    normal test with the standard deviation of the differences that was seen. None where nothing differs, or where even
    a difference that is all one way would be missed.
    """
    array = np.asarray(differences, dtype=np.float64)
    n = len(array)
    if np.isin(array, (-1.0, 0.0, 1.0)).all():
        share = float(np.abs(array).mean())
        if share == 0 or mcnemar_power(n, share, share, level) < power:
            return None
        return float(optimize.brentq(lambda effect: mcnemar_power(n, share, effect, level) - power, 0.0, share, xtol=1e-6))
    if n < 2:
        return None
    return float((stats.norm.ppf(1 - level / 2) + stats.norm.ppf(power)) * array.std(ddof=1) / math.sqrt(n))


def mcnemar_power(n: int, share: float, effect: float, level: float = 0.05) -> float:
    """The chance that McNemar's exact test finds a true difference of `effect`, where a `share` of `n` items is at odds."""
    low, high = stats.binom.interval(1 - 1e-9, n, share)
    at_odds = np.arange(max(1, int(low)), int(high) + 1)
    critical = stats.binom.ppf(level / 2, at_odds, 0.5)
    critical = np.where(2 * stats.binom.cdf(critical, at_odds, 0.5) <= level, critical, critical - 1)  # wins that are too few for chance
    won = min(1.0, (share + effect) / (2 * share))
    found = stats.binom.cdf(critical, at_odds, won) + stats.binom.sf(at_odds - critical - 1, at_odds, won)
    return float((stats.binom.pmf(at_odds, n, share) * np.where(critical >= 0, found, 0.0)).sum())


def reachable(percent: float | str, n: int, digits: int = 1) -> range:
    """The numbers of right answers among `n` that `percent` with `digits` decimals can stand for; empty if there is none.

    A tie may have been rounded up, down or to even. Where the range is empty, its start is the next larger number.
    """
    value, half = Fraction(str(percent)), Fraction(1, 2 * 10**digits)
    first, last = math.ceil((value - half) * n / 100), math.floor((value + half) * n / 100)
    return range(max(0, first), max(max(0, first), min(n, last) + 1))


def _ends(draws: np.ndarray, level: float) -> tuple[float, float]:
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _resampled_means(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(RESAMPLES,): means of as many values drawn with replacement; of a table, the means over templates of their means."""
    n = len(values)
    there = ~np.isnan(values)
    if values.ndim == 2 and there.all():
        values = item_values(values)
    if values.ndim == 2:
        filled, found = np.where(there, values, 0.0), []
        for _ in range(RESAMPLES // BLOCK):
            weights = rng.multinomial(n, np.full(n, 1 / n), BLOCK).astype(np.float64)
            with np.errstate(invalid="ignore"):  # a template that none of the drawn items is asked through says nothing about them
                found.append(np.nanmean((weights @ filled) / (weights @ there), axis=1))
        return np.concatenate(found)
    distinct, counts = np.unique(values, return_counts=True)
    blocks = range(RESAMPLES // BLOCK)
    if 8 * len(distinct) <= n:  # how often each distinct value is drawn has a known law, which is drawn faster
        means = [rng.multinomial(n, counts / n, BLOCK) @ distinct / n for _ in blocks]
    else:
        means = [values[rng.integers(0, n, (BLOCK, n))].mean(axis=1) for _ in blocks]
    return np.concatenate(means)


def _flipped_means(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(RESAMPLES,): means of the values with signs by coin; of equal sizes it is only drawn how many are positive."""
    sizes, counts = np.unique(np.abs(values).round(12), return_counts=True)
    means = [(2 * rng.binomial(counts, 0.5, (BLOCK, len(sizes))) - counts) @ sizes / len(values) for _ in range(RESAMPLES // BLOCK)]
    return np.concatenate(means)
