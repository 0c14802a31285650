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

SCALE_BITS = 12
CHUNK = 1 << 22
"""Numbers in a chunk: what is held in memory, and what one thread works at."""
DIRECT = 16
"""Numbers below are their own token."""
_HEADER = struct.Struct("<HI")  # contexts, chunks
_CHUNK = struct.Struct("<HII")  # lanes, words, bytes of raw bits


class Damaged(Exception):
    """The bytes are not what the encoder wrote."""


def num_lanes(size: int) -> int:
    """Lanes of a chunk: a power of two, so few that their last states cost a thousandth."""
    return max(1, 1 << max(0, (size >> 12).bit_length() - 1))


def tokens_of(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(token, number of raw bits) of each number. [size] uint8 each"""
    bits = _bit_length(numbers)
    large = bits > 4
    shift = np.where(large, bits - 3, 0).astype(numbers.dtype)
    token = np.where(large, DIRECT + (bits.astype(np.int64) - 5) * 4 + ((numbers >> shift) & numbers.dtype.type(3)).astype(np.int64), numbers)
    return token.astype(np.uint8), shift.astype(np.uint8)


def _bit_length(numbers: np.ndarray) -> np.ndarray:
    """Bits of each number. [size] uint8"""
    if numbers.itemsize <= 4:
        return np.frexp(numbers.astype(np.float64))[1].astype(np.uint8)  # exact: a double holds 53 bits
    high = np.frexp((numbers >> np.uint64(32)).astype(np.float64))[1]
    low = np.frexp((numbers & np.uint64(0xFFFFFFFF)).astype(np.float64))[1]
    return np.where(high > 0, high + 32, low).astype(np.uint8)


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
        return (np.cumsum(self.frequencies, axis=1, dtype=np.uint32) - self.frequencies).astype(np.uint16)

    def to_bytes(self) -> bytes:
        """For each context how many tokens occur, which, and their frequencies less one."""
        out = []
        for row in self.frequencies:
            used = np.flatnonzero(row)
            out += [struct.pack("<H", len(used)), used.astype(np.uint8).tobytes(), (row[used] - 1).astype("<u2").tobytes()]
        return b"".join(out)

    @classmethod
    def from_bytes(cls, data: memoryview, contexts: int) -> tuple["Model", memoryview]:
        """The inverse of `to_bytes`, and what stands behind."""
        frequencies = np.zeros((contexts, 256), np.uint16)
        for row in frequencies:
            (used,) = struct.unpack_from("<H", data)
            tokens, values = data[2 : 2 + used], np.frombuffer(data[2 + used : 2 + 3 * used], "<u2")
            row[np.frombuffer(tokens, np.uint8)] = values + 1
            if row.sum(dtype=np.int64) != 1 << SCALE_BITS or len(values) != used:
                raise Damaged("its frequencies do not add up")
            data = data[2 + 3 * used :]
        return cls(frequencies), data


def _quantised(counts: np.ndarray) -> np.ndarray:
    scale, total = 1 << SCALE_BITS, counts.sum()
    if not total:
        return np.eye(1, 256, dtype=np.int64)[0] * scale
    found = np.where(counts > 0, np.maximum(1, np.round(counts * (scale / total))), 0).astype(np.int64)
    while (excess := int(found.sum()) - scale) != 0:  # taken from, or given to, the most frequent: they notice least
        place = int(np.argmax(found))
        found[place] -= max(1, excess // 2) if excess > 0 else excess
        found[place] = max(found[place], 1)
    return found


def encode(numbers: np.ndarray, contexts: np.ndarray, num_contexts: int) -> bytes:
    """Code unsigned numbers [size], each in its context [size] uint8 (below `num_contexts`)."""
    chunks = [slice(start, min(start + CHUNK, len(numbers))) for start in range(0, len(numbers), CHUNK)]
    counts = np.zeros((num_contexts, 256), np.int64)
    for part in chunks:
        keys = contexts[part].astype(np.int32) << 8 | tokens_of(numbers[part])[0]
        counts += np.bincount(keys, minlength=num_contexts << 8).reshape(num_contexts, 256)
    model = Model.of(counts)
    starts, coded, heads = model.starts(), [], []
    for part in chunks:
        lanes = num_lanes(part.stop - part.start)
        states, words = kernels.encode(*tokens_of(numbers[part])[:1], contexts[part], model.frequencies, starts, lanes)
        raw = kernels.pack_bits(numbers[part], tokens_of(numbers[part])[1])
        heads.append(_CHUNK.pack(lanes, len(words), len(raw)))
        coded += [states.tobytes(), words.tobytes(), raw]
    return b"".join([_HEADER.pack(num_contexts, len(chunks)), model.to_bytes(), *heads, *coded])
