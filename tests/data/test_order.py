"""Every row once in a pass, every stream exactly by its rate, at any position."""

from collections import Counter
from fractions import Fraction

import hypothesis
from hypothesis import given, settings
from hypothesis import strategies as st

from mtllama.data.order import SMALL, Interleave, Order

GOLDEN_SMALL = [9, 4, 1, 2, 7, 3, 8, 6, 5, 0]
GOLDEN_LARGE = [95117, 56650, 72230, 57302, 30183]


@given(rates=st.lists(st.fractions(min_value="1/7", max_value=20, max_denominator=7), min_size=1, max_size=12), start=st.integers(0, 10**9))
def test_in_every_period_each_stream_is_drawn_exactly_as_often_as_its_rate_says(rates: list[Fraction], start: int) -> None:
    interleave = Interleave(rates)
    hypothesis.assume(interleave.period < 3000)
    drawn = [interleave[position] for position in range(interleave.period)]
    assert Counter(stream for stream, _ in drawn) == dict(enumerate(interleave.rates))
    assert [rate / sum(rates) for rate in rates] == [Fraction(rate, interleave.period) for rate in interleave.rates]
    for stream in range(len(rates)):
        assert [place for each, place in drawn if each == stream] == list(range(interleave.rates[stream])), "in order, none left out"
    stream, place = interleave[start]
    assert interleave[start + interleave.period] == (stream, place + interleave.rates[stream])


def test_an_interleave_never_strays_far_from_the_shares() -> None:
    interleave = Interleave([Fraction(rate) for rate in (1, 3, 500, 7, 200, 90, 1, 42)])
    counted, worst = Counter[int](), 0.0
    for position in range(interleave.period):
        counted[interleave[position][0]] += 1
        for stream, rate in enumerate(interleave.rates):
            worst = max(worst, abs(counted[stream] - (position + 1) * rate / interleave.period))
    assert 0 < worst < 4


@given(size=st.integers(1, 3000), seed=st.text(max_size=5), turn=st.integers(0, 10**6))
@settings(max_examples=50)
def test_every_pass_of_an_order_is_a_shuffle_of_all_rows(size: int, seed: str, turn: int) -> None:
    order = Order(size, seed)
    places = [order[turn * size + position] for position in range(size)]
    assert {found for found, _ in places} == {turn}
    assert sorted(place for _, place in places) == list(range(size))


def test_a_long_order_covers_its_rows_without_holding_them() -> None:
    size = SMALL + 5
    order = Order(size, "long")
    assert sorted(order[position][1] for position in range(3 * size, 4 * size)) == list(range(size))
    assert not order._passes


def test_the_shuffle_is_the_same_for_ever() -> None:
    assert [Order(10, "golden")[position][1] for position in range(10)] == GOLDEN_SMALL
    assert [Order(100_000, "golden")[position][1] for position in range(200_000, 200_005)] == GOLDEN_LARGE
