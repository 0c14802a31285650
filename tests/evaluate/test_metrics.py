"""Measures: SQuAD v1's and MLQA's by hand-worked values and a second reading of their rules, the others against their packages."""

import itertools
import string
import sys
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtllama.errors import UserError
from mtllama.evaluate import metrics
from mtllama.evaluate.metrics import METRICS, MLQA_LANGUAGES, Answer
from mtllama.tasks.catalog import catalog, load_rows

# The rules of the two official scripts, read a second time and written without regular expressions.

ARTICLES = {
    None: "a an the",
    "en": "a an the",
    "de": "ein eine einen einem eines einer der die das den dem des",
    "es": "un una unos unas el la los las",
    "vi": "của là cái chiếc những",
    "ar": "",
    "hi": "",
    "zh": "",
}
LANGUAGES = tuple(ARTICLES)


def is_punctuation(char: str, language: str | None) -> bool:
    return char in string.punctuation or (language is not None and unicodedata.category(char)[0] == "P")


def their_words(text: str, language: str | None) -> list[str]:
    kept = [char for char in text.lower() if not is_punctuation(char, language)]
    runs = ("".join(run) for _, run in itertools.groupby(kept, key=lambda char: char.isalnum() or char == "_"))
    text = "".join(" " if run in ARTICLES[language].split() else run for run in runs)
    if language == "ar":
        text = " ".join(text.split("ال"))
    if language == "zh":
        text = "".join(f" {char} " if 0x4E00 <= ord(char) <= 0x9FA5 else char for char in text)
    return text.split()


def their_f1(prediction: str, references: Sequence[str], language: str | None) -> float:
    best = 0.0
    for reference in references:
        words, left = their_words(prediction, language), their_words(reference, language)
        lengths, same = len(words) + len(left), 0
        for word in words:
            if word in left:
                left.remove(word)
                same += 1
        best = max(best, 2 * same / lengths if same else 0.0)
    return best


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Cat's whiskers!", "cats whiskers"),
        ("a, an; the.", ""),
        ("U.S. 1,000", "us 1000"),
        ("theatre another", "theatre another"),
        ("the «Louvre» – Paris", "«louvre» – paris"),
    ],
)
def test_normalisation_drops_case_punctuation_articles_and_blanks(text: str, normal: str) -> None:
    assert metrics.normalize(text) == normal


@pytest.mark.parametrize(
    ("language", "text", "normal"),
    [
        ("en", "The «Louvre» – a museum", "louvre museum"),
        ("de", "Der Kölner Dom, die Stadt; denen", "kölner dom stadt denen"),
        ("es", "¿La Sagrada Família? ¡El templo!", "sagrada família templo"),
        ("ar", "الكتاب في القاهرة، 1990؟", "كتاب في قاهرة 1990"),
        ("ar", "سأل الرجل", "سأل رجل"),
        ("ar", "مثال", "مث"),
        ("hi", "नई दिल्ली। (राजधानी)", "नई दिल्ली राजधानी"),
        ("vi", "những ngôi nhà của Lan", "ngôi nhà lan"),
        ("zh", "北京,中国 IBM公司在2008年。", "北 京 中 国 ibm 公 司 在 2008 年"),
        ("zh", "the 308", "the 308"),
        ("zh", "一\u9fa5\u9fa6", "一 \u9fa5 \u9fa6"),
        ("de", "the A", "the a"),
        ("en", "5% + $3", "5 3"),
    ],
)
def test_mlqas_normalisation_is_of_the_language(language: str, text: str, normal: str) -> None:
    assert metrics.normalize(text, language) == normal


def test_mlqas_punctuation_is_unicodes_and_ascii_and_nothing_else() -> None:
    chars = {chr(code) for code in range(sys.maxunicode + 1) if code % 97 == 0 or unicodedata.category(chr(code))[0] in "PSZ"}
    dropped = {char for char in chars if metrics.normalize(f"x{char}x", "hi") == "xx"}
    assert dropped >= set(string.punctuation)
    assert {unicodedata.category(char)[0] for char in dropped - set(string.punctuation)} == {"P"}
    assert not [char for char in chars - dropped if unicodedata.category(char)[0] == "P"]
    assert len(dropped) > 800


