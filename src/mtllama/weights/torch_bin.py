"""Where each tensor of a torch `.bin` checkpoint lies, from its pickles alone: no data is read, and nothing of the file is run.

A pickle is a program, and a downloaded one is a stranger's. The machine that runs it here has only the instructions that
`torch.save` writes, knows only the names of `_NAMES`, and calls only this module's functions, which write down what they are given.
Whatever else a file holds is refused. Sizes, strides and offsets are checked against the file; the data's checksums are not.
"""

import io
import math
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mtllama.errors import UserError

MOST_BYTES = 4 << 20
"""Most bytes read of a file. A tensor takes about 300, so this is for over 10,000 tensors; objects take up to 100 times their pickle."""
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # how a pre-zip file begins


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    """In elements; 0 where a dimension repeats its data, so that a tensor may be larger than its file."""
    offset: int
    """Of its first element, in bytes from the beginning of the file."""


class _RefusedError(Exception):
    """What a file holds that is not wanted there."""


def _expect(holds: bool, found: str) -> None:
    if not holds:
        raise _RefusedError(found)


def _plain(text: str) -> str:
    """A file's own words, short and on one line, without what a terminal would obey."""
    return ascii(text)[1:-1][:120]


def _is_size(number: Any) -> bool:
    return type(number) is int and 0 <= number < 1 << 63  # torch holds sizes in 64 bits


@dataclass(frozen=True)
class _Storage:
    """A run of data that tensors are views of."""

    key: str
    dtype: torch.dtype
    count: int


@dataclass(frozen=True, eq=False)
class _Tensor:
    """What a pickle says of a tensor: anything, until `_place` has looked at it."""

    storage: Any
    offset: Any
    shape: Any
    stride: Any
    dtype: Any


def _rebuild(storage: Any, offset: Any, shape: Any, stride: Any, grad: Any = None, hooks: Any = None, metadata: Any = None) -> _Tensor:
    return _rebuild_v3(storage, offset, shape, stride, grad, hooks, getattr(storage, "dtype", None), metadata)


def _rebuild_v3(storage: Any, offset: Any, shape: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, metadata: Any = None) -> _Tensor:
    _expect(not metadata, "it holds a negated or conjugated view, whose values are not those of its data")
    return _Tensor(storage, offset, shape, stride, dtype)


def _ordered_dict() -> dict[str, Any]:
    return {}  # without arguments: they would be hashed


_NAMES: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _ordered_dict,
    ("torch._utils", "_rebuild_tensor"): _rebuild,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_v3,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, grad, hooks: tensor,
    ("torch", "DoubleStorage"): torch.float64,
    ("torch", "FloatStorage"): torch.float32,
    ("torch", "HalfStorage"): torch.float16,
    ("torch", "BFloat16Storage"): torch.bfloat16,
    ("torch", "LongStorage"): torch.int64,
    ("torch", "IntStorage"): torch.int32,
    ("torch", "ShortStorage"): torch.int16,
    ("torch", "CharStorage"): torch.int8,
    ("torch", "ByteStorage"): torch.uint8,
    ("torch", "BoolStorage"): torch.bool,
    ("torch.storage", "UntypedStorage"): torch.uint8,  # the dtype stands beside it: so float8 is written
    ("torch", "float8_e4m3fn"): torch.float8_e4m3fn,
    ("torch", "float8_e5m2"): torch.float8_e5m2,
}
"""All that a pickle may name, and what stands for it."""
_INSTRUCTIONS = (
    *(pickle.PROTO, pickle.STOP, pickle.MARK, pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE),
    *(pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1, pickle.BINUNICODE),
    *(pickle.EMPTY_TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.TUPLE),
    *(pickle.EMPTY_LIST, pickle.APPEND, pickle.APPENDS, pickle.EMPTY_DICT),
    *(pickle.BINPUT, pickle.LONG_BINPUT, pickle.BINGET, pickle.LONG_BINGET),
    *(pickle.GLOBAL, pickle.REDUCE, pickle.BINPERSID),
)
"""What a pickle may do, besides `SETITEM`, `SETITEMS` and `BUILD`."""


class _Instructions(dict[int, Callable[[Any], None]]):
    def __missing__(self, code: int) -> Callable[[Any], None]:
        raise _RefusedError(f"its pickle has the instruction {bytes([code])!r}, which torch does not write in checkpoints")


