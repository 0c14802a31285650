"""Which answers a model gives, whatever it is asked: label bias, and how much of a result it explains.

A model that ranks one label first nearly everywhere may still know the task: then taking off what it thinks of the labels in
general mends the result, and how well its scores order the items is far from chance. If neither holds, it does not know the task.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import log_softmax, logsumexp
from scipy.stats import rankdata

from mtllama.evaluate.protocols import Record

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Bias:
    """What was answered to the items of a set, in percent; over several templates, their mean."""

    labels: tuple[str, ...]
    """The choices, where all items have the same; else their places among the choices of an item."""
    gold: tuple[float, ...]
    """How often each label is right."""
    given: tuple[float, ...]
    """How often each label is answered."""
    accuracy: float
    balanced: float
    """Mean over the labels of how many of its items are answered with it: one answer everywhere gets what guessing gets."""
    calibrated: float
    """Accuracy after batch calibration (Zhou et al. 2024, arXiv:2309.17249): every label's mean probability over the set is divided out.
    It sees all items at once, so it tells what is known, and is no way to answer one item."""
    separation: float | None
    """Of two labels: how often an item of the second label prefers it more than an item of the first does (area under the ROC curve;
    50 is none)."""
    shortest: tuple[float, float] | None
    """Where choices are each item's own: how often the right one is the shortest of its item in characters, and how often the answer is."""


def bias(records: Iterable[Record]) -> Bias | None:
    """The bias of ranked records of one task and protocol (as `protocols.view` shows them); none where items have different numbers of choices."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record["template"], []).append(record)
    found = [_of_template(group) for group in groups.values()]
    some = [each for each in found if each is not None]
    if not some or len(some) < len(found) or len({len(each.labels) for each in some}) > 1:
        return None

    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    # Templates have words of their own for the same labels in the same places.
    labels = tuple(" / ".join(dict.fromkeys(words)) for words in zip(*(each.labels for each in some), strict=True))
    separations = [each.separation for each in some if each.separation is not None]
    lengths = [each.shortest for each in some if each.shortest is not None]
    return Bias(
        labels,
        tuple(map(mean, zip(*(each.gold for each in some), strict=True))),
        tuple(map(mean, zip(*(each.given for each in some), strict=True))),
        mean([each.accuracy for each in some]),
        mean([each.balanced for each in some]),
        mean([each.calibrated for each in some]),
        mean(separations) if separations else None,
        (mean([gold for gold, _ in lengths]), mean([given for _, given in lengths])) if lengths else None,
    )


def _of_template(records: Sequence[Record]) -> Bias | None:
    count = len(records[0]["choices"] or ())
    if not count or any(record["scores"] is None or len(record["scores"]) != count for record in records):
        return None
    own = any(record["choices"] != records[0]["choices"] for record in records)
    scores = np.array([record["scores"] for record in records])  # [items, labels]
    gold = np.array([record["gold_index"] for record in records])  # [items]
    given = scores.argmax(axis=1)
    known = log_softmax(scores, axis=1)
    calibrated = (known - logsumexp(known, axis=0)).argmax(axis=1)
    recalls = [float((given[gold == label] == label).mean()) for label in range(count) if (gold == label).any()]
    return Bias(
        tuple(f"option {place + 1}" for place in range(count)) if own else tuple(records[0]["choices"]),
        _shares(gold, count),
        _shares(given, count),
        100 * float((given == gold).mean()),
        100 * sum(recalls) / len(recalls),
        100 * float((calibrated == gold).mean()),
        _separation(scores[:, 1] - scores[:, 0], gold) if count == 2 else None,
        (_shortest(records, gold), _shortest(records, given)) if own else None,
    )


def _shares(labels: npt.NDArray[np.int64], count: int) -> tuple[float, ...]:
    return tuple(100 * float((labels == label).mean()) for label in range(count))


def _separation(preference: Floats, gold: npt.NDArray[np.int64]) -> float | None:
    """Area under the ROC curve in percent, by ranks (Mann-Whitney); none where only one of the labels is there."""
    second = int((gold == 1).sum())
    first = len(gold) - second
    if not first or not second:
        return None
    ranks: Floats = rankdata(preference)
    return 100 * float((ranks[gold == 1].sum() - second * (second + 1) / 2) / (first * second))


def _shortest(records: Sequence[Record], places: npt.NDArray[np.int64]) -> float:
    """How often the choice at an item's place is the shortest that the item has, in percent."""
    sizes = [[len(choice) for choice in record["choices"]] for record in records]
    return 100 * sum(bool(each[place] == min(each)) for each, place in zip(sizes, places, strict=True)) / len(records)
