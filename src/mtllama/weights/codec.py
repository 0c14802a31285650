"""The lossless difference of two tensors of one dtype and size, as few bytes, slice by slice.

Floating-point numbers of one sign are ordered like their bit patterns, so after a mapping that orders the negative
ones too, a small change of a weight is a small integer. That integer (modulo 2^bits) is zigzag-coded. How large it is
depends above all on the size of the weight itself, which both sides know: so it is range-coded with frequencies of its
own for each exponent of the base (level `default`). It depends too on how much the weight's row and column change, which
can be said in a byte each (level `small`). Or it is split into byte planes for zstandard (level `fast`).

No tensor is ever held whole: an `Encoder` looks at slices of `SLICE` weights and then codes them, a `Decoder` restores them.
"""

import functools
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import zstandard

from mtllama.weights import kernels, rans

Level = Literal["fast", "default", "small"]
LEVELS: tuple[Level, ...] = ("fast", "default", "small")
PLANES, EXPONENTS, CLASSES = 0, 1, 2
"""First byte of a foot: how the tensor is coded."""
SLICE = rans.CHUNK
ZSTD_LEVEL = 1
"""Higher ones cost much time for little on byte planes (docs/delta-format.md)."""
SMALL = 4096
"""Fewer weights are coded in planes at every level: frequencies would cost more than they save."""
RARE = 1024
"""An exponent that stands in fewer weights of a tensor (and in less than a thousandth of them) shares frequencies with its neighbour."""
NUM_CLASSES = 8
"""Classes of weights by how much their row and column change."""
STEPS = 4
"""Steps of an octave in which the changes of rows and columns are written."""
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_MANTISSA = {
    torch.float64: (52, 11),
    torch.float32: (23, 8),
    torch.float16: (10, 5),
    torch.bfloat16: (7, 8),
    torch.float8_e4m3fn: (3, 4),
    torch.float8_e5m2: (2, 5),
}
"""Bits of mantissa and exponent of each float format."""
Damaged = rans.Damaged


def bits(tensor: torch.Tensor) -> np.ndarray:
    """The bit patterns, flat and unsigned (native order is little-endian, as in safetensors)."""
    flat: np.ndarray = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return flat.view(UNSIGNED[tensor.dtype.itemsize])


def slices(size: int) -> list[slice]:
    """The slices of a tensor of `size` weights, in order."""
    return [slice(start, min(start + SLICE, size)) for start in range(0, size, SLICE)]


class Encoder:
    """Codes one tensor. Call `look` for every slice and `learn` with what it returned, `passes` times; then `code` for
    every slice, and `foot`. `look` and `code` may run in threads; what they return belongs in the order of the slices.
    """

    def __init__(self, dtype: torch.dtype, shape: tuple[int, ...], level: Level = "default", *, alone: bool = False) -> None:
        """`alone`: there is no base, so its exponents say nothing."""
        size = torch.Size(shape).numel()
        self._dtype = dtype
        self._contexts: _Contexts | None = None
        self._scales: tuple[np.ndarray, np.ndarray] | None = None
        self._model: rans.Model | None = None
        if level == "fast" or alone or size < SMALL:
            self.passes = 1
            return
        self._contexts = _Contexts(dtype)
        columns = size // shape[0]
        scaled = level == "small" and dtype.is_floating_point and shape[0] > 1 and 1 < columns <= SLICE
        self.passes = 2 if scaled else 1
        if scaled:
            self._scales = np.zeros(shape[0]), np.zeros(columns)

    def look(self, part: slice, before: np.ndarray, after: np.ndarray) -> Any:
        """What `learn` needs of the patterns [size] of one slice."""
        if self._contexts is None:
            return None
        if self._scales and self._contexts.classes is None:
            return part, changes(before, after, self._dtype)
        tokens, _ = kernels.tokens_of(kernels.difference(before, after, sign_bit(self._dtype)))
        return self._contexts.count(tokens, part, before)

    def learn(self, seen: Iterable[Any]) -> None:
        """Take in one pass over all slices."""
        if self._contexts is None:
            for _ in seen:
                pass
        elif self._scales and self._contexts.classes is None:
            rows, columns = self._scales
            for part, change in seen:
                row, column = np.divmod(np.arange(part.start, part.stop), len(columns))
                rows += np.bincount(row, change, len(rows))
                columns += np.bincount(column, change, len(columns))
            self._contexts.classes = Classes.of(rows / len(columns), columns / len(rows))
        else:
            self._model = self._contexts.settle(sum(seen))

    def code(self, part: slice, before: np.ndarray, after: np.ndarray) -> bytes:
        """The bytes of one slice."""
        numbers = kernels.difference(before, after, sign_bit(self._dtype))
        if self._contexts is None or self._model is None:
            return _compress(numbers)
        return rans.encode_chunk(numbers, self._contexts.of(part, before), self._model)

    def foot(self, sizes: list[int]) -> bytes:
        """What stands behind the slices, whose bytes are `sizes`."""
        if self._contexts is None or self._model is None:
            coding, about = PLANES, b""
        else:
            coding = EXPONENTS if self._contexts.classes is None else CLASSES
            about = self._contexts.to_bytes() + self._model.to_bytes()
        rest = struct.pack(f"<BI{len(sizes)}I", coding, len(sizes), *sizes) + about
        return rest + struct.pack("<I", len(rest))


