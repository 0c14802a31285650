"""How an answer is judged. Values are shares from 0 to 1; results show them in percent."""

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize(text: str) -> str:
    """SQuAD v1's normalisation: lower case, no punctuation, no articles, single blanks (Rajpurkar et al. 2016)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1 if the prediction equals a reference after normalisation."""
    return float(any(normalize(prediction) == normalize(reference) for reference in references))


def f1(prediction: str, references: Sequence[str]) -> float:
    """The best word-overlap F1 over the references, as SQuAD v1 counts it."""
    return max((_f1(normalize(prediction).split(), normalize(reference).split()) for reference in references), default=0.0)


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
