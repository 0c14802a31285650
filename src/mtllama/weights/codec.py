"""The lossless difference of two tensors of one dtype and shape, as few bytes.

Floating-point numbers of one sign are ordered like their bit patterns, so after a mapping that orders the negative
ones too, a small change of a weight is a small integer. That integer (modulo 2^bits) is zigzag-coded. How large it is
depends above all on the size of the weight itself, which both sides know: so it is range-coded with frequencies of its
own for each exponent of the base (level `default`), or split into byte planes for zstandard (level `fast`).
"""

import functools
import struct
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import torch
import zstandard

from mtllama.errors import UserError
from mtllama.weights import kernels, rans

Level = Literal["fast", "default"]
LEVELS: tuple[Level, ...] = ("fast", "default")
PLANES, EXPONENTS = 0, 1
"""First byte of a coded tensor: how it is coded."""
ZSTD_LEVEL = 1
"""Higher ones cost much time for little on byte planes (docs/delta-format.md)."""
SMALL = 4096
"""Fewer weights are coded in planes at every level: frequencies would cost more than they save."""
RARE = 1024
"""An exponent that stands in fewer weights of a tensor (and in less than a thousandth of them) shares frequencies with its neighbour."""
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_MANTISSA = {
    torch.float64: (52, 11),
    torch.float32: (23, 8),
    torch.float16: (10, 5),
    torch.bfloat16: (7, 8),
    torch.float8_e4m3fn: (3, 4),
    torch.float8_e5m2: (2, 5),
}
"""Bits of mantissa and exponent of each float format."""

Map = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]


def encode(base: torch.Tensor, target: torch.Tensor, level: Level = "default", pool: ThreadPoolExecutor | None = None) -> bytes:
    """The difference `target - base` in ordered bit patterns, coded; the threads of `pool` share the work."""
    assert base.dtype == target.dtype and base.shape == target.shape, "encode compares tensors of one kind"
    before, after, sign = _bits(base), _bits(target), _sign(target.dtype)
    if level == "fast" or len(before) < SMALL:
        return bytes([PLANES]) + _compress(kernels.difference(before, after, sign))
    return bytes([EXPONENTS]) + _encode_by_exponent(before, after, base.dtype, _map(pool))


def decode(base: torch.Tensor, data: bytes, where: str, pool: ThreadPoolExecutor | None = None) -> torch.Tensor:
    """The target, bit for bit: the inverse of `encode`. `where` names the tensor in errors."""
    before, sign = _bits(base), _sign(base.dtype)
    if data[:1] == bytes([PLANES]):
        restored = kernels.restore(before, _decompress(data[1:], before.dtype, before.size, where), sign)
    elif data[:1] == bytes([EXPONENTS]):
        try:
            restored = _decode_by_exponent(before, memoryview(data)[1:], base.dtype, _map(pool))
        except rans.Damaged as error:
            raise UserError(f"{where}: the delta is damaged ({error}); fetch or make it again") from error
    else:
        raise UserError(f"{where}: the delta is damaged (no known way of coding); fetch or make it again")
    return torch.from_numpy(restored.view(np.uint8)).view(base.dtype).reshape(base.shape)


def encode_whole(target: torch.Tensor) -> bytes:
    """A tensor that has no counterpart in the base, compressed alone."""
    return _compress(_bits(target))


def decode_whole(data: bytes, dtype: torch.dtype, shape: tuple[int, ...], where: str) -> torch.Tensor:
    """The inverse of `encode_whole`."""
    unsigned = _UNSIGNED[dtype.itemsize]
    flat = _decompress(data, np.dtype(unsigned), torch.Size(shape).numel(), where)
    return torch.from_numpy(flat.view(np.uint8)).view(dtype).reshape(shape)


def _map(pool: ThreadPoolExecutor | None) -> Map:
    return map if pool is None else pool.map


def _bits(tensor: torch.Tensor) -> np.ndarray:
    """The bit patterns, flat and unsigned (native order is little-endian, as in safetensors)."""
    flat: np.ndarray = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return flat.view(_UNSIGNED[tensor.dtype.itemsize])


def _sign(dtype: torch.dtype) -> int:
    """The sign bit of a float format; 0 for whole numbers, whose patterns are in order."""
    return 1 << (8 * dtype.itemsize - 1) if dtype.is_floating_point else 0


def _field(dtype: torch.dtype) -> tuple[int, int]:
    """Where the exponent stands in a pattern: shift and mask."""
    mantissa, exponent = _MANTISSA.get(dtype, (0, 0))
    return mantissa, (1 << exponent) - 1


def _slices(size: int) -> list[slice]:
    return [slice(start, min(start + rans.CHUNK, size)) for start in range(0, size, rans.CHUNK)]