@pytest.mark.parametrize(
    ("prediction", "references", "f1", "em"),
    [
        ("the Eiffel Tower", ["Eiffel tower"], 1.0, 1.0),
        ("Eiffel Tower in Paris", ["the Eiffel Tower"], 2 * (2 / 4) * 1 / (2 / 4 + 1), 0.0),
        ("in 1990", ["1989", "1990"], 2 * 0.5 * 1 / 1.5, 0.0),
        ("no idea", ["1989"], 0.0, 0.0),
        ("", ["1989"], 0.0, 0.0),
        ("cat cat dog", ["cat dog dog"], 2 / 3, 0.0),
        ("the", ["a"], 0.0, 1.0),  # nothing is left of either: equal, and without a word in common
        ("one", [], 0.0, 0.0),
    ],
)
def test_f1_and_exact_match_take_the_best_reference(prediction: str, references: list[str], f1: float, em: float) -> None:
    assert metrics.f1(prediction, references) == pytest.approx(f1)
    assert metrics.exact_match(prediction, references) == em
    answers = [Answer(prediction, tuple(references))]
    assert METRICS["f1"].value(answers) == pytest.approx(f1) and METRICS["em"].value(answers) == em


@pytest.mark.parametrize(
    ("language", "prediction", "reference", "f1", "em"),
    [
        ("zh", "北京市", "北京", 0.8, 0.0),
        ("zh", "北 京。", "北京", 1.0, 1.0),
        ("de", "dem Rhein", "der Rhein", 1.0, 1.0),
        ("es", "las islas", "una isla", 0.0, 0.0),
        ("ar", "القاهرة", "قاهرة", 1.0, 1.0),
        ("vi", "cái nhà", "nhà", 1.0, 1.0),
    ],
)
def test_mlqas_measures_by_hand(language: str, prediction: str, reference: str, f1: float, em: float) -> None:
    answers = [Answer(prediction, (reference,))]
    assert METRICS[f"mlqa-f1-{language}"].value(answers) == pytest.approx(f1)
    assert METRICS[f"mlqa-em-{language}"].value(answers) == em


WORDS = st.lists(
    st.sampled_from(
        [
            *" ".join(ARTICLES.values()).split(),
            *["Paris", "paris,", "1990", "1990.", "(x)", "«x»", "an_", "theatre", "the-end", ".", "ال", "القلم", "北", "北京市", "नई।"],
            "\u3000",
            " ",
        ]
    )
    | st.text(max_size=4),
    max_size=7,
).map(" ".join)


@settings(max_examples=300)
@given(WORDS, st.lists(WORDS, min_size=1, max_size=3), st.sampled_from(LANGUAGES))
def test_f1_and_exact_match_are_those_of_a_second_reading_of_the_official_rules(
    prediction: str, references: list[str], language: str | None
) -> None:
    assert metrics.normalize(prediction, language).split() == their_words(prediction, language)
    assert metrics.f1(prediction, references, language) == pytest.approx(their_f1(prediction, references, language), abs=1e-12)
    same = any(their_words(prediction, language) == their_words(reference, language) for reference in references)
    assert metrics.exact_match(prediction, references, language) == same


OFFICIAL = {
    ("squad", None): (21.425, 76.33322892950484),
    ("squad", "en"): (21.5, 76.40156226283817),
    ("xquad-es", "es"): (22.18487394957983, 79.4767545745797),
    ("xquad-de", "de"): (18.319327731092436, 75.67813395598813),
    ("xquad-ar", "ar"): (15.882352941176471, 77.68414676744852),
    ("xquad-zh", "zh"): (14.621848739495798, 72.60519185911333),
}
"""Exact match and F1 that the official scripts' functions give the answers below: SQuAD v1's, and MLQA's in a language."""


@pytest.mark.parametrize(("name", "language"), OFFICIAL)
def test_the_numbers_of_a_set_are_the_official_scripts(shared_data: Path, name: str, language: str | None) -> None:
    rows = load_rows(catalog()[name], shared_data / "eval").rows
    answers = []
    for index, row in enumerate(rows):  # spans that begin up to eight characters too early and end up to three too late
        start, accepted = row["answers"]["answer_start"][0], row["answers"]["text"]
        span = row["context"][max(0, start - index % 9) : start + len(accepted[0]) + index % 4]
        answers.append(Answer(span, tuple(dict.fromkeys(accepted))))
    prefix, suffix = ("mlqa-", f"-{language}") if language else ("", "")
    ours = [100 * METRICS[f"{prefix}{measure}{suffix}"].value(answers) for measure in ("em", "f1")]
    assert ours == pytest.approx(OFFICIAL[name, language], abs=1e-9)


