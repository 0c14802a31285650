"""How an answer is judged. Values are shares from 0 to 1; results show them in percent.

Most metrics judge an item by itself, and the value of a set is the mean (`Metric.per_item`). Macro-F1 and BLEU are of a
set only (`Metric.over_set`). `METRICS` has them all by the names that the catalogue uses:

- `accuracy`, `macro-f1`: of the choice that was made; macro-F1 is the mean over the classes that occur as label or as answer.
- `f1`, `em`: SQuAD v1's (Rajpurkar et al. 2016), which XQuAD and TyDiQA-GoldP use, too.
- `mlqa-f1-<language>`, `mlqa-em-<language>`: MLQA's (Lewis et al. 2020); the language is the context's, so the answer's.
- `rouge1`, `rouge2`, `rougeL`: F-measures of `rouge-score` without its stemmer, the best reference's. Its tokens are runs of
  a-z and 0-9: it says nothing of text in another script.
- `bleu`: corpus BLEU of `sacrebleu` with its defaults (mixed case, 13a tokens, exponential smoothing).
"""

import functools
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mtllama.errors import UserError

Counts = NDArray[np.float64]


@dataclass(frozen=True)
class Answer:
    """One answer, and what it is judged by."""

    text: str
    references: tuple[str, ...]
    chosen: int | None = None
    """The choice that it is, where there are choices and it is one of them."""
    gold: int | None = None
    """The right choice, where there are choices."""


