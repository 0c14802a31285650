"""The lossless difference of two tensors of one dtype and shape, as few bytes.

Floating-point numbers of one sign are ordered like their bit patterns, so after a mapping that orders the negative
ones too, a small change of a weight is a small integer. That integer (modulo 2^bits) is zigzag-coded, split into
byte planes, of which the high ones are almost all zero, and compressed with zstandard.
"""

import numpy as np
import torch
import zstandard

from mtllama.errors import UserError

LEVEL = 1
"""zstandard level; higher ones cost much time for little on byte planes (docs/delta-format.md)."""
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def encode(base: torch.Tensor, target: torch.Tensor) -> bytes:
    """The difference `target - base` in ordered bit patterns, compressed."""
    assert base.dtype == target.dtype and base.shape == target.shape, "encode compares tensors of one kind"
    difference = _ordered(target) - _ordered(base)  # modulo 2^bits
    return _compress(_zigzag(difference))


def decode(base: torch.Tensor, data: bytes, where: str) -> torch.Tensor:
    """The target, bit for bit: the inverse of `encode`. `where` names the tensor in errors."""
    bits = _ordered(base)
    difference = _unzigzag(_decompress(data, bits.dtype, bits.size, where))
    restored = _from_ordered(bits + difference, base.dtype)
    return torch.from_numpy(restored).view(base.dtype).reshape(base.shape)


def encode_whole(target: torch.Tensor) -> bytes:
    """A tensor that has no counterpart in the base, compressed alone."""
    return _compress(_bits(target))


def decode_whole(data: bytes, dtype: torch.dtype, shape: tuple[int, ...], where: str) -> torch.Tensor:
    """The inverse of `encode_whole`."""
    unsigned = _UNSIGNED[dtype.itemsize]
    flat = _decompress(data, np.dtype(unsigned), torch.Size(shape).numel(), where)
    return torch.from_numpy(flat.view(np.uint8)).view(dtype).reshape(shape)


def _bits(tensor: torch.Tensor) -> np.ndarray:
    """The bit patterns, flat and unsigned (native order is little-endian, as in safetensors)."""
    flat: np.ndarray = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return flat.view(_UNSIGNED[tensor.dtype.itemsize])


def _ordered(tensor: torch.Tensor) -> np.ndarray:
    """Bit patterns mapped so that their order is that of the numbers: negative floats are mirrored."""
    bits = _bits(tensor)
    if not tensor.is_floating_point():
        return bits
    sign = bits.dtype.type(1 << (8 * bits.itemsize - 1))
    mirrored: np.ndarray = bits ^ np.where(bits & sign, ~bits.dtype.type(0), sign)
    return mirrored


def _from_ordered(ordered: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    if dtype.is_floating_point:
        sign = ordered.dtype.type(1 << (8 * ordered.itemsize - 1))
        ordered = ordered ^ np.where(ordered & sign, sign, ~ordered.dtype.type(0))
    return ordered.view(np.uint8)


def _zigzag(difference: np.ndarray) -> np.ndarray:
    """0, -1, 1, -2, 2 ... -> 0, 1, 2, 3, 4 ..., so that small differences of both signs have zero high bytes."""
    signed = difference.view(np.dtype(f"i{difference.itemsize}"))
    return ((signed << 1) ^ (signed >> (8 * signed.itemsize - 1))).view(difference.dtype)


def _unzigzag(coded: np.ndarray) -> np.ndarray:
    one = coded.dtype.type(1)
    difference: np.ndarray = (coded >> one) ^ (~(coded & one) + one)
    return difference


def _compress(flat: np.ndarray) -> bytes:
    planes = np.ascontiguousarray(flat.view(np.uint8).reshape(-1, flat.itemsize).T)
    return zstandard.ZstdCompressor(level=LEVEL, write_content_size=True).compress(planes.data)


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