def _encode_by_exponent(before: np.ndarray, after: np.ndarray, dtype: torch.dtype, map: Map) -> bytes:
    """Two passes over the slices, so that no more than a slice a thread is held: count, then code."""
    sign, (shift, mask) = _sign(dtype), _field(dtype)
    every = np.arange(mask + 1, dtype=np.uint16)

    def count(part: slice) -> np.ndarray:
        tokens, _ = kernels.tokens_of(kernels.difference(before[part], after[part], sign))
        return kernels.count(tokens, kernels.look_up(before[part], shift, mask, every), mask + 1)

    counts = functools.reduce(np.add, map(count, _slices(len(before))))
    firsts = _merged(counts.sum(axis=1))
    model = rans.Model.of(np.add.reduceat(counts, firsts, axis=0))
    contexts = _contexts(firsts, mask)

    def code(part: slice) -> bytes:
        numbers = kernels.difference(before[part], after[part], sign)
        return rans.encode_chunk(numbers, kernels.look_up(before[part], shift, mask, contexts), model)

    chunks = list(map(code, _slices(len(before))))
    head = struct.pack(f"<HI{len(firsts)}H{len(chunks)}I", len(firsts), len(chunks), *firsts, *(len(chunk) for chunk in chunks))
    return b"".join([head, model.to_bytes(), *chunks])


def _decode_by_exponent(before: np.ndarray, data: memoryview, dtype: torch.dtype, map: Map) -> np.ndarray:
    sign, (shift, mask) = _sign(dtype), _field(dtype)
    parts = _slices(len(before))
    try:
        num_contexts, num_chunks = struct.unpack_from("<HI", data)
        if num_chunks != len(parts) or not 1 <= num_contexts <= mask + 1:
            raise rans.Damaged("it is of a tensor of another size")
        numbers = struct.unpack_from(f"<{num_contexts}H{num_chunks}I", data, 6)
    except struct.error as error:
        raise rans.Damaged("it is cut off") from error
    firsts, sizes = list(numbers[:num_contexts]), numbers[num_contexts:]
    if firsts[0] or firsts != sorted(set(firsts)) or firsts[-1] > mask:
        raise rans.Damaged("its exponents are out of order")
    model, data = rans.Model.from_bytes(data[6 + 2 * num_contexts + 4 * num_chunks :], num_contexts)
    ends = np.cumsum(sizes)
    if ends[-1] != len(data):
        raise rans.Damaged("it is cut off")
    table, contexts, restored = model.decoder(), _contexts(firsts, mask), np.empty_like(before)

    def restore(number: int) -> None:
        part, chunk = parts[number], data[ends[number] - sizes[number] : ends[number]]
        found = np.empty(part.stop - part.start, before.dtype)
        rans.decode_chunk(chunk, kernels.look_up(before[part], shift, mask, contexts), table, found)
        kernels.restore(before[part], found, sign, restored[part])

    for _ in map(restore, range(len(parts))):
        pass
    return restored


def _merged(counts: np.ndarray) -> list[int]:
    """The first exponent of each context: neighbours are joined until a context is not rare. [contexts], beginning with 0"""
    enough = min(RARE, max(1, int(counts.sum()) // 1000))
    firsts, held = [0], 0
    for exponent, count in enumerate(counts.tolist()):
        if held >= enough and counts[exponent:].sum() >= enough:
            firsts.append(exponent)
            held = 0
        held += count
    return firsts


def _contexts(firsts: list[int], mask: int) -> np.ndarray:
    """The context of each exponent. [mask + 1] uint16"""
    return (np.searchsorted(firsts, np.arange(mask + 1), "right") - 1).astype(np.uint16)


def _compress(flat: np.ndarray) -> bytes:
    planes = np.ascontiguousarray(flat.view(np.uint8).reshape(-1, flat.itemsize).T)
    return zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_content_size=True).compress(planes.data)


def _decompress(data: bytes, dtype: np.dtype, size: int, where: str) -> np.ndarray:
    expected = size * dtype.itemsize
    try:
        if zstandard.frame_content_size(data) != expected:
            raise UserError(f"{where}: the delta holds {zstandard.frame_content_size(data)} bytes, {expected} are needed")
        planes = zstandard.ZstdDecompressor().decompress(data, max_output_size=expected)
    except zstandard.ZstdError as error:
        raise UserError(f"{where}: the delta is damaged ({error}); fetch or make it again") from error
    if len(planes) != expected:
        raise UserError(f"{where}: the delta holds {len(planes)} bytes, {expected} are needed")
    interleaved = np.frombuffer(planes, np.uint8).reshape(dtype.itemsize, size).T
    return interleaved.copy().reshape(-1).view(dtype)  # a copy even of one plane: tensors must be writable
