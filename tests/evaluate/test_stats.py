"""Intervals and paired tests against independent computations."""

import itertools
import math
from decimal import ROUND_HALF_DOWN, ROUND_HALF_EVEN, ROUND_HALF_UP, Decimal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from mtllama.evaluate import stats

NORMAL_975, NORMAL_80 = 1.959963984540054, 0.8416212335729143


def test_the_exact_interval_is_clopper_pearsons() -> None:
    low, high = stats.exact_interval(8, 20)
    assert low == pytest.approx(scipy_stats.beta.ppf(0.025, 8, 13))
    assert high == pytest.approx(scipy_stats.beta.ppf(0.975, 9, 12))
    assert stats.exact_interval(0, 5)[0] == 0.0
    assert stats.exact_interval(5, 5)[1] == 1.0


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_ends_of_an_exact_interval_are_where_the_count_becomes_unlikely(case: tuple[int, int]) -> None:
    k, n = case
    low, high = stats.exact_interval(k, n)
    assert low <= k / n <= high
    if k > 0:
        assert scipy_stats.binom.sf(k - 1, n, low) == pytest.approx(0.025, rel=1e-6)
    if k < n:
        assert scipy_stats.binom.cdf(k, n, high) == pytest.approx(0.025, rel=1e-6)


@pytest.mark.parametrize("levels", [None, 8])
def test_the_bootstrap_interval_of_many_values_is_the_normal_one(levels: int | None) -> None:
    values = np.random.default_rng(3).random(2000)
    if levels:  # few distinct values are drawn by their counts
        values = np.floor(values * levels) / levels
    low, high = stats.bootstrap_interval(values.tolist())
    half = NORMAL_975 * values.std() / np.sqrt(len(values))
    assert low == pytest.approx(values.mean() - half, abs=2e-3)
    assert high == pytest.approx(values.mean() + half, abs=2e-3)


def test_drawing_counts_of_distinct_values_is_the_bootstrap_itself() -> None:
    # 16 items, two values: the bootstrap mean is k/16 with k binomial, whose quantiles are known.
    ours = stats.bootstrap_interval([0.25] * 12 + [0.75] * 4)
    theirs = [0.25 + 0.5 * scipy_stats.binom.ppf(q, 16, 0.25) / 16 for q in (0.025, 0.975)]
    assert ours == pytest.approx(theirs, abs=0.5 / 16)


def test_a_mean_over_tasks_weighs_its_tasks_alike_whatever_their_sizes() -> None:
    small, large = [0.0, 1.0] * 10, [0.0, 1.0] * 1000
    low, high = stats.mean_interval([small, large])
    deviation = math.sqrt((0.25 / 20 + 0.25 / 2000) / 4)
    assert (high - low) / 2 == pytest.approx(NORMAL_975 * deviation, rel=0.1)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_an_interval_lies_within_the_values_and_is_the_same_every_time(values: list[float]) -> None:
    low, high = stats.bootstrap_interval(values)
    assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9
    assert (low, high) == stats.bootstrap_interval(values)


def test_templates_that_repeat_an_answer_make_no_interval_narrower() -> None:
    answers = [1.0] * 30 + [0.0] * 20
    once, ten_times = stats.interval(answers), stats.clustered_interval([[answer] * 10 for answer in answers])
    assert ten_times == once == stats.exact_interval(30, 50)
    pooled = stats.interval([answer for answer in answers for _ in range(10)])
    assert pooled[1] - pooled[0] < 0.4 * (once[1] - once[0]), "the wrong way would have been told apart"


def test_the_clustered_interval_is_that_of_the_item_means() -> None:
    rng = np.random.default_rng(5)
    items = [rng.integers(0, 2, 4).astype(float).tolist() for _ in range(800)]
    low, high = stats.clustered_interval(items)
    means = np.mean(items, axis=1)
    half = NORMAL_975 * means.std() / math.sqrt(800)
    assert (low, high) == pytest.approx((means.mean() - half, means.mean() + half), abs=2e-3)


def mean_of(values: np.ndarray) -> stats.Resampled:
    """The mean, as a number of the whole set."""
    return lambda weights: weights @ values / weights.sum(axis=1)


def test_the_interval_of_a_number_of_the_whole_set_draws_items_anew() -> None:
    values = np.random.default_rng(1).random(400)
    low, high = stats.statistic_interval(mean_of(values), 400)
    assert (low, high) == pytest.approx(stats.bootstrap_interval(values.tolist()), abs=4e-3)


@pytest.mark.parametrize("shift", [0.0, 0.05, 0.2])
def test_swapping_the_answers_of_two_models_is_flipping_the_signs_of_their_differences(shift: float) -> None:
    rng = np.random.default_rng(4)
    first, second = rng.random(60), rng.random(60) + shift
    ours = stats.paired_statistic_p(mean_of(np.concatenate([first, second])), 60)
    assert ours == pytest.approx(stats.paired_p([(second - first).tolist()]), abs=0.05)


