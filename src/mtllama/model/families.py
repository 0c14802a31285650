"""Prompts that begin alike: what several have in common is computed once for all of them.

Questions about one passage, hypotheses about one premise, or few examples before every item, as evaluations are made of.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

SHARED = 16
"""Tokens that prompts have in common at least, to be read as a family: fewer are not worth attention's further calls."""
MEMBERS = 256
"""Prompts of a family at most: bounds the work of finding families."""


@dataclass(frozen=True)
class Family:
    """Some prompts, by their numbers, and how many ids all of them begin with; a prompt that shares nothing is alone."""

    members: tuple[int, ...]
    shared: int

    def tokens(self, lengths: Sequence[int]) -> int:
        """Tokens to compute for it, where its members alone would take `lengths`."""
        return self.shared + sum(lengths[i] - self.shared for i in self.members)


def families(prompts: Sequence[Sequence[int]]) -> list[Family]:
    """All prompts in families, so that as few tokens as possible are left to compute; the order depends on nothing but the prompts.

    A family is a stretch of the sorted prompts. The last token of a prompt is always its own: from its place the answer is read.
    """
    order = sorted(range(len(prompts)), key=lambda i: (tuple(prompts[i]), i))
    common = [min(_in_common(prompts[i], prompts[j]), len(prompts[i]) - 1, len(prompts[j]) - 1) for i, j in itertools.pairwise(order)]
    saved = [0]  # tokens that the first n prompts save at best
    starts: list[tuple[int, int]] = []  # then, of the family that the last of them is in: where it starts, and what it shares
    for last in range(len(order)):
        best, start, shared = saved[last], last, 0
        least = len(prompts[order[last]])
        for first in range(last - 1, max(-1, last - MEMBERS), -1):
            least = min(least, common[first])
            if least < SHARED:
                break
            if saved[first] + (last - first) * least > best:
                best, start, shared = saved[first] + (last - first) * least, first, least
        saved.append(best)
        starts.append((start, shared))
    found, end = [], len(order)
    while end:
        start, shared = starts[end - 1]
        found.append(Family(tuple(order[start:end]), shared))
        end = start
    return found[::-1]


def passes(groups: Sequence[Family], lengths: Sequence[int], max_tokens: int) -> Iterator[list[Family]]:
    """Families to be computed together, largest first, each pass within the budget of tokens; a family that is over it is divided."""
    parts = [part for group in groups for part in _divided(group, lengths, max_tokens)]
    together: list[Family] = []
    tokens = 0
    for part in sorted(parts, key=lambda part: -part.tokens(lengths)):
        if together and tokens + part.tokens(lengths) > max_tokens:
            yield together
            together, tokens = [], 0
        together.append(part)
        tokens += part.tokens(lengths)
    if together:
        yield together


def beyond(neighbour: Sequence[int], prompt: Sequence[int]) -> int:
    """Tokens that a prompt adds to a pass in which its neighbour is."""
    common = min(_in_common(neighbour, prompt), len(prompt) - 1)
    return len(prompt) - (common if common >= SHARED else 0)


def _divided(family: Family, lengths: Sequence[int], max_tokens: int) -> Iterator[Family]:
    members: list[int] = []
    tokens = family.shared
    for i in family.members:
        if members and tokens + lengths[i] - family.shared > max_tokens:
            yield _part(members, family.shared)
            members, tokens = [], family.shared
        members.append(i)
        tokens += lengths[i] - family.shared
    yield _part(members, family.shared)


def _part(members: Sequence[int], shared: int) -> Family:
    return Family(tuple(members), shared if len(members) > 1 else 0)


def _in_common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many ids both begin with."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
