"""The loops of `kernels` for numba, which compiles them when they are first called and keeps the result."""

import numba
import numpy as np

_COMPILE = numba.njit(nogil=True, cache=True)


@_COMPILE
def encode(tokens, contexts, frequencies, starts, states, words):  # type: ignore[no-untyped-def]
    """Words come out last one first; returns their number."""
    lanes, count = len(states), 0
    for i in range(len(tokens) - 1, -1, -1):
        lane = i & (lanes - 1)
        frequency = np.uint32(frequencies[contexts[i], tokens[i]])
        state = states[lane]
        if (state >> np.uint32(20)) >= frequency:
            words[count] = np.uint16(state & np.uint32(0xFFFF))
            count += 1
            state >>= np.uint32(16)
        high = state // frequency
        states[lane] = np.uint32((high << np.uint32(12)) + (state - high * frequency) + np.uint32(starts[contexts[i], tokens[i]]))
    return count


@_COMPILE
def decode(contexts, table, states, words, out):  # type: ignore[no-untyped-def]
    """Tokens into `out`; returns the number of words read, or -1. Without branches: which lane is short is chance."""
    lanes, place, last = len(states), np.int64(0), np.int64(len(words) - 1)
    whole = len(out) // lanes * lanes
    begin, end, width = 0, whole, lanes
    for _ in range(2):  # the whole rows, then the rest: the width of a row does not change within the loops
        for first in range(begin, end, lanes):
            for lane in range(width):
                i = first + lane
                state = states[lane]
                entry = table[contexts[i], state & np.uint32(4095)]
                frequency = ((entry >> np.uint32(8)) & np.uint32(4095)) + np.uint32(1)
                state = np.uint32(frequency * (state >> np.uint32(12)) + (entry >> np.uint32(20)))
                short = state < np.uint32(65536)
                word = np.uint32(words[min(place, last)])
                state = np.uint32((state << np.uint32(16)) | word) if short else state
                place += short
                states[lane] = state
                out[i] = np.uint8(entry)
        begin, end, width = whole, len(out), len(out) - whole
    for state in states:
        if state != np.uint32(65536):
            return -1
    return place


@_COMPILE
def unpack(tokens, raw, out):  # type: ignore[no-untyped-def]
    """Numbers of tokens and raw bits into `out`; returns the number of bits read, or -1.

    At least 32 bits are held, so that one step is enough for all but 8-byte numbers; without branches that are chance.
    """
    heads, shifts = np.zeros(256, np.uint64), np.zeros(256, np.uint64)
    for token in range(256):
        if token < 16:
            heads[token] = token
        else:
            shifts[token] = ((token - 16) >> 2) + 2
            heads[token] = np.uint64(4 | ((token - 16) & 3)) << shifts[token]
    taken, have, held, words = 0, np.uint64(0), np.uint64(0), len(raw)
    for i in range(len(out)):
        if have < np.uint64(32) and taken < words:
            held |= np.uint64(raw[taken]) << have
            have += np.uint64(32)
            taken += 1
        shift = shifts[tokens[i]]
        step = min(shift, np.uint64(32))
        if have < step:
            return -1
        value = held & ((np.uint64(1) << step) - np.uint64(1))
        held >>= step
        have -= step
        if shift > step:  # numbers of 8 bytes
            if have < np.uint64(32) and taken < words:
                held |= np.uint64(raw[taken]) << have
                have += np.uint64(32)
                taken += 1
            rest = shift - step
            if have < rest:
                return -1
            value |= (held & ((np.uint64(1) << rest) - np.uint64(1))) << step
            held >>= rest
            have -= rest
        out[i] = heads[tokens[i]] | value
    return taken * 32 - np.int64(have)


@_COMPILE
def pack(numbers, shifts, packed):  # type: ignore[no-untyped-def]
    """Returns the bits written."""
    held, have, place, total = np.uint64(0), np.uint64(0), 0, 0
    for i in range(len(numbers)):
        left = np.uint64(shifts[i])
        total += shifts[i]
        value = np.uint64(numbers[i])
        while left > np.uint64(0):
            step = min(left, np.uint64(32))
            held |= (value & ((np.uint64(1) << step) - np.uint64(1))) << have
            have += step
            value >>= step
            left -= step
            while have >= np.uint64(8):
                packed[place] = np.uint8(held & np.uint64(255))
                held >>= np.uint64(8)
                have -= np.uint64(8)
                place += 1
    if have > np.uint64(0):
        packed[place] = np.uint8(held)
    return total


@_COMPILE
def difference(base, target, sign, out):  # type: ignore[no-untyped-def]
    """Zigzag of the difference of ordered patterns; `sign` is the sign bit, or 0 for patterns that are in order already."""
    bits = np.uint64(8 * out.itemsize)
    for i in range(len(out)):
        before, after = np.uint64(base[i]), np.uint64(target[i])
        if sign != np.uint64(0):
            before ^= np.uint64(0xFFFFFFFFFFFFFFFF) if before & sign else sign
            after ^= np.uint64(0xFFFFFFFFFFFFFFFF) if after & sign else sign
        change = (after - before) << (np.uint64(64) - bits)
        flip = np.uint64(0xFFFFFFFFFFFFFFFF) if change >> np.uint64(63) else np.uint64(0)
        out[i] = ((change << np.uint64(1)) ^ flip) >> (np.uint64(64) - bits) if bits < np.uint64(64) else (change << np.uint64(1)) ^ flip


@_COMPILE
def restore(base, numbers, sign, out):  # type: ignore[no-untyped-def]
    """The inverse of `difference`."""
    for i in range(len(out)):
        before, number = np.uint64(base[i]), np.uint64(numbers[i])
        change = (number >> np.uint64(1)) ^ (np.uint64(0) - (number & np.uint64(1)))
        if sign != np.uint64(0):
            before ^= np.uint64(0xFFFFFFFFFFFFFFFF) if before & sign else sign
            after = before + change
            after ^= sign if after & sign else np.uint64(0xFFFFFFFFFFFFFFFF)
        else:
            after = before + change
        out[i] = after


@_COMPILE
def tokens(numbers, token, shift):  # type: ignore[no-untyped-def]
    """Token and number of raw bits of each number."""
    for i in range(len(numbers)):
        number = np.uint64(numbers[i])
        if number < np.uint64(16):
            token[i], shift[i] = number, 0
            continue
        bits, left = np.uint64(1), number
        for step in (32, 16, 8, 4, 2, 1):
            if left >> np.uint64(step):
                bits += np.uint64(step)
                left >>= np.uint64(step)
        shift[i] = bits - np.uint64(3)
        token[i] = np.uint64(16) + (bits - np.uint64(5)) * np.uint64(4) + ((number >> (bits - np.uint64(3))) & np.uint64(3))


@_COMPILE
def count(tokens, contexts, counts):  # type: ignore[no-untyped-def]
    """How often each token stands in each context, added to `counts`."""
    for i in range(len(tokens)):
        counts[contexts[i], tokens[i]] += 1


@_COMPILE
def look_up(bits, shift, mask, table, out):  # type: ignore[no-untyped-def]
    """`table` at a field of each pattern."""
    for i in range(len(out)):
        out[i] = table[(np.uint64(bits[i]) >> shift) & mask]