def test_the_standard_error_is_that_of_the_items_means() -> None:
    # Means 0.5, 1, 0: variance of the sample 1/4, of the mean 1/12.
    assert stats.standard_error([[0.0, 1.0], [1.0, 1.0], [0.0, 0.0]]) == pytest.approx(math.sqrt(1 / 12))
    assert stats.standard_error([[0.3, 0.7]]) is None


def some_items(seed: int, n: int, share: float) -> np.ndarray:
    """Two templates, the second of which asks a share of the items, and gets less of them right."""
    rng = np.random.default_rng(seed)
    table = rng.random((n, 2)) * (1.0, 0.4)
    table[rng.permutation(n)[: n - round(share * n)], 1] = math.nan
    return table


def template_means(table: np.ndarray) -> float:
    return float(np.mean([np.nanmean(column) for column in table.T]))


def test_where_a_template_asks_some_items_only_all_numbers_are_of_the_mean_over_templates() -> None:
    table, rng = some_items(1, 200, 0.2), np.random.default_rng(2)
    assert stats.item_values(table).mean() == pytest.approx(template_means(table))
    assert abs(np.mean([np.nanmean(row) for row in table]) - template_means(table)) > 0.1, "the mean of the items' means is another number"
    draws = [template_means(table[rng.integers(0, 200, 200)]) for _ in range(3000)]
    assert stats.clustered_interval(table) == pytest.approx(np.quantile(draws, (0.025, 0.975)).tolist(), abs=4e-3)
    assert stats.mean_interval([table, [0.5] * 10])[1] == pytest.approx((np.quantile(draws, 0.975) + 0.5) / 2, abs=3e-3)
    assert stats.standard_error(table) == pytest.approx(np.std(draws), rel=0.06)


def test_where_a_template_asks_some_items_only_p_is_that_of_all_swaps_of_items() -> None:
    change = some_items(3, 10, 0.5) - 0.25
    seen = abs(template_means(change))
    swaps = [abs(template_means(change * np.array(signs)[:, None])) for signs in itertools.product((1, -1), repeat=10)]
    expected = sum(each >= seen - 1e-12 for each in swaps) / len(swaps)
    assert 0.02 < expected < 0.98 and stats.clustered_paired_p(change) == pytest.approx(expected, abs=0.02)


def test_mcnemars_p_equals_the_sum_of_its_binomial() -> None:
    # Agresti's 86 against 150 in large, and small tables in full.
    for won, lost in [(14, 4), (0, 7), (5, 5), (1, 0), (86, 150), (3, 2)]:
        n, k = won + lost, min(won, lost)
        tail = sum(math.comb(n, i) for i in range(k + 1)) / 2**n
        assert stats.mcnemar_p(won, lost) == pytest.approx(min(1.0, 2 * tail)), (won, lost)
    assert stats.mcnemar_p(0, 0) == 1.0


def test_the_paired_p_of_right_and_wrong_answers_is_mcnemars_exactly() -> None:
    won, lost = 14, 4
    differences = [1.0] * won + [-1.0] * lost + [0.0] * 30
    assert stats.paired_p([differences]) == pytest.approx(sum(math.comb(18, i) for i in range(5)) / 2**17, rel=1e-12)


@given(st.integers(0, 12), st.integers(0, 12), st.integers(0, 5))
def test_drawn_sign_flips_agree_with_the_closed_form(won: int, lost: int, same: int) -> None:
    differences = [0.5] * won + [-0.5] * lost + [0.0] * (same + 1)  # halves are not 0 or 1, so they are drawn
    assert stats.paired_p([differences]) == pytest.approx(stats.mcnemar_p(won, lost), abs=0.025)


def test_the_paired_p_equals_the_enumeration_of_all_sign_flips() -> None:
    tasks = [[1.0, 0.0, 0.5, 1.0, -0.25], [0.3, 1.0, -1.0, 0.7]]
    observed = abs(np.mean([np.mean(task) for task in tasks]))
    flips = list(itertools.product((-1, 1), repeat=9))
    extreme = sum(
        abs(np.mean([np.mean(np.multiply(f[:5], tasks[0])), np.mean(np.multiply(f[5:], tasks[1]))])) >= observed - 1e-12 for f in flips
    )
    assert len(flips) == 512
    assert stats.paired_p(tasks) == pytest.approx(extreme / 512, abs=0.02)


def test_the_paired_p_holds_its_level_where_a_set_is_small() -> None:
    rng = np.random.default_rng(11)
    ps = [stats.paired_p([(rng.beta(0.3, 0.4, 8) - rng.beta(0.3, 0.4, 8)).round(2).tolist()]) for _ in range(400)]
    assert sum(p < 0.05 for p in ps) <= 400 * 0.05 + 3 * math.sqrt(400 * 0.05 * 0.95)
    assert sum(p < 0.5 for p in ps) > 400 * 0.35, "a p that is never small would pass as well"


def test_templates_that_repeat_an_item_do_not_make_a_difference_surer() -> None:
    items = [1.0] * 9 + [-1.0] * 3 + [0.0] * 8
    once = stats.paired_p([items])
    assert stats.clustered_paired_p([[value] * 5 for value in items]) == once == stats.mcnemar_p(9, 3)
    assert stats.mcnemar_p(45, 15) < once / 100, "the wrong way would have been told apart"


