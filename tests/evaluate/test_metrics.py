"""SQuAD v1's measures, by hand-worked values."""

import pytest

from mtllama.evaluate import metrics


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Cat's whiskers!", "cats whiskers"),
        ("a, an; the.", ""),
        ("U.S. 1,000", "us 1000"),
        ("theatre another", "theatre another"),
    ],
)
def test_normalisation_drops_case_punctuation_articles_and_blanks(text: str, normal: str) -> None:
    assert metrics.normalize(text) == normal


@pytest.mark.parametrize(
    ("prediction", "references", "f1", "em"),
    [
        ("the Eiffel Tower", ["Eiffel tower"], 1.0, 1.0),
        ("Eiffel Tower in Paris", ["the Eiffel Tower"], 2 * (2 / 4) * 1 / (2 / 4 + 1), 0.0),
        ("in 1990", ["1989", "1990"], 2 * 0.5 * 1 / 1.5, 0.0),
        ("no idea", ["1989"], 0.0, 0.0),
        ("", ["1989"], 0.0, 0.0),
        ("cat cat dog", ["cat dog dog"], 2 / 3, 0.0),
    ],
)
def test_f1_and_exact_match_take_the_best_reference(prediction: str, references: list[str], f1: float, em: float) -> None:
    assert metrics.f1(prediction, references) == pytest.approx(f1)
    assert metrics.exact_match(prediction, references) == em


def test_a_generated_choice_is_parsed_only_if_it_is_one() -> None:
    choices = ["Yes", "Maybe", "No"]
    assert metrics.parse_choice("maybe.", choices) == 1
    assert metrics.parse_choice("Yes, I think so", choices) is None
    assert metrics.parse_choice("", choices) is None