@dataclass(frozen=True)
class OverSet:
    """A metric that no item has by itself: a function of counts that are added up over the items."""

    counts: Callable[[Sequence[Answer]], Counts]
    """What each answer counts for: (answers, counts)."""
    value: Callable[[Counts], float]
    """The metric of a set's added counts: (counts,) -> a share."""
    of_choices: bool = False
    """Says nothing of answers to a prompt without choices."""

    def __call__(self, answers: Sequence[Answer]) -> float:
        """The metric of a set of answers."""
        return self.value(self.counts(answers).sum(axis=0))

    def resampled(self, counts: Counts, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """The metric of many sets made of the same answers: of set b, which has answer i `weights[b, i]` times.

        counts: (answers, counts), what `counts` gave for the answers: of an answer it is counted once, so that a bootstrap
        sample of BLEU costs a sum. weights: (sets, answers), no row of zeros.
        """
        return np.array([self.value(added) for added in weights @ counts])


@dataclass(frozen=True)
class Metric:
    """One measure: either of an item, the set's value being the mean, or of a whole set."""

    name: str
    per_item: Callable[[Answer], float] | None = None
    over_set: OverSet | None = None

    def value(self, answers: Sequence[Answer]) -> float:
        """The metric of a set of answers, at least one."""
        if self.over_set is not None:
            return self.over_set(answers)
        assert self.per_item is not None
        return sum(map(self.per_item, answers)) / len(answers)


# --- words of an answer


class _Deletions(dict[int, int | None]):
    """A table for `str.translate` that drops MLQA's punctuation, looked up a character at a time when it first occurs."""

    def __missing__(self, code: int) -> int | None:
        drop = chr(code) in string.punctuation or unicodedata.category(chr(code)).startswith("P")
        self[code] = None if drop else code
        return self[code]


_ASCII_PUNCTUATION = str.maketrans("", "", string.punctuation)
_PUNCTUATION = _Deletions()
_ENGLISH = re.compile(r"\b(a|an|the)\b")
_ARTICLES = {
    "ar": re.compile("ال"),  # wherever it stands, within words as well: what MLQA's script does
    "de": re.compile(r"\b(ein|eine|einen|einem|eines|einer|der|die|das|den|dem|des)\b"),
    "en": _ENGLISH,
    "es": re.compile(r"\b(un|una|unos|unas|el|la|los|las)\b"),
    "hi": None,
    "vi": re.compile(r"\b(của|là|cái|chiếc|những)\b"),
    "zh": None,
}
"""Articles (and what MLQA takes for such) by language; None where a language has none."""
_HAN = re.compile("([\u4e00-\u9fa5])")

MLQA_LANGUAGES = tuple(_ARTICLES)


def normalize(text: str, language: str | None = None) -> str:
    """SQuAD v1's normalisation: lower case, no ASCII punctuation, no English articles, single blanks.

    With a language of `MLQA_LANGUAGES`, MLQA's: all punctuation of Unicode goes, the articles are that language's, and a
    Chinese character is a word.
    """
    if language is None:
        return " ".join(_ENGLISH.sub(" ", text.lower().translate(_ASCII_PUNCTUATION)).split())
    articles = _ARTICLES[language]
    text = text.lower().translate(_PUNCTUATION)
    if articles is not None:
        text = articles.sub(" ", text)
    if language == "zh":
        text = _HAN.sub(r" \1 ", text)
    return " ".join(text.split())


def exact_match(prediction: str, references: Sequence[str], language: str | None = None) -> float:
    """1 if the prediction equals a reference after normalisation."""
    answer = normalize(prediction, language)
    return float(any(answer == normalize(reference, language) for reference in references))


def f1(prediction: str, references: Sequence[str], language: str | None = None) -> float:
    """The best word-overlap F1 over the references."""
    words = normalize(prediction, language).split()
    return max((_f1(words, normalize(reference, language).split()) for reference in references), default=0.0)


def _f1(prediction: list[str], reference: list[str]) -> float:
    common = sum((Counter(prediction) & Counter(reference)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(prediction), common / len(reference)
    return 2 * precision * recall / (precision + recall)


def parse_choice(prediction: str, choices: Sequence[str]) -> int | None:
    """The choice that a generated answer is, after normalisation; None if it is none of them."""
    answer = normalize(prediction)
    return next((i for i, choice in enumerate(choices) if normalize(choice) == answer), None)


# --- choices


def _accuracy(answer: Answer) -> float:
    """Whether the right choice was made; under a prompt without choices, whether the right text was given."""
    if answer.gold is None:
        return exact_match(answer.text, answer.references)
    return float(answer.chosen == answer.gold)


def _confusion(answers: Sequence[Answer]) -> Counts:
    """(answers, 3 x classes): hits, false alarms and misses of each class. An answer that is no choice is a miss only."""
    classes = 1 + max(max(-1 if index is None else index for index in (answer.chosen, answer.gold)) for answer in answers)
    counts = np.zeros((len(answers), 3, classes))
    for number, answer in enumerate(answers):
        if answer.gold is None:
            raise UserError("macro-f1 is of choices, and a prompt without choices was asked; choose other --templates")
        if answer.chosen == answer.gold:
            counts[number, 0, answer.gold] = 1
            continue
        counts[number, 2, answer.gold] = 1
        if answer.chosen is not None:
            counts[number, 1, answer.chosen] = 1
    return counts.reshape(len(answers), 3 * classes)


def _macro_f1(added: Counts) -> float:
    hits, alarms, misses = added.reshape(3, -1)
    total = 2 * hits + alarms + misses
    return float((2 * hits[total > 0] / total[total > 0]).mean())


# --- texts


_ROUGE = ("rouge1", "rouge2", "rougeL")
_BLEU_ORDER = 4


def _needed(package: str) -> UserError:
    return UserError(f"the package {package} is not installed; pip install 'mtllama[eval]'")


@functools.cache
def _rouge_scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer  # half a second of nltk
    except ImportError as error:
        raise _needed("rouge-score") from error
    return RougeScorer(list(_ROUGE))


@functools.lru_cache(maxsize=4096)
def _rouge(text: str, references: tuple[str, ...]) -> dict[str, float]:
    """All three of an answer at once, since they are asked for one by one."""
    if not references:
        return dict.fromkeys(_ROUGE, 0.0)
    return {name: float(score.fmeasure) for name, score in _rouge_scorer().score_multi(references, text).items()}


@functools.cache
def _sacrebleu() -> Any:
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError as error:
        raise _needed("sacrebleu") from error
    return BLEU(effective_order=True)  # of single answers only the counts are taken, which this does not change


def _bleu_counts(answers: Sequence[Answer]) -> Counts:
    """(answers, 10): length, length of the nearest reference, matches and totals of one to four words."""
    scores = [_sacrebleu().sentence_score(answer.text, list(answer.references) or [""]) for answer in answers]
    return np.array([[score.sys_len, score.ref_len, *score.counts, *score.totals] for score in scores], dtype=np.float64)


def _bleu(added: Counts) -> float:
    length, reference_length, *ngrams = added.astype(int).tolist()
    matches, totals = ngrams[:_BLEU_ORDER], ngrams[_BLEU_ORDER:]
    score = _sacrebleu().compute_bleu(matches, totals, length, reference_length, smooth_method="exp", max_ngram_order=_BLEU_ORDER)
    return float(score.score) / 100


def _overlap(measure: Callable[[str, Sequence[str], str | None], float], language: str | None = None) -> Callable[[Answer], float]:
    return lambda answer: measure(answer.text, answer.references, language)


def _rouge_of(name: str) -> Callable[[Answer], float]:
    return lambda answer: _rouge(answer.text, answer.references)[name]


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("accuracy", per_item=_accuracy),
        Metric("macro-f1", over_set=OverSet(_confusion, _macro_f1, of_choices=True)),
        Metric("f1", per_item=_overlap(f1)),
        Metric("em", per_item=_overlap(exact_match)),
        *(Metric(f"mlqa-f1-{language}", per_item=_overlap(f1, language)) for language in MLQA_LANGUAGES),
        *(Metric(f"mlqa-em-{language}", per_item=_overlap(exact_match, language)) for language in MLQA_LANGUAGES),
        *(Metric(name, per_item=_rouge_of(name)) for name in _ROUGE),
        Metric("bleu", over_set=OverSet(_bleu_counts, _bleu)),
    )
}
"""All metrics by name."""


def item_values(names: Sequence[str], answer: Answer) -> dict[str, float]:
    """What an answer is worth under each of the named metrics that an item has by itself, in their order."""
    return {name: measure(answer) for name in names if (measure := METRICS[name].per_item) is not None}
