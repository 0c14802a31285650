"""Protocols: ways to read an answer off what a model was asked. Each is a pure function of a raw record.

A model is asked two things about an item (`ask.py`): how likely each choice is, token by token (a record of the kind
`score`), and what it answers (`generate`). All protocols are read off these two, so they judge the same computation.

`rank` is T0's rank classification (Sanh et al. 2022): the choice with the largest sum of log-probabilities of its tokens and
the end marker wins. The others divide that sum: by tokens (`rank-mean`), by characters (`rank-char`) or UTF-8 bytes
(`rank-byte`) of the choice, or take off what the choice has after an empty prompt (`rank-pmi`). `generate` wants the answer
word for word after normalisation. `mt-llama` and `mt-llama-glue` are the original's rule (`original.py`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mtllama.errors import UserError
from mtllama.evaluate import metrics, original

Kind = Literal["score", "generate"]
Record = dict[str, Any]
"""One line of records.jsonl."""

RANKS = ("rank", "rank-mean", "rank-char", "rank-byte", "rank-pmi")
GENERATE, ORIGINAL, MENDED = "generate", "mt-llama", "mt-llama-glue"
PROTOCOLS = (*RANKS, GENERATE, ORIGINAL, MENDED)
PRIMARY, EVERY = "primary", "all"
"""`primary`: rank where a task has choices, else generate: what a task's headline number is read from."""
PMI = "rank-pmi"
"""The protocol that needs the choices' log-probabilities after an empty prompt as well."""


@dataclass(frozen=True)
class Judgement:
    """What a protocol makes of a record."""

    predicted: int | None
    """Place of the chosen one among the choices; none where nothing was chosen or there are no choices."""
    prediction: str
    """The choice, or the text."""
    answer: metrics.Answer
    """The same, as metrics of a whole set take it."""
    values: dict[str, float]
    """What it adds to each metric of the task that an item has by itself, from 0 to 1; the first is the headline."""
    correct: bool
    """Whether the answer is right, word for word where it is text."""
    scores: tuple[float, ...] | None = None
    """What the choices were ranked by."""
    not_found: bool = False
    """The original's rule found nothing in the text and fell through to its class 0, or to an empty answer."""
    unparsed: bool = False
    """The text is none of the choices, or empty."""


def kind(protocol: str) -> Kind:
    """What a model has to be asked for a protocol."""
    return "score" if protocol in RANKS else "generate"


def applies(protocol: str, task: str, template: str, *, choices: bool) -> bool:
    """Whether a protocol says anything about a task asked through a template: ranking needs choices, the original's rule its prompts."""
    if protocol in RANKS:
        return choices
    return protocol == GENERATE or original.applies(task, template, choices=choices, mended=protocol == MENDED)


def resolve(names: Sequence[str], *, choices: bool) -> tuple[str, ...]:
    """Protocols by name, `primary` and `all` spelt out for a task with or without choices."""
    spelt: list[str] = []
    for name in names:
        spelt += PROTOCOLS if name == EVERY else ["rank" if choices else GENERATE] if name == PRIMARY else [name]
    return tuple(dict.fromkeys(spelt))


def of_record(record: Record) -> tuple[str, ...]:
    """The protocols that can be read off a record."""
    return tuple(
        protocol
        for protocol in PROTOCOLS
        if kind(protocol) == record["kind"]
        and applies(protocol, record["task"], record["template"], choices=record["choices"] is not None)
        and (protocol != PMI or record["unconditional"] is not None)
    )


def judge(record: Record, protocol: str) -> Judgement:
    """What a protocol makes of a record of its kind."""
    choices = record["choices"]
    if protocol in RANKS:
        scores = _SCORES[protocol](record)
        if any(score != score for score in scores):
            raise UserError(f"{record['task']}/{record['item_id']}: its log-probabilities are no numbers (NaN); evaluate again")
        best = scores.index(max(scores))  # the first of equals
        return _judgement(record, choices[best], best, scores=scores)
    text = record["text"]
    if choices is None:
        answer = "" if protocol == ORIGINAL and original.NO_ANSWER in text else text
        return _judgement(record, answer, None, not_found=answer != text, unparsed=not answer)
    if protocol == GENERATE:
        chosen = metrics.parse_choice(text, choices)
        return _judgement(record, text, chosen, unparsed=chosen is None)
    place, found = original.choose(record["task"], record["template"], text, choices, mended=protocol == MENDED)
    return _judgement(record, choices[place], place, not_found=found is None)


def _judgement(record: Record, text: str, chosen: int | None, **more: Any) -> Judgement:
    answer = _answer(record, text, chosen)
    right = answer.chosen == answer.gold if record["choices"] is not None else bool(metrics.exact_match(text, answer.references))
    return Judgement(chosen, text, answer, metrics.item_values(record["metrics"], answer), right, **more)


def _answer(record: Record, text: str, chosen: int | None) -> metrics.Answer:
    # By text: where two choices read the same, either is right.
    same = None if chosen is None else record["choices"].index(record["choices"][chosen])
    return metrics.Answer(text, tuple(record["references"]), same, record["gold_index"])


def view(record: Record, protocol: str) -> Record:
    """A record with a protocol's verdict on it, flat: what tables and reports show."""
    judged = judge(record, protocol)
    return record | {
        "protocol": protocol,
        "scores": None if judged.scores is None else list(judged.scores),
        "prediction": judged.prediction,
        "predicted_index": judged.predicted,
        "correct": judged.correct,
        "not_found": judged.not_found,
        "unparsed": judged.unparsed,
        "values": judged.values,
    }


def value(viewed: Record, metric: str) -> float:
    """What a record under a protocol adds to a metric, from 0 to 1."""
    return float(viewed["values"][metric])


def answer(viewed: Record) -> metrics.Answer:
    """What a record under a protocol answers, as metrics of a whole set take it."""
    return _answer(viewed, viewed["prediction"], viewed["predicted_index"])


def _sums(record: Record, key: str = "logprobs") -> list[float]:
    return [sum(tokens) for tokens in record[key]]


def _per(record: Record, sizes: Sequence[int]) -> tuple[float, ...]:
    # A choice of no text has its end marker alone, which counts as one.
    return tuple(total / max(1, size) for total, size in zip(_sums(record), sizes, strict=True))


_SCORES: dict[str, Callable[[Record], tuple[float, ...]]] = {
    "rank": lambda record: tuple(_sums(record)),
    "rank-mean": lambda record: _per(record, [len(tokens) for tokens in record["logprobs"]]),
    "rank-char": lambda record: _per(record, [len(choice) for choice in record["choices"]]),
    "rank-byte": lambda record: _per(record, [len(choice.encode()) for choice in record["choices"]]),
    PMI: lambda record: tuple(a - b for a, b in zip(_sums(record), _sums(record, "unconditional"), strict=True)),
}
"""The end marker's log-probability is part of every sum; it counts as a token, but has no characters."""