FOOT_SIZE = 4
"""Bytes at the very end that tell how many bytes of foot stand before them."""


class Decoder:
    """Restores one tensor from the slices that an `Encoder` wrote. Raises `Damaged` for other bytes."""

    def __init__(self, dtype: torch.dtype, shape: tuple[int, ...], foot: bytes, num_bytes: int) -> None:
        """`foot`: without its last `FOOT_SIZE` bytes; `num_bytes`: of all slices."""
        self._dtype, size = dtype, torch.Size(shape).numel()
        try:
            coding, count = struct.unpack_from("<BI", foot)
            sizes = struct.unpack_from(f"<{count}I", foot, 5) if count == len(slices(size)) else None
        except struct.error as error:
            raise Damaged("it is cut off") from error
        if sizes is None or sum(sizes) != num_bytes:
            raise Damaged("it is cut off, or of a tensor of another size")
        ends = np.cumsum(sizes, dtype=np.int64).tolist()
        self.spans: list[tuple[int, int]] = list(zip([0, *ends[:-1]], ends, strict=True)) if ends else []
        """Where the bytes of each slice begin and end."""
        self._contexts: _Contexts | None = None
        rest = memoryview(foot)[5 + 4 * count :]
        if coding in (EXPONENTS, CLASSES):
            self._contexts, rest = _Contexts.from_bytes(rest, dtype, shape if coding == CLASSES else None)
            model, rest = rans.Model.from_bytes(rest, len(self._contexts))
            self._table = model.decoder()
        elif coding != PLANES:
            raise Damaged("no known way of coding")
        if rest:
            raise Damaged("its foot is too long")

    def decode(self, part: slice, before: np.ndarray, data: memoryview) -> np.ndarray:
        """The target's patterns [size] of one slice, given the base's."""
        if self._contexts is None:
            numbers = _decompress(data, before.dtype, before.size)
        else:
            numbers = np.empty_like(before)
            rans.decode_chunk(data, self._contexts.of(part, before), self._table, numbers)
        return kernels.restore(before, numbers, sign_bit(self._dtype))


@dataclass(frozen=True)
class Classes:
    """Which weights of a matrix change much: by a byte for each row and column, on a scale of steps of an octave."""

    rows: np.ndarray  # [rows] uint8
    columns: np.ndarray  # [columns] uint8
    bounds: np.ndarray  # [NUM_CLASSES - 1] uint16: first sum of a row's and a column's byte that belongs to class 1, 2, ...

    @classmethod
    def of(cls, rows: np.ndarray, columns: np.ndarray) -> "Classes":
        """From the mean changes of each row and column; the classes hold about equally many weights."""
        rows, columns = _steps(rows), _steps(columns)
        counts = np.convolve(np.bincount(rows, minlength=256), np.bincount(columns, minlength=256))  # of each sum of two bytes
        shares = np.cumsum(counts) / counts.sum()
        bounds = np.searchsorted(shares, np.arange(1, NUM_CLASSES) / NUM_CLASSES) + 1
        return cls(rows, columns, bounds.astype("<u2"))

    def of_slice(self, part: slice) -> np.ndarray:
        """The class of each weight of a slice. [size] uint16"""
        width = len(self.columns)
        first, last = part.start // width, -(-part.stop // width)
        table = np.searchsorted(self.bounds, np.arange(511), "right").astype(np.uint16)
        matrix = table[self.rows[first:last, None].astype(np.uint16) + self.columns]
        flat: np.ndarray = matrix.reshape(-1)
        return flat[part.start - first * width : part.stop - first * width]


