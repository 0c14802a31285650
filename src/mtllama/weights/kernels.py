"""The inner loops of the range coder: compiled by numba where it is installed, else by numpy over all lanes at once.

Both do the same, bit for bit. A state x of a lane lies in [2^16, 2^32); a token of frequency f that begins at slot s takes
it to (x // f) * 2^12 + s + x % f, after words of 16 bits have been put out so that this fits.
"""

import functools
from typing import Any

import numpy as np

SCALE_BITS = 12
LOW = 1 << 16
_SLICE = 1 << 18
"""Numbers whose raw bits numpy handles at a time."""


@functools.cache
def loops() -> Any | None:
    """The compiled loops; None where numba is not installed or does not work with this numpy, and numpy does their work."""
    try:
        from mtllama.weights import _compiled
    except ImportError:
        return None
    return _compiled


def encode(
    tokens: np.ndarray, contexts: np.ndarray, frequencies: np.ndarray, starts: np.ndarray, lanes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [size] in their contexts [size] -> last state of each lane [lanes] uint32, words uint16 as the decoder reads them."""
    states = np.full(lanes, LOW, np.uint32)
    if (compiled := loops()) is not None:
        words = np.empty(len(tokens) + lanes, np.uint16)
        count = compiled.encode(tokens, contexts, frequencies, starts, states, words)
        return states, words[:count][::-1].copy()
    parts = []
    for first in range((len(tokens) - 1) // lanes * lanes, -1, -lanes):
        row = slice(first, min(first + lanes, len(tokens)))
        chosen = contexts[row], tokens[row]
        frequency, state = frequencies[chosen].astype(np.uint32), states[: row.stop - first]
        full = (state >> np.uint32(20)) >= frequency
        parts.append((state[full] & np.uint32(0xFFFF)).astype(np.uint16))
        state = np.where(full, state >> np.uint32(16), state)
        high, rest = np.divmod(state, frequency)
        states[: row.stop - first] = (high << np.uint32(SCALE_BITS)) + rest + starts[chosen]
    return states, np.concatenate([*reversed(parts), np.empty(0, np.uint16)])


def decode(contexts: np.ndarray, table: np.ndarray, states: np.ndarray, words: np.ndarray, raw: bytes, out: np.ndarray) -> bool:
    """The numbers of a chunk into `out` [size]; False if the bytes end too early or are not used up.

    `table` [contexts, 4096] is `rans.Model.decoder`; `states` [lanes] are those of the encoder.
    """
    padded = np.frombuffer(raw + bytes(16 - len(raw) % 4), np.uint32)
    tokens = np.empty(len(out), np.uint8)
    if (compiled := loops()) is not None:
        ended = np.append(words, np.uint16(0))  # a word to read where there is none left
        if compiled.decode(contexts, table, states.copy(), ended, tokens) != len(words):
            return False
        used: int = compiled.unpack(tokens, padded, out)
        return 0 <= used <= 8 * len(raw) < used + 8
    return _decode_tokens(contexts, table, states.copy(), words, tokens) and _unpack_bits(tokens, padded.view(np.uint8), 8 * len(raw), out)


def pack_bits(numbers: np.ndarray, shifts: np.ndarray) -> bytes:
    """The lowest `shifts` [size] bits of each number, one behind the other, lowest first."""
    if (compiled := loops()) is not None:
        packed = np.zeros(int(shifts.sum(dtype=np.int64)) // 8 + 9, np.uint8)
        used = compiled.pack(numbers, shifts, packed)
        return packed[: -(-used // 8)].tobytes()
    bits = []
    for start in range(0, len(numbers), _SLICE):
        shift = shifts[start : start + _SLICE].astype(np.int64)
        within = np.arange(shift.sum()) - np.repeat(np.cumsum(shift) - shift, shift)
        repeated = np.repeat(numbers[start : start + _SLICE].astype(np.uint64), shift)
        bits.append(((repeated >> within.astype(np.uint64)) & np.uint64(1)).astype(np.uint8))
    return np.packbits(np.concatenate([*bits, np.empty(0, np.uint8)]), bitorder="little").tobytes()


def difference(base: np.ndarray, target: np.ndarray, sign: int) -> np.ndarray:
    """Zigzag (0, -1, 1, -2 ... -> 0, 1, 2, 3 ...) of the difference of two bit patterns [size], modulo 2^bits.

    `sign`: the sign bit of a float format, whose patterns are first mapped to the order of the numbers; 0 for whole numbers.
    """
    if (compiled := loops()) is not None:
        out = np.empty_like(target)
        compiled.difference(base, target, np.uint64(sign), out)
        return out
    change = (_ordered(target, sign) - _ordered(base, sign)).view(np.dtype(f"i{target.itemsize}"))
    zigzag: np.ndarray = ((change << 1) ^ (change >> (8 * change.itemsize - 1))).view(target.dtype)
    return zigzag


def restore(base: np.ndarray, numbers: np.ndarray, sign: int, out: np.ndarray | None = None) -> np.ndarray:
    """The target's patterns: the inverse of `difference`."""
    out = np.empty_like(base) if out is None else out
    if (compiled := loops()) is not None:
        compiled.restore(base, numbers, np.uint64(sign), out)
        return out
    one = numbers.dtype.type(1)
    ordered = _ordered(base, sign) + ((numbers >> one) ^ (~(numbers & one) + one))
    bit = ordered.dtype.type(sign)
    out[:] = ordered ^ np.where(ordered & bit, bit, ~ordered.dtype.type(0)) if sign else ordered
    return out


def _ordered(bits: np.ndarray, sign: int) -> np.ndarray:
    bit = bits.dtype.type(sign)
    mirrored: np.ndarray = bits ^ np.where(bits & bit, ~bits.dtype.type(0), bit) if sign else bits
    return mirrored


def tokens_of(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(token, number of raw bits) of each number. [size] uint8 each"""
    if (compiled := loops()) is not None:
        token, shift = np.empty(len(numbers), np.uint8), np.empty(len(numbers), np.uint8)
        compiled.tokens(numbers, token, shift)
        return token, shift
    bits = _bit_length(numbers).astype(np.int64)
    shifts = np.where(bits > 4, bits - 3, 0)
    heads = (numbers >> shifts.astype(numbers.dtype)).astype(np.int64) & 3
    return np.where(bits > 4, 16 + (bits - 5) * 4 + heads, numbers).astype(np.uint8), shifts.astype(np.uint8)


def _bit_length(numbers: np.ndarray) -> np.ndarray:
    """Bits of each number. A double holds 53, so eight-byte numbers are looked at in halves."""
    if numbers.itemsize <= 4:
        length: np.ndarray = np.frexp(numbers.astype(np.float64))[1]
        return length
    high = np.frexp((numbers >> np.uint64(32)).astype(np.float64))[1]
    low = np.frexp((numbers & np.uint64(0xFFFFFFFF)).astype(np.float64))[1]
    return np.where(high > 0, high + 32, low)


def count(tokens: np.ndarray, contexts: np.ndarray, num_contexts: int) -> np.ndarray:
    """How often each token stands in each context. [contexts, 256] int64"""
    if (compiled := loops()) is not None:
        counts = np.zeros((num_contexts, 256), np.int64)
        compiled.count(tokens, contexts, counts)
        return counts
    keys = contexts.astype(np.int64) << 8 | tokens
    return np.bincount(keys, minlength=num_contexts << 8).reshape(num_contexts, 256)


def look_up(bits: np.ndarray, shift: int, mask: int, table: np.ndarray) -> np.ndarray:
    """`table` at the field of each pattern that `shift` and `mask` cut out. [size]"""
    if (compiled := loops()) is not None:
        out = np.empty(len(bits), table.dtype)
        compiled.look_up(bits, np.uint64(shift), np.uint64(mask), table, out)
        return out
    found: np.ndarray = table[(bits >> bits.dtype.type(shift)) & bits.dtype.type(mask)]
    return found


def _decode_tokens(contexts: np.ndarray, table: np.ndarray, states: np.ndarray, words: np.ndarray, tokens: np.ndarray) -> bool:
    lanes, place = len(states), 0
    for first in range(0, len(contexts), lanes):
        row = slice(first, min(first + lanes, len(contexts)))
        state = states[: row.stop - first]
        entry = table[contexts[row], state & np.uint32((1 << SCALE_BITS) - 1)]
        tokens[row] = entry & np.uint32(255)
        state = (((entry >> np.uint32(8)) & np.uint32(4095)) + np.uint32(1)) * (state >> np.uint32(SCALE_BITS)) + (entry >> np.uint32(20))
        short = state < LOW
        count = int(np.count_nonzero(short))
        if place + count > len(words):
            return False
        state[short] = (state[short] << np.uint32(16)) | words[place : place + count]
        place += count
        states[: row.stop - first] = state
    return place == len(words) and bool((states == LOW).all())


def _unpack_bits(tokens: np.ndarray, raw: np.ndarray, num_bits: int, out: np.ndarray) -> bool:
    position = 0
    for start in range(0, len(tokens), _SLICE):
        token = tokens[start : start + _SLICE].astype(np.int64)
        large = token >= 16
        shift = np.where(large, (token - 16) // 4 + 2, 0)
        ends = position + np.cumsum(shift)
        position = int(ends[-1])
        if position > num_bits:
            return False
        begins, low = ends - shift, np.zeros(len(token), np.uint64)
        for byte in range(int((shift.max(initial=0) + 14) // 8)):
            offset = begins // 8 + byte
            value, back = raw[np.minimum(offset, len(raw) - 1)].astype(np.uint64), 8 * byte - begins % 8
            low |= np.where(back >= 0, value << np.maximum(back, 0).astype(np.uint64), value >> np.maximum(-back, 0).astype(np.uint64))
        low &= (np.uint64(1) << shift.astype(np.uint64)) - np.uint64(1)
        head = np.where(large, 4 | ((token - 16) & 3), 0).astype(np.uint64)
        out[start : start + _SLICE] = np.where(large, (head << shift.astype(np.uint64)) | low, token.astype(np.uint64)).astype(out.dtype)
    return num_bits - 8 < position <= num_bits or position == num_bits == 0
