"""Intervals and paired tests against independent computations."""

import itertools

import numpy as np
import pytest
from scipy import stats as scipy_stats

from mtllama.evaluate import stats


def test_the_exact_interval_is_clopper_pearsons() -> None:
    low, high = stats.exact_interval(8, 20)
    assert low == pytest.approx(scipy_stats.beta.ppf(0.025, 8, 13))
    assert high == pytest.approx(scipy_stats.beta.ppf(0.975, 9, 12))
    assert stats.exact_interval(0, 5)[0] == 0.0
    assert stats.exact_interval(5, 5)[1] == 1.0


def test_the_bootstrap_interval_of_many_values_is_the_normal_one() -> None:
    values = np.random.default_rng(3).random(2000)
    low, high = stats.bootstrap_interval(values.tolist())
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert low == pytest.approx(values.mean() - half, abs=2e-3)
    assert high == pytest.approx(values.mean() + half, abs=2e-3)


def test_the_paired_p_equals_the_enumeration_of_all_sign_flips() -> None:
    tasks = [[1.0, 0.0, 0.5, 1.0, -0.25], [0.3, 1.0, -1.0, 0.7]]
    observed = abs(np.mean([np.mean(task) for task in tasks]))
    flips = list(itertools.product((-1, 1), repeat=9))
    extreme = sum(
        abs(np.mean([np.mean(np.multiply(f[:5], tasks[0])), np.mean(np.multiply(f[5:], tasks[1]))])) >= observed - 1e-12 for f in flips
    )
    assert len(flips) == 512
    assert stats.paired_p(tasks) == pytest.approx(extreme / 512, abs=0.02)


def test_the_paired_p_of_right_and_wrong_answers_is_mcnemars() -> None:
    won, lost = 14, 4
    differences = [1.0] * won + [-1.0] * lost + [0.0] * 30
    theirs = scipy_stats.binomtest(won, won + lost).pvalue
    assert stats.paired_p([differences]) == pytest.approx(theirs, abs=0.01)


def test_models_that_do_not_differ_have_p_one() -> None:
    assert stats.paired_p([[0.0] * 20]) == 1.0


def test_the_difference_interval_is_the_same_every_time_and_holds_the_mean() -> None:
    tasks = [[1.0, 0.0, 1.0, 0.0, 1.0], [0.0, -1.0, 1.0, 1.0]]
    first, second = stats.mean_difference_interval(tasks), stats.mean_difference_interval(tasks)
    assert first == second
    assert first[0] < np.mean([np.mean(task) for task in tasks]) < first[1]
