"""Whole numbers -> bytes, given what both sides know of them: an interleaved range coder (rANS, Duda 2013).

Each number is a token and some raw bits: numbers below 16 are their own token; of a larger one the token says how many bits
it has and the two behind the first, the rest is raw. The tokens of each context have frequencies of their own. A chunk of
numbers is coded by many lanes in turn (number i by lane i mod L), which share one stream of 16-bit words, so that a decoder
may take the lanes one by one or all at once.

The loops are compiled by numba where it is installed; numpy does the same work on all lanes at once, slower. Both read and
write the same bytes (docs/delta-format.md).
"""

import struct
from dataclasses import dataclass

import numpy as np

from mtllama.weights import kernels
from mtllama.weights.kernels import SCALE_BITS

CHUNK = 1 << 18
"""Numbers in a chunk: what is held in memory, and what one thread works at."""
BITS_PER_FREQUENCY = 24
"""What a token costs in the frequencies of a context."""
_CHUNK = struct.Struct("<HII")  # lanes, words, bytes of raw bits


class Damaged(ValueError):
    """The bytes are not what the encoder wrote."""


def num_lanes(size: int) -> int:
    """Lanes of a chunk: a power of two, so few that their last states cost a thousandth."""
    return max(1, 1 << max(0, (size >> 12).bit_length() - 1))


@dataclass(frozen=True)
class Model:
    """Frequencies of the tokens of each context; they add up to 2^12."""

    frequencies: np.ndarray  # [contexts, 256] uint16

    @classmethod
    def of(cls, counts: np.ndarray) -> "Model":
        """From counts [contexts, 256]; every token that occurs has a frequency of 1 or more."""
        return cls(np.stack([_quantised(row) for row in counts]).astype(np.uint16))

    def decoder(self) -> np.ndarray:
        """What each slot means: token, frequency - 1 and place within the token, packed. [contexts, 4096] uint32"""
        table = np.empty((len(self.frequencies), 1 << SCALE_BITS), np.uint32)
        tokens, places = np.arange(256, dtype=np.uint32), np.arange(1 << SCALE_BITS, dtype=np.uint32)
        for row, counts in zip(table, self.frequencies.astype(np.int64), strict=True):
            starts = np.cumsum(counts) - counts
            row[:] = np.repeat(tokens | ((np.maximum(counts, 1) - 1).astype(np.uint32) << 8), counts)
            row |= (places - np.repeat(starts, counts).astype(np.uint32)) << 20
        return table

    def starts(self) -> np.ndarray:
        """Where the slots of each token begin. [contexts, 256] uint16"""
        starts: np.ndarray = np.cumsum(self.frequencies, axis=1, dtype=np.uint32) - self.frequencies
        return starts.astype(np.uint16)

    def to_bytes(self) -> bytes:
        """For each context how many tokens occur, which, and their frequencies less one."""
        out = []
        for row in self.frequencies:
            used = np.flatnonzero(row)
            out += [struct.pack("<H", len(used)), used.astype(np.uint8).tobytes(), (row[used] - 1).astype("<u2").tobytes()]
        return b"".join(out)

    @classmethod
    def from_bytes(cls, data: memoryview, contexts: int) -> tuple["Model", memoryview]:
        """The inverse of `to_bytes`, and what stands behind. Raises `Damaged`."""
        frequencies = np.zeros((contexts, 256), np.uint16)
        for row in frequencies:
            try:
                (used,) = struct.unpack_from("<H", data)
                tokens, values = np.frombuffer(data[2 : 2 + used], np.uint8), np.frombuffer(data[2 + used : 2 + 3 * used], "<u2")
                row[tokens] = values + 1
            except (struct.error, ValueError) as error:
                raise Damaged("it is cut off") from error
            if row.sum(dtype=np.int64) != 1 << SCALE_BITS:
                raise Damaged("its frequencies do not add up")
            data = data[2 + 3 * used :]
        return cls(frequencies), data


def _quantised(counts: np.ndarray) -> np.ndarray:
    scale, total = 1 << SCALE_BITS, counts.sum()
    if not total:
        return np.array([scale, *[0] * 255])
    found: np.ndarray = np.where(counts > 0, np.maximum(1, np.round(counts * (scale / total))), 0).astype(np.int64)
    while (excess := int(found.sum()) - scale) != 0:  # taken from, or given to, the most frequent: they notice least
        place = int(np.argmax(found))
        found[place] -= max(1, excess // 2) if excess > 0 else excess
        found[place] = max(found[place], 1)
    return found


def encode_chunk(numbers: np.ndarray, contexts: np.ndarray, model: Model) -> bytes:
    """Code unsigned numbers [size], each in its context [size] uint8."""
    lanes = num_lanes(len(numbers))
    tokens, shifts = kernels.tokens_of(numbers)
    states, words = kernels.encode(tokens, contexts, model.frequencies, model.starts(), lanes)
    raw = kernels.pack_bits(numbers, shifts)
    return _CHUNK.pack(lanes, len(words), len(raw)) + states.tobytes() + words.tobytes() + raw


def decode_chunk(data: memoryview, contexts: np.ndarray, table: np.ndarray, out: np.ndarray) -> None:
    """The numbers that `encode_chunk` coded into `out` [size]; `table` is `Model.decoder`. Raises `Damaged` for other bytes."""
    try:
        lanes, num_words, num_raw = _CHUNK.unpack_from(data)
    except struct.error as error:
        raise Damaged("it is cut off") from error
    if lanes != num_lanes(len(out)) or len(data) != _CHUNK.size + 4 * lanes + 2 * num_words + num_raw:
        raise Damaged("it is cut off, or of a tensor of another size")
    states, words, raw = (
        data[_CHUNK.size : _CHUNK.size + 4 * lanes],
        data[_CHUNK.size + 4 * lanes : len(data) - num_raw],
        data[len(data) - num_raw :],
    )
    if not kernels.decode(contexts, table, np.frombuffer(states, "<u4"), np.frombuffer(words, "<u2"), bytes(raw), out):
        raise Damaged("its words do not fit")