def test_a_generated_choice_is_parsed_only_if_it_is_one() -> None:
    choices = ["Yes", "Maybe", "No"]
    assert metrics.parse_choice("maybe.", choices) == 1
    assert metrics.parse_choice("Yes, I think so", choices) is None
    assert metrics.parse_choice("", choices) is None


# Choices


def choice(chosen: int | None, gold: int) -> Answer:
    return Answer("", ("",), chosen, gold)


def test_accuracy_is_of_the_choice_where_there_are_choices_and_of_the_text_elsewhere() -> None:
    accuracy = METRICS["accuracy"]
    assert accuracy.value([choice(1, 1), choice(0, 1), choice(None, 0), choice(0, 0)]) == 0.5
    assert accuracy.value([Answer("The cat.", ("cat",)), Answer("dog", ("cat",))]) == 0.5


def test_macro_f1_by_hand() -> None:
    # class 0: 2 hits, 1 miss -> 4/5; class 1: 1 hit, 1 false alarm, 1 miss -> 1/2; class 2 is only ever answered -> 0
    answers = [choice(0, 0), choice(0, 0), choice(1, 0), choice(1, 1), choice(2, 1)]
    assert METRICS["macro-f1"].value(answers) == pytest.approx((4 / 5 + 1 / 2 + 0) / 3)
    # what is no choice at all is a miss, and no class of its own
    assert METRICS["macro-f1"].value([choice(0, 0), choice(None, 0), choice(1, 1)]) == pytest.approx((2 / 3 + 1) / 2)
    # a class that nobody names does not count
    assert METRICS["macro-f1"].value([choice(2, 2), choice(0, 0)]) == 1.0


def test_macro_f1_of_a_prompt_without_choices_is_an_error() -> None:
    with pytest.raises(UserError, match="macro-f1 is of choices"):
        METRICS["macro-f1"].value([Answer("x", ("x",))])


def their_macro_f1(answers: Sequence[Answer]) -> float:
    """Mean over the classes that occur of the harmonic mean of precision and recall."""
    scores = []
    for each in {index for answer in answers for index in (answer.chosen, answer.gold)} - {None}:
        named, right = [a for a in answers if a.chosen == each], [a for a in answers if a.gold == each]
        hits = len([a for a in named if a.gold == each])
        precision, recall = hits / len(named) if named else 0.0, hits / len(right) if right else 0.0
        scores.append(2 * precision * recall / (precision + recall) if hits else 0.0)
    return sum(scores) / len(scores)


CHOICES = st.builds(choice, st.none() | st.integers(0, 3), st.integers(0, 3))


@given(st.lists(CHOICES, min_size=1, max_size=30))
def test_macro_f1_is_that_of_a_second_reading(answers: list[Answer]) -> None:
    assert METRICS["macro-f1"].value(answers) == pytest.approx(their_macro_f1(answers))


# Texts

TEXTS = st.lists(st.sampled_from(["the", "cat", "dog", "sat", "on", "a", "mat", ",", ".", "Mat", "3.5", "isn't", "北京"]), max_size=9).map(
    " ".join
)
PAIRS = st.lists(st.builds(Answer, TEXTS, st.lists(TEXTS, min_size=1, max_size=3).map(tuple)), min_size=1, max_size=8)


@settings(max_examples=60)
@given(PAIRS)
def test_bleu_is_sacrebleus_corpus_bleu(answers: list[Answer]) -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    streams = itertools.zip_longest(*(answer.references for answer in answers))
    theirs = sacrebleu.corpus_bleu([answer.text for answer in answers], [list(stream) for stream in streams])
    assert METRICS["bleu"].value(answers) == pytest.approx(theirs.score / 100, abs=1e-9)


