"""Numbers only: the order of a set's rows, and whose turn it is among the streams of a mixture. Pure functions of a position."""

import math
import sys
from collections.abc import Sequence
from fractions import Fraction
from hashlib import sha256
from typing import Any

import grain
import numpy as np

SMALL = 1 << 16
"""Up to so many rows the order of a pass is held in memory: Grain's shuffle takes milliseconds an index where rows are few."""


class Order:
    """The order of `size` rows in an endless series of passes, each shuffled anew."""

    def __init__(self, size: int, seed: str) -> None:
        self.size, self.seed = size, seed
        self._passes: dict[int, np.ndarray] = {}

    def __getitem__(self, position: int) -> tuple[int, int]:
        """(pass, place) at `position`."""
        turn, place = divmod(position, self.size)
        if self.size > SMALL:  # in constant memory
            return turn, int(grain.experimental.index_shuffle(place, max_index=self.size - 1, seed=_hash(self.seed, turn), rounds=4))
        if turn not in self._passes:
            while len(self._passes) > 1:
                self._passes.pop(next(iter(self._passes)))
            self._passes[turn] = _permutation(self.size, _hash(self.seed, turn))
        return turn, int(self._passes[turn][place])


def _hash(seed: str, turn: int) -> int:
    return int.from_bytes(sha256(f"{seed}/{turn}".encode()).digest()[:4], "little")


def _permutation(size: int, seed: int) -> np.ndarray:
    """A shuffle that no library's change of mind can alter: rows sorted by splitmix64 of their number. [size] int32"""
    with np.errstate(over="ignore"):
        state = (np.arange(1, size + 1, dtype=np.uint64) + (np.uint64(seed) << np.uint64(32))) * np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.argsort(state ^ (state >> np.uint64(31)), kind="stable").astype(np.int32)


class Interleave:
    """Position -> (stream, position in the stream), exact for whole-number rates.

    The rates are halved again and again into a tree; at each node of total rate T whose right half has rate R, of the
    first k draws floor(k R / T) go right. So counts never stray from their shares by more than the depth of the tree,
    and are exact after every T draws.
    """

    def __init__(self, rates: Sequence[Fraction]) -> None:
        scale = math.lcm(*(rate.denominator for rate in rates))
        whole = [int(rate * scale) for rate in rates]
        divisor = math.gcd(*whole)
        self.rates = [rate // divisor for rate in whole]
        self.period = sum(self.rates)
        self._root = self._grow(0, len(rates))

    def _grow(self, start: int, end: int) -> Any:
        """A stream's number, or (total, right, left node, right node)."""
        if end - start == 1:
            return start
        total, middle, left = sum(self.rates[start:end]), start + 1, self.rates[start]
        while middle < end - 1 and 2 * (left + self.rates[middle]) <= total:
            left += self.rates[middle]
            middle += 1
        return total, total - left, self._grow(start, middle), self._grow(middle, end)

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, position: int) -> tuple[int, int]:
        node = self._root
        while type(node) is tuple:
            total, right, to_left, to_right = node
            went = position * right // total
            if (position + 1) * right // total != went:
                position, node = went, to_right
            else:
                position, node = position - went, to_left
        return node, position
