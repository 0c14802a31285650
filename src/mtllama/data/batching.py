"""Encoded examples -> shares of the ranks -> packs: examples one behind the other in one row, under a token budget, without padding."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from mtllama.data.prompt import Encoded


@dataclass(frozen=True)
class Batch:
    """One pass: a row of segments, one an example. Attention keeps to its segment (model/attention.py)."""

    ids: torch.Tensor  # [1, seq] int64
    positions: torch.Tensor  # [1, seq] int64: restart at 0 in every segment
    segments: list[int]
    """Lengths of the segments; they add up to seq."""
    predict: torch.Tensor  # [num_target] int64: places whose next token is a target
    targets: torch.Tensor  # [num_target] int64: those tokens
    owners: torch.Tensor  # [num_target] int64: the example (its place in the effective batch) that each belongs to


def deal(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Deal out examples of these lengths (tokens) to `size` ranks, so that none waits long for another; returns the numbers of each rank's,
    in their order. The longest first, each to the rank that has the fewest tokens so far (Graham 1969).
    """
    shares: list[list[int]] = [[] for _ in range(size)]
    loads = [0] * size
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        rank = loads.index(min(loads))
        shares[rank].append(number)
        loads[rank] += lengths[number]
    return [sorted(share) for share in shares]


def pack(examples: Sequence[Encoded], max_tokens: int) -> Iterator[Batch]:
    """Split an effective batch, in its order, into passes of at most `max_tokens` tokens.

    An example that is longer than the budget comes alone.
    """
    group: list[int] = []
    size = 0
    for i, example in enumerate(examples):
        if group and size + len(example.ids) > max_tokens:
            yield _join(examples, group)
            group, size = [], 0
        group.append(i)
        size += len(example.ids)
    if group:
        yield _join(examples, group)


def _join(examples: Sequence[Encoded], group: Sequence[int]) -> Batch:
    ids: list[int] = []
    positions: list[int] = []
    predict: list[int] = []
    owners: list[int] = []
    for i in group:
        example, start = examples[i], len(ids)
        ids += example.ids
        positions += range(len(example.ids))
        end = start + len(example.ids)
        predict += range(end - example.num_target - 1, end - 1)
        owners += [i] * example.num_target
    row, places = torch.tensor(ids), torch.tensor(predict)
    segments = [len(examples[i].ids) for i in group]
    return Batch(row[None], torch.tensor(positions)[None], segments, places, row[places + 1], torch.tensor(owners))