def test_bleu_by_hand() -> None:
    pytest.importorskip("sacrebleu")
    # 5 words for 6; matches 5/5, 3/4, 2/3, 1/2
    expected = np.exp(1 - 6 / 5) * (1 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25
    assert METRICS["bleu"].value([Answer("the cat sat on mat", ("the cat sat on the mat",))]) == pytest.approx(expected)


@settings(max_examples=60)
@given(PAIRS)
def test_rouge_is_rouge_scores_f_measure_of_the_best_reference(answers: list[Answer]) -> None:
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rouge1", "rouge2", "rougeL"])
    for name in ("rouge1", "rouge2", "rougeL"):
        theirs = [max(scorer.score(reference, a.text)[name].fmeasure for reference in a.references) for a in answers]
        assert METRICS[name].value(answers) == pytest.approx(sum(theirs) / len(theirs))


def test_rouge_by_hand() -> None:
    pytest.importorskip("rouge_score")
    answers = [Answer("the cat sat on the mat", ("the dog sat on a mat", "rain"))]  # 4 of 6 words, 1 of 5 pairs, 4 in order
    assert METRICS["rouge1"].value(answers) == pytest.approx(4 / 6)
    assert METRICS["rouge2"].value(answers) == pytest.approx(1 / 5)
    assert METRICS["rougeL"].value(answers) == pytest.approx(4 / 6)


@pytest.mark.parametrize(("name", "package"), [("bleu", "sacrebleu"), ("rougeL", "rouge-score")])
def test_a_package_that_is_not_installed_is_named(name: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("rouge_score", "rouge_score.rouge_scorer", "sacrebleu", "sacrebleu.metrics", "sacrebleu.metrics.bleu"):
        monkeypatch.setitem(sys.modules, module, None)
    for loader in (metrics._rouge_scorer, metrics._sacrebleu):
        loader.cache_clear()
    with pytest.raises(UserError, match=f"the package {package} is not installed; pip install"):
        METRICS[name].value([Answer("not asked elsewhere", ("reference",))])


# The interface


def answered(name: str) -> list[Answer]:
    if name in ("accuracy", "macro-f1"):
        return [choice(number % 3, number % 4 % 3) for number in range(12)]
    texts = ["the cat sat on the mat", "a dog", "", "the mat sat on the cat", "北京 in 1990"]
    return [Answer(text, (texts[0], texts[number - 1])) for number, text in enumerate(texts)]


@pytest.mark.parametrize("name", [name for name, metric in METRICS.items() if metric.over_set])
def test_a_resampled_set_has_the_value_of_the_set_written_out(name: str) -> None:
    answers, rng, over_set = answered(name), np.random.default_rng(0), METRICS[name].over_set
    assert over_set is not None
    weights = np.stack([np.bincount(rng.integers(0, len(answers), len(answers)), minlength=len(answers)) for _ in range(20)])
    written_out = [METRICS[name].value([a for a, times in zip(answers, row, strict=True) for _ in range(times)]) for row in weights]
    assert over_set.resampled(over_set.counts(answers), weights.astype(float)) == pytest.approx(written_out)
    assert len(set(written_out)) > 3 and 0 <= min(written_out) < max(written_out) <= 1


def test_every_metric_is_of_an_item_or_of_a_set_and_a_mean_is_the_mean_of_its_items() -> None:
    for name, metric in METRICS.items():
        assert metric.name == name
        assert (metric.per_item is None) != (metric.over_set is None)
        if metric.per_item is not None:
            values = [metric.per_item(answer) for answer in answered(name)]
            assert metric.value(answered(name)) == pytest.approx(sum(values) / len(values))
        else:
            assert metric.over_set is not None
            assert metric.value(answered(name)) == pytest.approx(metric.over_set(answered(name)))
    assert len(METRICS) == 8 + 2 * len(MLQA_LANGUAGES)


def test_an_items_values_are_those_of_the_metrics_that_an_item_has() -> None:
    answer = Answer("the cat", ("a cat", "dog"))
    assert metrics.item_values(("f1", "em", "bleu"), answer) == {"f1": 1.0, "em": 1.0}
    assert list(metrics.item_values(("em", "f1"), answer)) == ["em", "f1"]
    assert metrics.item_values(("accuracy", "macro-f1"), choice(1, 0)) == {"accuracy": 0.0}


def test_every_metric_of_the_catalogue_is_there() -> None:
    named = Counter(name for task in catalog().values() for name in task.metrics)
    assert set(named) == set(METRICS)