def _steps(means: np.ndarray) -> np.ndarray:
    """Mean changes in steps of an octave below the largest one, which is 255; no change is 0."""
    means = np.minimum(means, np.finfo(means.dtype).max)  # a sum of the largest numbers overflows
    with np.errstate(divide="ignore"):
        below = np.round(STEPS * (np.log2(means) - np.log2(means.max() or 1)))
    return np.where(means > 0, np.clip(255 + below, 1, 255), 0).astype(np.uint8)


class _Contexts:
    """What is known of each weight before its number: the exponent of the base, and the class, if there are classes."""

    def __init__(self, dtype: torch.dtype) -> None:
        mantissa, exponent = _MANTISSA.get(dtype, (0, 0))
        self._shift, self._mask = mantissa, (1 << exponent) - 1
        self.firsts = list(range(self._mask + 1))
        """The first exponent of each context."""
        self.classes: Classes | None = None
        self._table = np.arange(self._mask + 1, dtype=np.uint16)

    def __len__(self) -> int:
        return len(self.firsts) * (NUM_CLASSES if self.classes else 1)

    def of(self, part: slice, before: np.ndarray) -> np.ndarray:
        """The context of each weight of a slice. [size] uint16"""
        found = kernels.look_up(before, self._shift, self._mask, self._table)
        if self.classes:
            found += self.classes.of_slice(part) * np.uint16(len(self.firsts))
        return found

    def count(self, tokens: np.ndarray, part: slice, before: np.ndarray) -> np.ndarray:
        """How often each token stands in each context. [contexts, 256]"""
        return kernels.count(tokens, self.of(part, before), len(self))

    def settle(self, counts: np.ndarray) -> rans.Model:
        """Join rare exponents, and drop the classes if they do not pay; the frequencies of what is left."""
        counts = counts.reshape(-1, self._mask + 1, 256)
        joined = np.add.reduceat(counts, self._join(_merged(counts.sum(axis=(0, 2)))), axis=1).reshape(-1, 256)
        if self.classes:
            plain = joined.reshape(NUM_CLASSES, -1, 256).sum(axis=0)
            extra = len(_classes_to_bytes(self.classes))
            if _cost(plain) <= _cost(joined) + 8 * extra:
                self.classes, joined = None, plain
        return rans.Model.of(joined)

    def _join(self, firsts: list[int]) -> list[int]:
        self.firsts = firsts
        self._table = (np.searchsorted(firsts, np.arange(self._mask + 1), "right") - 1).astype(np.uint16)
        return firsts

    def to_bytes(self) -> bytes:
        """As the format has them."""
        return struct.pack(f"<H{len(self.firsts)}H", len(self.firsts), *self.firsts) + (
            _classes_to_bytes(self.classes) if self.classes else b""
        )

    @classmethod
    def from_bytes(cls, data: memoryview, dtype: torch.dtype, shape: tuple[int, ...] | None) -> tuple["_Contexts", memoryview]:
        """The inverse of `to_bytes` and what stands behind; with a `shape` there are classes."""
        contexts = cls(dtype)
        try:
            (count,) = struct.unpack_from("<H", data)
            firsts = list(struct.unpack_from(f"<{count}H", data, 2))
        except struct.error as error:
            raise Damaged("it is cut off") from error
        if not firsts or firsts[0] or firsts != sorted(set(firsts)) or firsts[-1] > contexts._mask:
            raise Damaged("its exponents are out of order")
        contexts._join(firsts)
        data = data[2 + 2 * count :]
        if shape is not None:
            contexts.classes, data = _classes_from_bytes(data, shape)
        return contexts, data