def test_models_that_do_not_differ_have_p_one() -> None:
    assert stats.paired_p([[0.0] * 20]) == 1.0
    assert stats.paired_p([[0.0] * 20, [0.0] * 5]) == 1.0


def test_the_difference_interval_is_the_same_every_time_and_holds_the_mean() -> None:
    tasks = [[1.0, 0.0, 1.0, 0.0, 1.0], [0.0, -1.0, 1.0, 1.0]]
    first, second = stats.mean_interval(tasks), stats.mean_interval(tasks)
    assert first == second
    assert first[0] < np.mean([np.mean(task) for task in tasks]) < first[1]


def test_holm_equals_the_example_by_hand() -> None:
    # 4 x 0.005, 3 x 0.01, then 2 x 0.03 = 0.06, which the larger p of 0.04 may not undercut.
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.9, 0.8]) == [1.0, 1.0]
    assert stats.holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_rejects_what_stepping_down_rejects(ps: list[float]) -> None:
    adjusted = stats.holm(ps)
    rejected = 0
    for rank, p in enumerate(sorted(ps)):
        if p * (len(ps) - rank) >= 0.05:
            break
        rejected += 1
    assert sum(p < 0.05 for p in adjusted) == rejected
    assert all(p <= q <= 1 for p, q in zip(ps, adjusted, strict=True))


def test_the_detectable_effect_of_a_large_set_is_connors() -> None:
    # Connor 1987: n = (z_a sqrt(s) + z_b sqrt(s - d^2))^2 / d^2 for a share s at odds and a difference d.
    n, share = 4000, 0.2
    effect = stats.detectable_effect([1.0] * 500 + [-1.0] * 300 + [0.0] * 3200)
    assert effect is not None
    needed = (NORMAL_975 * math.sqrt(share) + NORMAL_80 * math.sqrt(share - effect**2)) ** 2 / effect**2
    assert needed == pytest.approx(n, rel=0.05)


def test_the_power_of_mcnemars_test_is_what_simulation_finds() -> None:
    rng = np.random.default_rng(2)
    n, share, effect = 60, 0.4, 0.2
    at_odds = rng.binomial(n, share, 4000)
    won = rng.binomial(at_odds, (share + effect) / (2 * share))
    found = np.mean([stats.mcnemar_p(int(w), int(m - w)) <= 0.05 for w, m in zip(won, at_odds, strict=True)])
    assert stats.mcnemar_power(n, share, effect) == pytest.approx(found, abs=0.025)
    assert stats.mcnemar_power(n, share, 0.0) <= 0.05


def test_the_detectable_effect_has_the_power_asked_for() -> None:
    effect = stats.detectable_effect([1.0] * 20 + [-1.0] * 10 + [0.0] * 70)
    assert effect is not None and stats.mcnemar_power(100, 0.3, effect) == pytest.approx(0.8, abs=1e-4)
    larger = stats.detectable_effect([1.0] * 20 + [-1.0] * 10 + [0.0] * 70, power=0.9)
    assert larger is not None and larger > effect


def test_of_values_other_than_right_and_wrong_the_normal_test_counts() -> None:
    values = [0.5, -0.25, 0.0, 0.75, 0.1]
    theirs = (NORMAL_975 + NORMAL_80) * np.std(values, ddof=1) / math.sqrt(5)
    assert stats.detectable_effect(values) == pytest.approx(theirs)


def test_nothing_is_detectable_where_nothing_or_almost_nothing_differs() -> None:
    assert stats.detectable_effect([0.0] * 100) is None
    assert stats.detectable_effect([1.0] * 3 + [0.0] * 97) is None  # three wins out of three have p = 0.25
    assert stats.detectable_effect([0.5]) is None


def test_the_published_sst2_accuracy_is_of_no_count_among_872_but_of_one_among_1821() -> None:
    assert not stats.reachable(92.6, 872)
    assert stats.reachable(92.6, 872).start == 808 and round(100 * 807 / 872, 1) == 92.5 and round(100 * 808 / 872, 1) == 92.7
    assert list(stats.reachable(92.6, 1821)) == [1686, 1687]
    assert list(stats.reachable("50.46", 872, digits=2)) == [440]
    assert list(stats.reachable(100.0, 7)) == [7] and list(stats.reachable(0.0, 7)) == [0]


@given(st.integers(1, 3000), st.integers(0, 2), st.integers(0, 1000))
def test_a_percentage_is_reached_by_the_counts_that_round_to_it(n: int, digits: int, tenths: int) -> None:
    percent, unit = Decimal(tenths) / 10, Decimal(1).scaleb(-digits)
    percent = percent.quantize(unit)
    ways = (ROUND_HALF_UP, ROUND_HALF_DOWN, ROUND_HALF_EVEN)
    near = int(percent * n / 100)
    around = range(max(0, near - n // 50 - 2), min(n, near + n // 50 + 2) + 1)
    theirs = [k for k in around if any((Decimal(100 * k) / n).quantize(unit, way) == percent for way in ways)]
    assert list(stats.reachable(str(percent), n, digits)) == theirs