class _Unpickler(pickle._Unpickler):
    """Pickles of tensors. In Python, since the C one allocates whatever a file asks for, and without recursion.

    Of what a file holds nothing is hashed, compared or printed but strings and numbers: a nested tuple would take for ever.
    """

    stack: list[Any]
    pop_mark: Callable[[], list[Any]]
    dispatch = _Instructions({code[0]: pickle._Unpickler.dispatch[code[0]] for code in _INSTRUCTIONS})

    def __init__(self, file: Any, id_length: int = 0) -> None:
        super().__init__(file)
        self.storages: dict[str, _Storage] = {}
        self._id_length = id_length

    def find_class(self, module: str, name: str) -> Any:
        _expect((module, name) in _NAMES, f"its pickle names {_plain(f'{module}.{name}')}, which a map of tensors does not need")
        return _NAMES[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        _expect(type(pid) is tuple and len(pid) == self._id_length > 0, "its pickle refers to something that is not a storage")
        kind, dtype, key, _, count, *view = pid  # the fourth is a device; a pre-zip file has a sixth
        known = kind == "storage" and isinstance(dtype, torch.dtype) and type(key) is str and _is_size(count)
        _expect(known, "its pickle refers to something that is not a storage")
        _expect(all(each is None for each in view), f"its storage {_plain(key)} is a view of another")
        storage = _Storage(key, dtype, count)
        _expect(self.storages.setdefault(key, storage) == storage, f"its storage {_plain(key)} has two types or sizes")
        return storage

    def _set(self, items: list[Any]) -> None:
        target = self.stack[-1]
        for key, value in zip(items[::2], items[1::2], strict=True):
            _expect(type(target) is dict and type(key) is str, "its pickle maps something else than names")
            _expect(key not in target, f"its pickle has {_plain(key)} twice")
            target[key] = value

    def load_setitem(self) -> None:
        self._set([self.stack.pop(-2), self.stack.pop()])

    def load_setitems(self) -> None:
        self._set(self.pop_mark())

    def load_build(self) -> None:
        self.stack.pop()  # attributes of a state dict: the versions of its modules

    dispatch.update({pickle.SETITEM[0]: load_setitem, pickle.SETITEMS[0]: load_setitems, pickle.BUILD[0]: load_build})


class _Sparing(io.BufferedReader):
    """A file of which no more than `MOST_BYTES` are read in all, whatever it says of itself."""

    left = MOST_BYTES

    def read(self, size: int | None = -1, /) -> bytes:
        within = size is not None and 0 <= size <= self.left
        return self._count(super().read(size if within else self.left + 1))

    def readline(self, size: int | None = -1, /) -> bytes:
        return self._count(super().readline(self.left + 1))

    def _count(self, data: bytes) -> bytes:
        self.left -= len(data)
        if self.left < 0:
            raise _RefusedError(f"its pickles and its table of contents are larger than {MOST_BYTES >> 20} MiB")
        return data


def layout(path: Path) -> dict[str, Stored]:
    """The tensors of a checkpoint as `torch.save` writes it, zipped or pre-zip, by name in the order of the file.

    Raises `UserError` for a file that cannot be read, is cut off or damaged, or holds anything but a map of names to tensors.
    """
    try:
        file = _Sparing(io.FileIO(path))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); fetch it again") from error
    with file:
        try:
            begin = file.read(4)
            _expect(begin[:1] in (b"P", pickle.PROTO, b""), f"it begins with {begin!r}, as no file of torch does")
            file.seek(0)
            tensors, starts = (_read_zip if begin[:1] == b"P" else _read_legacy)(file, os.fstat(file.fileno()).st_size)
            _expect(type(tensors) is dict, f"it holds a {type(tensors).__name__} where names should be mapped to tensors")
            return {name: _place(name, tensor, starts) for name, tensor in tensors.items()}
        except _RefusedError as error:
            raise UserError(f"{path} is not a plain torch checkpoint: {error}; fetch it again, or save it as safetensors") from error
        except Exception as error:  # the readers raise many kinds for a damaged file
            reason = _plain(f"{type(error).__name__} {error}".strip())
            raise UserError(f"{path} is cut off or damaged ({reason}); fetch or make it again") from error


