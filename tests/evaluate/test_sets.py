"""Metrics of whole sets against computations that write every set out."""

import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from mtllama.evaluate import sets
from mtllama.evaluate.metrics import Answer
from mtllama.evaluate.sets import Answers, set_difference, set_metrics, set_values

WORDS = ["the", "cat", "dog", "sat", "on", "a", "mat", "under", "some", "big", "red", "tree", "and", "saw", "what", "was", "there"]


def choices(seed: int, skill: float, num: int = 60) -> dict[int, Answer]:
    """Answers of a model that is right with this chance, to the same questions whatever the seed; some are no choice at all."""
    rng = np.random.default_rng(seed)
    golds = [0, 0, 0, 1, 1, 2] * num
    picks = [golds[i] if rng.random() < skill else [0, 1, 2, None][rng.integers(4)] for i in range(num)]
    return {i: Answer("", ("",), picks[i], golds[i]) for i in range(num)}


def texts(seed: int, skill: float, num: int = 60) -> dict[int, Answer]:
    """Sentences of which this share of words is right."""
    rng, words = np.random.default_rng(seed), np.random.default_rng(0)
    references = [list(words.choice(WORDS, words.integers(5, 14))) for _ in range(num)]
    said = [[word if rng.random() < skill else str(rng.choice(WORDS)) for word in reference] for reference in references]
    return {i: Answer(" ".join(said[i]), (" ".join(references[i]),)) for i in range(num)}


def their_macro_f1(answers: Sequence[Answer]) -> float:
    scores = []
    for each in {index for answer in answers for index in (answer.chosen, answer.gold)} - {None}:
        hits = sum(answer.chosen == answer.gold == each for answer in answers)
        scores.append(2 * hits / sum((answer.chosen == each) + (answer.gold == each) for answer in answers))
    return 100 * sum(scores) / len(scores)


@functools.cache
def ngrams(text: str, order: int) -> Counter[tuple[str, ...]]:
    words = text.split()
    return Counter(tuple(words[i : i + order]) for i in range(len(words) - order + 1))


@functools.cache
def overlap(answer: Answer, order: int) -> tuple[int, int]:
    said = ngrams(answer.text, order)
    return (said & ngrams(answer.references[0], order)).total(), said.total()


def their_bleu(answers: Sequence[Answer]) -> float:
    pytest.importorskip("sacrebleu")
    precisions, halved = [], 1.0
    for order in (1, 2, 3, 4):
        matches, total = map(sum, zip(*(overlap(answer, order) for answer in answers), strict=True))
        halved /= 2 if matches == 0 else 1
        precisions.append((matches or halved) / total)
    said, wanted = (sum(len(text.split()) for text in side) for side in zip(*((a.text, a.references[0]) for a in answers), strict=True))
    return 100 * min(1.0, math.exp(1 - wanted / said)) * math.prod(precisions) ** 0.25


KINDS: dict[str, tuple[Callable[..., dict[int, Answer]], Callable[[Sequence[Answer]], float]]] = {
    "macro-f1": (choices, their_macro_f1),
    "bleu": (texts, their_bleu),
}


def their_value(name: str, answers: Answers, items: Sequence[int]) -> float:
    """The mean over the templates that ask about any of the items, each item as often as it is there."""
    groups = [[group[item] for item in items if item in group] for group in answers.values()]
    return float(np.mean([KINDS[name][1](group) for group in groups if group]))


def three_templates(make: Callable[..., dict[int, Answer]], seed: int, skill: float) -> dict[str, dict[int, Answer]]:
    """The second asks about every fourth item only, the third about two, which many a drawn set has neither of."""
    return {
        "all": make(seed, skill),
        "some": {i: answer for i, answer in make(seed + 1, skill - 0.2).items() if i % 4 == 1},
        "few": {i: answer for i, answer in make(seed + 2, skill).items() if i in (8, 33)},
    }


def drawn(num: int = 1500) -> np.ndarray:
    """Bootstrap samples of 60 items, drawn by another generator than ours."""
    return np.random.default_rng(77).integers(0, 60, (num, 60))


@pytest.mark.parametrize("name", KINDS)
def test_an_interval_is_that_of_sets_drawn_and_written_out(name: str) -> None:
    answers = three_templates(KINDS[name][0], 1, 0.7)
    found = set_values([name], answers)[name]
    theirs = [their_value(name, answers, items) for items in drawn()]
    assert found.overall.value == pytest.approx(their_value(name, answers, range(60)))
    low, high = np.quantile(theirs, (0.025, 0.975))
    assert high - low > 5, "an interval of a point would be met by any number"
    assert found.overall.ci95 == pytest.approx((low, high), abs=0.12 * (high - low))
    for template, group in answers.items():
        places = sorted(group)
        alone = [KINDS[name][1]([group[places[i % len(places)]] for i in items[: len(places)]]) for items in drawn()]
        low, high = np.quantile(alone, (0.025, 0.975))
        assert found.templates[template].value == pytest.approx(KINDS[name][1](list(group.values())))
        assert found.templates[template].ci95 == pytest.approx((low, high), abs=0.12 * (high - low))