def _classes_to_bytes(classes: Classes) -> bytes:
    scales = zstandard.ZstdCompressor(level=19).compress(classes.rows.tobytes() + classes.columns.tobytes())
    return classes.bounds.tobytes() + struct.pack("<I", len(scales)) + scales


def _classes_from_bytes(data: memoryview, shape: tuple[int, ...]) -> tuple[Classes, memoryview]:
    start, rows = 2 * (NUM_CLASSES - 1), shape[0] if shape else 0
    columns = torch.Size(shape).numel() // max(1, rows)
    if not 0 < columns <= SLICE or len(data) < start + 4:
        raise Damaged("it is of a tensor of another shape")
    (size,) = struct.unpack_from("<I", data, start)
    scales = _unzstd(data[start + 4 : start + 4 + size], rows + columns)
    bounds = np.frombuffer(data[:start], "<u2")
    return Classes(scales[:rows], scales[rows:], bounds), data[start + 4 + size :]


def _cost(counts: np.ndarray) -> float:
    """Bits of tokens with these counts [contexts, 256], and of their frequencies."""
    used = counts > 0
    totals = counts.sum(axis=1, keepdims=True)
    content = np.where(used, counts * (np.log2(np.maximum(totals, 1)) - np.log2(np.maximum(counts, 1))), 0).sum()
    return float(content + rans.BITS_PER_FREQUENCY * used.sum())


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


def sign_bit(dtype: torch.dtype) -> int:
    """The sign bit of a float format; 0 for whole numbers, whose patterns are in order."""
    return 1 << (8 * dtype.itemsize - 1) if dtype.is_floating_point else 0


def changes(before: np.ndarray, after: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Absolute differences of the numbers; 0 where one is not finite. [size]"""
    with np.errstate(invalid="ignore", over="ignore"):
        found: np.ndarray = np.abs(np.nan_to_num(values(after, dtype) - values(before, dtype), nan=0, posinf=0, neginf=0))
    return found


def values(patterns: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """The numbers that patterns stand for, near enough for statistics. [size] float32 or float64"""
    if dtype == torch.bfloat16:
        found: np.ndarray = patterns.astype(np.uint32) << 16
        return found.view(np.float32)
    if dtype.is_floating_point and dtype.itemsize == 1:
        found = _of_bytes(dtype)[patterns]
        return found
    kind = f"f{dtype.itemsize}" if dtype.is_floating_point else "u1" if dtype in (torch.bool, torch.uint8) else f"i{dtype.itemsize}"
    return patterns.view(kind).astype(np.float64 if dtype.itemsize == 8 else np.float32)


@functools.cache
def _of_bytes(dtype: torch.dtype) -> np.ndarray:
    found: np.ndarray = torch.arange(256, dtype=torch.uint8).view(dtype).float().numpy()
    return found


def _compress(flat: np.ndarray) -> bytes:
    planes = np.ascontiguousarray(flat.view(np.uint8).reshape(-1, flat.itemsize).T)
    return zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_content_size=True).compress(planes.data)


def _decompress(data: memoryview, dtype: np.dtype, size: int) -> np.ndarray:
    planes = _unzstd(data, size * dtype.itemsize)
    interleaved = planes.reshape(dtype.itemsize, size).T
    return np.ascontiguousarray(interleaved).reshape(-1).view(dtype)


def _unzstd(data: memoryview, size: int) -> np.ndarray:
    try:
        if zstandard.frame_content_size(data) != size:
            raise Damaged(f"it holds {zstandard.frame_content_size(data)} bytes where {size} are needed")
        content = zstandard.ZstdDecompressor().decompress(data, max_output_size=size)
    except zstandard.ZstdError as error:
        raise Damaged(str(error)) from error
    if len(content) != size:
        raise Damaged(f"it holds {len(content)} bytes where {size} are needed")
    return np.frombuffer(content, np.uint8)