def _read_zip(file: _Sparing, size: int) -> tuple[Any, dict[str, int]]:
    """What the pickle of a zipped file holds, and where each storage begins."""
    with zipfile.ZipFile(file) as archive:
        members = {info.filename: info for info in archive.infolist()}
        _expect(len(members) == len(archive.infolist()), "two members of its zip archive have the same name")
        folder = next(iter(members), "").split("/")[0]  # torch takes that of the first member, too

        def member(name: str) -> zipfile.ZipInfo:
            _expect(f"{folder}/{name}" in members, f"its zip archive lacks {_plain(name)}")
            info = members[f"{folder}/{name}"]
            plain = info.compress_type == zipfile.ZIP_STORED and info.compress_size == info.file_size and not info.flag_bits & 1
            _expect(plain, f"{_plain(name)} is compressed or encrypted in its zip archive")
            return info

        if f"{folder}/byteorder" in members:
            _expect(archive.read(member("byteorder")) == b"little", "it is not little-endian")
        unpickler = _Unpickler(io.BytesIO(archive.read(member("data.pkl"))), id_length=5)
        tensors, starts = unpickler.load(), {}
        for key, storage in unpickler.storages.items():
            info = member(f"data/{key}")
            starts[key] = _member_start(file, info)
            whole = storage.count * storage.dtype.itemsize <= info.file_size <= size - starts[key]
            _expect(whole, f"the data of its storage {_plain(key)} is cut off")
        return tensors, starts


def _member_start(file: _Sparing, info: zipfile.ZipInfo) -> int:
    """Where the data of a zip member begins: behind a header of its own, of which the table of contents says only the place."""
    file.seek(info.header_offset)
    signature, name_length, extra_length = struct.unpack("<4s22xHH", file.read(30))
    name = info.filename.encode("utf-8" if info.flag_bits & 0x800 else "cp437")
    there = signature == b"PK\x03\x04" and file.read(name_length) == name
    _expect(there, f"{_plain(info.filename)} is not where its zip archive says")
    return info.header_offset + 30 + len(name) + int(extra_length)


def _read_legacy(file: _Sparing, size: int) -> tuple[Any, dict[str, int]]:
    """What the fourth pickle of a pre-zip file holds, and where each storage begins."""
    begins = _Unpickler(file).load() == _MAGIC and _Unpickler(file).load() == _PROTOCOL
    _expect(begins, "it begins with a pickle that is not torch's")
    system = _Unpickler(file).load()
    _expect(type(system) is dict and system.get("little_endian") is True, "it is not little-endian")
    unpickler = _Unpickler(file, id_length=6)
    tensors, storages, keys = unpickler.load(), unpickler.storages, _Unpickler(file).load()
    listed = type(keys) is list and all(type(key) is str for key in keys) and sorted(keys) == sorted(storages)
    _expect(listed, "its list of storages is not that of its tensors")
    starts, position = {}, file.tell()
    for key in keys:  # in this order: how many elements, in 8 bytes, then the data
        file.seek(position)
        _expect(int.from_bytes(file.read(8), "little") == storages[key].count, f"its storage {_plain(key)} has two sizes")
        starts[key] = position + 8
        position = starts[key] + storages[key].count * storages[key].dtype.itemsize
        _expect(position <= size, f"the data of its storage {_plain(key)} is cut off")
    _expect(position == size, "it goes on behind its last storage")
    return tensors, starts


def _place(name: str, tensor: Any, starts: dict[str, int]) -> Stored:
    """Where a tensor lies, if all that its pickle says of it can be."""
    known = type(tensor) is _Tensor and type(tensor.storage) is _Storage and isinstance(tensor.dtype, torch.dtype)
    _expect(known, f"{_plain(name)} is not a tensor")
    name.encode()  # a name that is no text could not be written again
    dtype, offset, shape, stride = tensor.dtype, tensor.offset, tensor.shape, tensor.stride
    possible = all(type(each) is tuple and len(each) <= 64 and all(map(_is_size, each)) for each in (shape, stride, (offset,)))
    possible = possible and len(shape) == len(stride) and _is_size(math.prod(shape))
    _expect(possible, f"{_plain(name)} has an impossible shape, stride or offset")
    if 0 in shape:  # nothing is read, and torch lets its offset be anywhere
        return Stored(dtype, shape, stride, starts[tensor.storage.key])
    last = offset + sum((length - 1) * step for length, step in zip(shape, stride, strict=True))
    within = (last + 1) * dtype.itemsize <= tensor.storage.count * tensor.storage.dtype.itemsize
    _expect(within, f"{_plain(name)} reaches outside its storage")
    return Stored(dtype, shape, stride, starts[tensor.storage.key] + offset * dtype.itemsize)
