"""Protocols as functions of a record, and every branch of MT-LLaMA's own rule."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtllama.evaluate import original, protocols
from mtllama.evaluate.protocols import judge

CHOICES = ["no", "yes, of course", "café"]


def scored(*logprobs: list[float], unconditional: list[list[float]] | None = None, **more: Any) -> dict[str, Any]:
    choices = CHOICES[: len(logprobs)]
    record = {
        "task": "cb",
        "template": "x",
        "kind": "score",
        "metrics": ["accuracy"],
        "choices": choices,
        "gold_index": 0,
        "gold": choices[0],
    }
    return record | {"logprobs": list(logprobs), "unconditional": unconditional, "references": [choices[0]]} | more


def said(text: str, task: str = "sst2", choices: tuple[str, ...] | None = ("No", "Yes"), **more: Any) -> dict[str, Any]:
    record = {"task": task, "template": "mt-llama", "kind": "generate", "metrics": ["accuracy"] if choices else ["f1", "em"], "text": text}
    return record | {"choices": list(choices) if choices else None, "gold_index": 0, "references": ["the Nile", "Nile"]} | more


def chosen(text: str, task: str, choices: tuple[str, ...], protocol: str = "mt-llama", **more: Any) -> tuple[int | None, bool]:
    judged = judge(said(text, task, choices, **more), protocol)
    return judged.predicted, judged.not_found


def test_each_way_to_rank_can_choose_another_answer() -> None:
    # Sums -4, -6, -5; 2, 4, 1 tokens; 2, 14, 4 characters; 2, 14, 5 bytes.
    record = scored([-2.0, -2.0], [-1.5, -1.5, -1.5, -1.5], [-5.0], unconditional=[[-1.0, -1.0], [-2.0] * 4, [-9.0]])
    by_hand = {
        "rank": [-4, -6, -5],
        "rank-mean": [-2, -1.5, -5],
        "rank-char": [-4 / 2, -6 / 14, -5 / 4],
        "rank-byte": [-4 / 2, -6 / 14, -5 / 5],
        "rank-pmi": [-4 + 2, -6 + 8, -5 + 9],
    }
    assert set(by_hand) == set(protocols.RANKS)
    for protocol, scores in by_hand.items():
        judged = judge(record, protocol)
        assert judged.scores == pytest.approx(scores)
        assert judged.predicted == max(range(3), key=lambda i: scores[i]) and judged.prediction == CHOICES[judged.predicted]
    assert [judge(record, protocol).predicted for protocol in by_hand] == [0, 1, 1, 1, 2]


def test_the_first_of_equals_wins_and_choices_that_read_the_same_are_both_right() -> None:
    assert judge(scored([-3.0], [-3.0]), "rank").predicted == 0
    twins = scored([-3.0], [-2.0]) | {"choices": ["no", "no"]}
    assert judge(twins, "rank").predicted == 1 and judge(twins, "rank").correct


def test_a_choice_of_no_text_is_judged_by_its_end_marker() -> None:
    record = scored([-3.0], [-4.0]) | {"choices": ["", "a"]}
    for protocol in ("rank", "rank-mean", "rank-char", "rank-byte"):
        assert judge(record, protocol).scores == (-3.0, -4.0)


@given(st.lists(st.lists(st.floats(-50, 0), min_size=1, max_size=4), min_size=2, max_size=3), st.floats(-30, 0))
def test_ranking_does_not_change_when_all_choices_lose_the_same(logprobs: list[list[float]], loss: float) -> None:
    before = judge(scored(*logprobs, unconditional=logprobs), "rank")
    after = judge(scored(*([*tokens[:-1], tokens[-1] + loss] for tokens in logprobs)), "rank")
    assert before.scores is not None and after.scores is not None
    assert after.scores == pytest.approx([score + loss for score in before.scores])
    assert judge(scored(*logprobs, unconditional=logprobs), "rank-pmi").scores == (0.0,) * len(logprobs)


def test_generation_wants_a_choice_word_for_word_after_normalisation() -> None:
    assert judge(said(" The YES."), "generate").predicted == 1
    for text in ("yes it is", "", "maybe"):
        judged = judge(said(text), "generate")
        assert judged.predicted is None and judged.unparsed and not judged.correct


def test_free_answers_are_judged_by_all_references() -> None:
    judged = judge(said("river Nile", "squad", None), "generate")
    assert judged.values == {"f1": pytest.approx(2 / 3), "em": 0.0} and not judged.correct
    assert judge(said("nile", "squad", None), "generate").correct
    assert judge(said("", "squad", None), "generate").unparsed


def test_the_originals_rule_takes_a_text_with_none_in_it_for_no_answer() -> None:
    judged = judge(said("None of the Nile", "squad", None), "mt-llama")
    assert (judged.prediction, judged.not_found, judged.values["f1"]) == ("", True, 0.0)
    assert judge(said("none but the Nile", "squad", None), "mt-llama").values["f1"] > 0


def test_the_originals_rule_compares_options_by_quick_ratio_the_first_of_equals() -> None:
    options = ("The cup broke", "The cup was full")
    for task in ("copa", "winogrande", "xcopa-it", "xstorycloze-en", "xwinograd-fr"):
        assert chosen("the cup was full of tea", task, options) == (1, False)
        assert chosen("", task, options) == (0, False)
        # quick_ratio knows letters, not their order: an anagram is as near as the option itself
        assert chosen("llufsawpuceht", task, ("abc", "the cup was full")) == (1, False)


@pytest.mark.parametrize(
    ("task", "choices", "verdicts"),
    [
        # Digits with a dot first, then letters: nearly every sentence has an a.
        ("openbookqa", ("w", "x", "y", "z"), {"1. 4.": 0, "it is 3.": 2, "4.": 3, "seeds": 3, "banana": 0, "club": 1, "cold": 2, "(D)": 3}),
        ("wic", ("No", "Yes"), {"No": 0, "yes": 1, "Yes, I know": 0}),
        ("pawsx-de", ("No", "Yes"), {"yes": 1, "nothing": 0}),
        ("rte", ("Yes", "no"), {"no": 1, "No. Yes": 0}),
        ("sst2", ("No", "Yes"), {"1": 0, "2 stars": 0, "4": 1, "5": 1, "yes, 2": 0, "★★★★": 0, "no": 0, "Yes": 1, "no yes": 0}),
        ("marc-en", ("No", "Yes"), {"5": 1, "definitely no": 0, "YES": 1}),
    ],
)
def test_the_originals_rule_takes_the_first_key_in_its_dictionarys_order(
    task: str, choices: tuple[str, ...], verdicts: dict[str, int]
) -> None:
    for text, place in verdicts.items():
        assert chosen(text, task, choices) == (place, False), text


@pytest.mark.parametrize("task", sorted(original.KEYS))
def test_where_the_originals_rule_finds_nothing_it_falls_through_to_its_class_0_and_says_so(task: str) -> None:
    choices = {"openbookqa": ("w", "x", "y", "z"), "mnli": ("Yes", "Maybe", "No"), "xnli": ("Yes", "Maybe", "No")}.get(task, ("No", "Yes"))
    assert chosen("Ü", task, choices) == (1 if task == "xnli" else 0, True)
    assert chosen("", task, choices)[1]


def test_five_stars_are_read_by_a_dictionary_of_their_own() -> None:
    five = ("Not at all", "No", "Maybe", "Yes", "Definitely")
    told = {"3": 2, "★★★★★": 0, "Not at all": 0, "no": 1, "maybe": 2, "yes": 3, "definitely": 4, "nothing": 1}
    for text, place in told.items():
        assert chosen(text, "marc-en", five, template="mt-llama-5") == (place, False), text


def test_mnlis_two_maps_read_the_same_text_differently() -> None:
    choices = ("Yes", "Maybe", "No")
    told = {"maybe": (0, 1), "yes": (1, 0), "no": (2, 2), "a": (0, 1), "b": (1, 0), "c": (2, 2), "true": (1, 0), "yes or maybe": (0, 1)}
    for text, (as_it_stands, mended) in told.items():
        assert chosen(text, "mnli", choices) == (as_it_stands, False), text
        assert chosen(text, "mnli", choices, "mt-llama-glue") == (mended, False), text
        assert chosen(text, "xnli-fr", choices) == (mended, False), text
    # the keys behind the letters are never reached where a letter of theirs is a key before them
    assert chosen("inconclusive", "mnli", choices) == (2, False) and chosen("false", "mnli", choices) == (0, False)
    assert chosen("Ü", "mnli", choices, "mt-llama-glue") == (1, True)


def test_the_originals_rule_is_for_its_own_sets_and_prompts_only() -> None:
    def applying(task: str, template: str, *, choices: bool = True) -> set[str]:
        return {name for name in protocols.PROTOCOLS if protocols.applies(name, task, template, choices=choices)}

    ranks = set(protocols.RANKS)
    assert applying("rte", "mt-llama") == {*ranks, "generate", "mt-llama"}
    assert applying("mnli", "mt-llama") == {*ranks, "generate", "mt-llama", "mt-llama-glue"}
    assert applying("rte", "GPT-3 style") == applying("cb", "ours_labelled") == {*ranks, "generate"}
    assert applying("squad", "mt-llama", choices=False) == {"generate", "mt-llama"}
    assert applying("cb", "mt-llama") == {*ranks, "generate"}


def test_primary_and_all_are_spelt_out() -> None:
    assert protocols.resolve(("primary", "rank"), choices=True) == ("rank",)
    assert protocols.resolve(("primary",), choices=False) == ("generate",)
    assert protocols.resolve(("rank-pmi", "all"), choices=True)[0] == "rank-pmi" and len(protocols.resolve(("all",), choices=True)) == 8


def test_a_record_without_unconditional_scores_has_no_pmi() -> None:
    assert protocols.of_record(scored([-1.0])) == ("rank", "rank-mean", "rank-char", "rank-byte")
    assert protocols.of_record(scored([-1.0], unconditional=[[-1.0]])) == protocols.RANKS
