"""Scores of the same items, computed alone, in company, in other orders and numbers: they must not depend on any of it."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from mtllama.errors import UserError
from mtllama.evaluate.ask import ask
from mtllama.evaluate.items import Item, TaskItems
from mtllama.model.engine import Branches, Engine
from mtllama.progress import progress

TOLERANCE = 1e-4
"""Nats that two computations of one log-probability may differ by in float32."""
SAMPLE = 16
"""Items that are computed again and again."""


@dataclass(frozen=True)
class Largest:
    """The largest difference between two computations of one log-probability."""

    nats: float
    where: str
    """Task, item and choice."""
    way: str
    """How it was computed."""
    items: int
    log_probs: int
    """Log-probabilities that were compared, each with every way."""

    @property
    def passed(self) -> bool:
        """Whether it is within the tolerance; not a number is not."""
        return self.nats <= TOLERANCE


def self_test(engine: Engine, tasks: Sequence[TaskItems], seed: int = 0) -> Largest:
    """Compare each answer alone behind its prompt with: its item alone, all together, in other orders, in groups of 2, 5 and 11."""
    items = _sample(tasks, seed)
    records = ask("score", engine, items)
    wanted = [Branches(record["prompt_ids"], record["choice_ids"]) for record in records]
    rng = random.Random(seed)
    shuffled = list(range(len(items)))
    rng.shuffle(shuffled)
    backwards = list(range(len(items)))[::-1]
    ways: dict[str, list[list[int]]] = {
        "each item alone": [[i] for i in range(len(items))],
        "all in reverse order": [backwards],
        "all in a random order": [shuffled],
        **{f"in groups of {n}": [shuffled[start : start + n] for start in range(0, len(items), n)] for n in (2, 5, 11)},
    }
    with progress("self-test", len(ways) + len(items)) as advance:
        alone = []
        for each in wanted:
            alone.append([engine.score([Branches(each.prompt, [answer])])[0][0] for answer in each.answers])
            advance()
        found = {"all together": [record["logprobs"] for record in records]}
        for way, groups in ways.items():
            scores: list[list[list[float]]] = [[] for _ in items]
            for group in groups:
                for i, each_scores in zip(group, engine.score([wanted[i] for i in group]), strict=True):
                    scores[i] = each_scores
            found[way] = scores
            advance()
    differences = [
        (_size(left - right), f"{items[i].task}/{items[i].item_id}, choice {c + 1}", way)
        for way, scores in found.items()
        for i, choices in enumerate(scores)
        for c, tokens in enumerate(choices)
        for left, right in zip(tokens, alone[i][c], strict=True)
    ]
    nats, where, way = max(differences)
    return Largest(nats, where, way, len(items), sum(len(tokens) for choices in alone for tokens in choices))


def _size(difference: float) -> float:
    return float("inf") if difference != difference else abs(difference)


def _sample(tasks: Sequence[TaskItems], seed: int) -> list[Item]:
    """Items with choices, from all tasks in turn."""
    rng = random.Random(seed)
    pools = []
    for each in tasks:
        pool = [item for item in each.items if item.choices]
        pools.append(rng.sample(pool, min(len(pool), SAMPLE)))
    found = [pool[turn] for turn in range(SAMPLE) for pool in pools if turn < len(pool)][:SAMPLE]
    if not found:
        raise UserError("none of the tasks has choices, so there is nothing to score; name others with --tasks")
    return found