@pytest.mark.parametrize("name", KINDS)
def test_a_difference_is_paired(name: str) -> None:
    make = KINDS[name][0]
    base = three_templates(make, 1, 0.7)
    # The second model answers as the first one does, but for every sixth item.
    other = three_templates(make, 5, 0.95)
    tuned = {template: {i: other[template][i] if i % 6 == 1 else answer for i, answer in group.items()} for template, group in base.items()}
    found = set_difference("train", "task", "rank", name, base, tuned)
    theirs = [their_value(name, tuned, items) - their_value(name, base, items) for items in drawn()]
    low, high = np.quantile(theirs, (0.025, 0.975))
    assert found.difference == found.tuned - found.base == pytest.approx(their_value(name, tuned, range(60)) - found.base)
    assert found.base == set_values([name], base)[name].overall.value and found.num_items == 60
    assert found.ci95 == pytest.approx((low, high), abs=0.12 * (high - low))
    unpaired = [their_value(name, tuned, first) - their_value(name, base, second) for first, second in itertools.pairwise(drawn(400))]
    assert high - low < 0.8 * np.subtract(*np.quantile(unpaired, (0.975, 0.025))), "the wrong way would have been told apart"


@pytest.mark.parametrize("name", KINDS)
def test_p_is_the_share_of_all_swaps_that_differ_as_much(name: str) -> None:
    make = KINDS[name][0]
    ps = []
    for skill in (0.5, 0.8, 1.0):
        base, tuned = ({"one": make(seed, s, 8), "two": make(seed + 1, s, 8)} for seed, s in ((1, 0.5), (3, skill)))
        observed = abs(their_value(name, tuned, range(8)) - their_value(name, base, range(8)))
        extreme = 0
        for swapped in itertools.product((False, True), repeat=8):  # an item's answers through both templates go together
            first, second = (
                {template: {i: (other if swapped[i] else mine)[template][i] for i in range(8)} for template in mine}
                for mine, other in ((base, tuned), (tuned, base))
            )
            extreme += abs(their_value(name, second, range(8)) - their_value(name, first, range(8))) >= observed - 1e-9
        ps.append(extreme / 2**8)
        assert set_difference("train", "task", "rank", name, base, tuned).p == pytest.approx(ps[-1], abs=0.05)
    assert min(ps) < 0.1 and max(ps) > 0.3, "a p that is always the same would pass as well"


@pytest.mark.parametrize("name", KINDS)
def test_templates_that_repeat_the_answers_change_neither_interval_nor_p(name: str) -> None:
    make = KINDS[name][0]
    base, tuned = make(1, 0.6), make(2, 0.75)
    once = set_difference("train", "task", "rank", name, {"0": base}, {"0": tuned})
    many = set_difference("train", "task", "rank", name, {str(t): base for t in range(6)}, {str(t): tuned for t in range(6)})
    assert (many.ci95, many.difference, many.p) == (pytest.approx(once.ci95), pytest.approx(once.difference), once.p)
    assert once.ci95[1] - once.ci95[0] > 5
    several = set_values([name], {str(t): base for t in range(6)})[name]
    assert several.overall.ci95 == pytest.approx(several.templates["0"].ci95)


def test_the_order_of_the_second_models_items_and_templates_does_not_matter() -> None:
    base, tuned = three_templates(choices, 1, 0.5), three_templates(choices, 3, 0.8)
    turned = {template: dict(reversed(tuned[template].items())) for template in reversed(tuned)}
    found = set_difference("train", "task", "rank", "macro-f1", base, tuned)
    assert found == set_difference("train", "task", "rank", "macro-f1", base, turned)
    assert found.p < 0.9 and found.difference > 0


def test_models_that_answer_alike_do_not_differ() -> None:
    answers = three_templates(choices, 1, 0.5)
    found = set_difference("train", "task", "rank", "macro-f1", answers, answers)
    assert (found.difference, found.ci95, found.p) == (0, (0, 0), 1)


def test_macro_f1_is_of_the_templates_with_choices_and_bleu_of_all() -> None:
    text = {i: Answer("the cat sat on", ("the cat sat on",)) for i in range(3)}
    assert set_metrics(["accuracy", "macro-f1", "bleu"], {"text": text}) == ["bleu"]
    assert set_metrics(["accuracy", "macro-f1"], {"choices": choices(1, 0.5)}) == ["macro-f1"]
    mixed = {"text": text, "choices": choices(1, 0.5)}
    found = set_values(["accuracy", "macro-f1"], mixed)
    assert list(found) == ["macro-f1"] and list(found["macro-f1"].templates) == ["choices"]
    assert found == set_values(["macro-f1"], {"choices": choices(1, 0.5)})
    assert set_values(["accuracy", "f1"], mixed) == {}


def test_of_each_answer_it_is_counted_once_however_many_sets_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = []
    metric = sets.METRICS["macro-f1"]
    assert metric.over_set is not None
    count = metric.over_set.counts
    slow = type(metric.over_set)(lambda answers: counted.extend(answers) or count(answers), metric.over_set.value, of_choices=True)
    monkeypatch.setitem(sets.METRICS, "macro-f1", type(metric)("macro-f1", over_set=slow))
    base, tuned = three_templates(choices, 1, 0.5), three_templates(choices, 3, 0.8)
    set_values(["macro-f1"], base)
    assert len(counted) == 60 + 15 + 2
    set_difference("train", "task", "rank", "macro-f1", base, tuned)
    assert len(counted) == 3 * (60 + 15 + 2)
