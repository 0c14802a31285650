"""Which answers are given whatever is asked, and what is known behind them."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtllama.evaluate.bias import bias


def records(
    scores: list[list[float]], gold: list[int], template: str = "t", choices: tuple[str, ...] = ("Yes", "no")
) -> list[dict[str, Any]]:
    return [
        {"template": template, "choices": list(choices[: len(row)]), "scores": row, "gold_index": right}
        for row, right in zip(scores, gold, strict=True)
    ]


def test_one_answer_everywhere_over_a_model_that_knows_the_task_is_bias_and_calibration_shows_it() -> None:
    gold = [0, 1] * 20
    scores = [[-1.0 + 0.2 * (right == 0), -4.0 + 0.2 * (right == 1)] for right in gold]
    found = bias(records(scores, gold))
    assert found is not None and found.labels == ("Yes", "no")
    assert found.given == (100, 0) and found.gold == (50, 50)
    assert (found.accuracy, found.balanced, found.calibrated, found.separation) == (50, 50, 100, 100)


def test_one_answer_everywhere_over_a_model_that_knows_nothing_stays_at_chance() -> None:
    generator = np.random.default_rng(0)
    gold = generator.integers(0, 2, 2000).tolist()
    scores = (generator.normal(0, 0.5, (2000, 2)) + np.array([3, 0])).tolist()
    found = bias(records(scores, gold))
    assert found is not None and found.given[0] > 99 and found.separation is not None
    assert abs(found.calibrated - 50) < 4 and abs(found.separation - 50) < 4


def test_a_label_that_is_frequent_and_always_answered_is_accurate_but_not_balanced() -> None:
    found = bias(records([[0.0, -9.0]] * 10, [0] * 8 + [1] * 2))
    assert found is not None and (found.accuracy, found.balanced) == (80, 50)


def test_three_labels_have_no_separation_and_labels_that_never_are_right_do_not_count_as_missed() -> None:
    found = bias(records([[0.0, -1.0, -2.0], [-1.0, 0.0, -2.0]], [0, 1], choices=("Yes", "Maybe", "No")))
    assert found is not None and found.separation is None and found.balanced == 100 and found.gold == (50, 50, 0)


def test_choices_of_each_item_are_told_by_place_and_length() -> None:
    own = records([[0.0, -1.0]] * 4, [0, 1, 1, 0])
    for record, choices in zip(own, (["a", "bb"], ["a", "bb"], ["aaa", "b"], ["cc", "dd"]), strict=True):
        record["choices"] = choices
    found = bias(own)
    assert found is not None and found.labels == ("option 1", "option 2")
    assert found.given == (100, 0) and found.shortest == (75, 75)
    right = bias(own[2:])
    assert right is not None and right.shortest == (100, 50)


def test_nothing_is_said_of_items_with_different_numbers_of_choices_or_none() -> None:
    assert bias([]) is None and bias([{"template": "t", "choices": None, "scores": None, "gold_index": None}]) is None
    assert bias(records([[0.0, -1.0], [0.0, -1.0, -2.0]], [0, 1], choices=("a", "b", "c"))) is None
    assert bias(records([[0.0, -1.0]], [0]) + records([[0.0, -1.0, -1.0]], [0], "u", ("a", "b", "c"))) is None


def test_templates_count_alike_and_show_their_words_for_a_label() -> None:
    mixed = records([[0.0, -1.0]] * 2, [0, 0]) + records([[-1.0, 0.0]] * 8, [0] * 8, "u", ("True", "no"))
    found = bias(mixed)
    assert found is not None and found.labels == ("Yes / True", "no") and found.given == (50, 50) and found.accuracy == 50


@given(st.lists(st.tuples(st.integers(-5, 5), st.integers(0, 1)), min_size=2, max_size=40))
def test_separation_is_the_share_of_pairs_in_order(items: list[tuple[int, int]]) -> None:
    found = bias(records([[0.0, float(score)] for score, _ in items], [label for _, label in items]))
    pairs = [(a, b) for a, x in items if x == 0 for b, y in items if y == 1]
    assert found is not None
    if not pairs:
        assert found.separation is None
    else:
        theirs = sum(1.0 if b > a else 0.5 if a == b else 0.0 for a, b in pairs) / len(pairs)
        assert found.separation is not None and math.isclose(found.separation, 100 * theirs, abs_tol=1e-9)


def test_shares_add_up() -> None:
    found = bias(records([[0.0, -1.0], [0.0, 1.0], [2.0, 1.0]], [0, 1, 1]))
    assert found is not None and sum(found.given) == pytest.approx(100) and sum(found.gold) == pytest.approx(100)
