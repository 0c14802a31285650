"""Two ways to read an answer off a model; each turns the items of a task into records.

`rank`: T0's rank classification (Sanh et al. 2022): the choice with the largest sum of log-probabilities of its
tokens and the end marker wins. `generate`: greedy text to the end marker or the first line break, at most 64 tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mtllama.evaluate import metrics
from mtllama.model.engine import Branches, Engine

PROTOCOLS = ("rank", "generate")
PRIMARY = "primary"
"""Rank where a task has choices, else generate: the protocol that a task's headline number is read from."""
MAX_NEW_TOKENS = 64
STOP = ("\n",)

Record = dict[str, Any]
"""One line of records.jsonl."""


@dataclass(frozen=True)
class Item:
    """One rendered item of a task."""

    task: str
    metric: str
    template: str
    item_id: str
    inputs: str
    target: str
    choices: tuple[str, ...] | None
    references: tuple[str, ...]

    @property
    def gold(self) -> int | None:
        """Position of the right choice."""
        return self.choices.index(self.target) if self.choices else None


def resolve(names: Sequence[str], item: Item) -> list[str]:
    """The protocols among `names` that apply to a task, judged by one of its items: ranking needs choices."""
    possible = PROTOCOLS if item.choices else ("generate",)
    wanted = [possible[0] if name == PRIMARY else name for name in names]
    return [name for name in dict.fromkeys(wanted) if name in possible]


def run(protocol: str, engine: Engine, items: Sequence[Item], advance: Callable[[int], None]) -> list[Record]:
    """Records of all items under one protocol, in their order."""
    return (_rank if protocol == "rank" else _generate)(engine, items, advance)


def _rank(engine: Engine, items: Sequence[Item], advance: Callable[[int], None]) -> list[Record]:
    records, branches = [], []
    for item in items:
        assert item.choices is not None
        choice_ids = [engine.encoder.answer_ids(choice) for choice in item.choices]
        record = _record("rank", engine, item, room=max(map(len, choice_ids)))
        record["choice_ids"] = choice_ids
        records.append(record)
        branches.append(Branches(record["prompt_ids"], choice_ids))
    for item, record, scores in zip(items, records, engine.score(branches, advance), strict=True):
        assert item.choices is not None and item.gold is not None
        sums = [sum(tokens) for tokens in scores]
        best = max(range(len(sums)), key=lambda i: sums[i])  # the first of equals
        record.update(
            scores=sums,
            prediction=item.choices[best],
            predicted_index=best,
            gold=item.choices[item.gold],
            gold_index=item.gold,
            correct=best == item.gold,
        )
    return records


def _generate(engine: Engine, items: Sequence[Item], advance: Callable[[int], None]) -> list[Record]:
    records = [_record("generate", engine, item, room=MAX_NEW_TOKENS) for item in items]
    texts = engine.generate([record["prompt_ids"] for record in records], max_new_tokens=MAX_NEW_TOKENS, stop=STOP, advance=advance)
    for item, record, text in zip(items, records, texts, strict=True):
        record["prediction"] = text
        if item.choices is not None:
            chosen = metrics.parse_choice(text, item.choices)
            record.update(
                predicted_index=chosen,
                gold=item.choices[item.gold or 0],
                gold_index=item.gold,
                correct=chosen == item.gold,
                unparsed=chosen is None,
            )
        else:
            match = metrics.exact_match(text, item.references)
            record.update(
                gold=list(item.references), correct=bool(match), f1=metrics.f1(text, item.references), em=match, unparsed=not text
            )
    return records


def _record(protocol: str, engine: Engine, item: Item, room: int) -> Record:
    prompt_ids, cut = engine.encoder.prompt_ids(item.inputs, room=room)
    prompt = engine.tokenizer.decode(prompt_ids) if cut else engine.encoder.prompt_text(item.inputs)
    return {
        "task": item.task,
        "template": item.template,
        "protocol": protocol,
        "item_id": item.item_id,
        "prompt": prompt,
        "prompt_ids": prompt_ids,
        "cut": cut,
        "choices": list(item.choices) if item.choices else None,
        "choice_ids": None,
        "scores": None,
    }


def value(record: Record, metric: str) -> float:
    """What a record adds to its task's metric, from 0 to 1."""
    return float(record["f1"] if metric == "f1" else record["correct"])
