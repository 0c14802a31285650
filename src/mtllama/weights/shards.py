"""Checkpoints by tensor name: a reader over any Hugging Face folder, and a writer that streams safetensors shards.

Both work by slices, so that memory does not grow with the size of a tensor or of a shard.

The safetensors layout (8-byte header length, JSON header, raw little-endian bytes) is public:
https://huggingface.co/docs/safetensors. We write it ourselves because its library wants a whole shard in memory.
"""

import contextlib
import errno
import fcntl
import json
import math
import mmap
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Protocol, Self

import safetensors
import torch

from mtllama.errors import UserError
from mtllama.folders import read_json, write_json
from mtllama.weights import torch_bin
from mtllama.weights.torch_bin import Stored

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Names of the safetensors format."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_BYTES = 4_000_000_000
"""Size of a shard."""
BLOCK = 1 << 22
"""Bytes that are written at a time."""
BIN_SINGLE, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".safetensors.index.json", ".bin.index.json")
_MAX_SMALL = 1 << 27
"""Nothing larger counts as a small file (the largest tokenizers have 35 MB)."""


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor without reading it."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return torch.Size(self.shape).numel()

    @property
    def num_bytes(self) -> int:
        """Size of the data."""
        return self.size * self.dtype.itemsize


class Source(Protocol):
    """Where the weight files of a folder come from that are not there yet."""

    @property
    def label(self) -> str:
        """What errors call the folder."""

    def has(self, path: Path) -> bool:
        """Whether there is such a file."""

    def announced(self, path: Path) -> dict[str, TensorInfo] | None:
        """The tensors of a file that is still to be fetched, in its order; None if only the file itself can tell."""

    def fetch(self, path: Path) -> None:
        """Bring the file to its place."""

    def drop(self, path: Path) -> None:
        """Delete it again."""


class CheckpointReader:
    """Tensors of a checkpoint folder by name: single-file or indexed, safetensors or `.bin`; whole or by slices.

    Only what is asked for is read (no memory map, whose pages would count as memory). Raises `UserError` for a folder
    without weights, and for a shard that is missing, cut off or not what it says.

    With a `source` names, shapes and dtypes are known from the beginning, but a tensor can be read only while its file
    is held (`hold`).
    """

    def __init__(self, folder: Path, source: Source | None = None) -> None:
        self.folder, self._source = folder, source
        self._infos: dict[str, TensorInfo] = {}
        self._files: dict[str, Path] = {}
        self._stored: dict[str, Stored] = {}
        self._open: dict[Path, BinaryIO] = {}
        self._gathered: tuple[str, torch.Tensor] | None = None
        files, indexed = _files_of(folder, source.has if source else Path.is_file)
        here = []
        for path in files:
            infos = source.announced(path) if source else None
            if infos is None:
                if source:
                    source.fetch(path)
                layout = _layout(path)
                infos = {name: TensorInfo(stored.dtype, stored.shape) for name, stored in layout.items()}
                self._stored |= layout
                here.append(path)
            self._infos |= infos
            self._files |= dict.fromkeys(infos, path)
        for name, path in indexed.items():
            if name not in self._files:
                raise UserError(f"{path} lacks the tensor {name}, though the index of its folder names it there; fetch it again")
        for path in here:
            self._open[path] = open(path, "rb", buffering=0)  # noqa: SIM115 (closed with the reader)

    @property
    def label(self) -> str:
        """What errors call the checkpoint."""
        return self._source.label if self._source else str(self.folder)

    @property
    def on_demand(self) -> bool:
        """Whether its files come and go."""
        return self._source is not None

    def can_read(self, name: str) -> bool:
        """Whether the tensor's file is there: always, but for a reader with a source."""
        return self._files[name] in self._open

    @property
    def held(self) -> set[Path]:
        """Files that can be read now."""
        return set(self._open)

    def hold(self, paths: Collection[Path]) -> None:
        """Have these files and no others: first those are deleted that are not among them, then the missing ones fetched.

        Nothing may be reading meanwhile. Raises `UserError` for a file that cannot be fetched or is not what was announced.
        """
        assert self._source is not None, "the files of a folder stay where they are"
        for path in self.held - set(paths):
            self._open.pop(path).close()
            self._source.drop(path)
        for path in sorted(set(paths) - self.held):
            self._source.fetch(path)
            layout = _layout(path)
            for name in [name for name, file in self._files.items() if file == path]:
                if name not in layout or TensorInfo(layout[name].dtype, layout[name].shape) != self._infos[name]:
                    raise UserError(f"{path}: tensor {name} is not there, or not as it was announced; fetch it again")
                self._stored[name] = layout[name]
            self._open[path] = open(path, "rb", buffering=0)  # noqa: SIM115 (closed when it is let go)

    def __iter__(self) -> Iterator[str]:
        """Names in the order of the files."""
        return iter(self._infos)

    def __contains__(self, name: str) -> bool:
        return name in self._infos

    def __len__(self) -> int:
        return len(self._infos)

    def info(self, name: str) -> TensorInfo:
        """Dtype and shape of a tensor."""
        return self._infos[name]

    def file(self, name: str) -> Path:
        """The file that a tensor is in."""
        return self._files[name]

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, read now."""
        info = self.info(name)
        return self.read(name, 0, info.size).reshape(info.shape)

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements `start` to `stop` of a tensor laid flat. [stop - start]"""
        path, stored = self._files[name], self._stored[name]
        if stored.stride == _contiguous(stored.shape) or 0 in stored.shape:
            return self._read(path, stored.dtype, stored.offset + start * stored.dtype.itemsize, stop - start)
        gathered = self._gathered
        if gathered is None or gathered[0] != name:  # rare: a transposed tensor in a `.bin`
            span = 1 + sum((length - 1) * step for length, step in zip(stored.shape, stored.stride, strict=True))
            laid = self._read(path, stored.dtype, stored.offset, span).as_strided(stored.shape, stored.stride)
            self._gathered = gathered = name, laid.reshape(-1).clone()
        return gathered[1][start:stop]

    def _read(self, path: Path, dtype: torch.dtype, offset: int, size: int) -> torch.Tensor:
        content = torch.empty(size * dtype.itemsize, dtype=torch.uint8)  # numpy's empty array could not be viewed as another dtype
        rest = content.numpy().data
        while rest:
            count = os.preadv(self._open[path].fileno(), [rest], offset)
            if not count:
                raise UserError(f"{path} was cut off while it was read; fetch or make it again")
            rest, offset = rest[count:], offset + count
        return content.view(dtype)


def _layout(path: Path) -> dict[str, Stored]:
    """Where each tensor of a shard lies, in the order of the file."""
    try:
        found = _safetensors_layout(path) if path.suffix == ".safetensors" else torch_bin.layout(path)
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing, though the index of its folder names it; fetch it again") from error
    for name, stored in found.items():
        if stored.dtype not in DTYPE_NAMES:
            raise UserError(f"{path}: tensor {name} has the dtype {stored.dtype}, which is not supported")
        if TensorInfo(stored.dtype, stored.shape).num_bytes > path.stat().st_size:
            raise UserError(f"{path}: tensor {name} is larger than its file; refused")
    return dict(sorted(found.items(), key=lambda item: item[1].offset))


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a tensor laid out row by row, in elements."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _safetensors_layout(path: Path) -> dict[str, Stored]:
    try:
        with safetensors.safe_open(str(path), framework="pt"):
            pass  # it checks the header: sizes, gaps, overlaps, the length of the file
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except FileNotFoundError:
        raise
    except Exception as error:  # the reader raises many kinds for a damaged file
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{path} is cut off or damaged ({reason}); fetch or make it again") from error
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise UserError(f"{path}: tensor {name} has the dtype {entry['dtype']}, which is not supported")
        shape = tuple(entry["shape"])
        found[name] = Stored(DTYPES[entry["dtype"]], shape, _contiguous(shape), 8 + length + entry["data_offsets"][0])
    return found


def _files_of(folder: Path, has: Callable[[Path], bool]) -> tuple[list[Path], dict[str, Path]]:
    """The weight files of a folder, and where its index, if it has one, says that each tensor is. `has`: whether a file is there."""
    if not folder.is_dir():
        raise UserError(f"model folder {folder} does not exist")
    for index in (INDEX, BIN_INDEX):
        if (folder / index).is_file():
            content = read_json(folder / index)
            weight_map = content.get("weight_map") if isinstance(content, dict) else None
            if not isinstance(weight_map, dict) or not weight_map:
                raise UserError(f"{folder / index} names no weights; fetch it again")
            indexed = {name: folder / str(file) for name, file in weight_map.items()}
            files = sorted(set(indexed.values()))  # an index is often sorted by tensor: `lm_head` and with it the last file first
            for file in files:
                if file.parent.resolve() != folder.resolve():
                    raise UserError(f"{folder / index} points outside its folder ({file}); refused")
            return files, indexed
    for single in (SINGLE, BIN_SINGLE):
        if has(folder / single):
            return [folder / single], {}
    raise UserError(f"{folder} holds no weights ({SINGLE}, {INDEX} or {BIN_SINGLE}); is it a model folder?")


def small_files(folder: Path) -> list[Path]:
    """The files of a checkpoint that are config, tokenizer or the like, by name."""
    return [path for path in sorted(folder.iterdir()) if path.is_file() and is_small(path.name, path.stat().st_size)]


def is_small(name: str, num_bytes: int) -> bool:
    """Whether a file at the top of a checkpoint is config, tokenizer or the like: not weights, not their index, not hidden, at most 128 MB."""
    return "/" not in name and not name.startswith(".") and not name.endswith(_WEIGHTS) and num_bytes <= _MAX_SMALL


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor, without a copy where it is contiguous."""
    flat = tensor.detach().contiguous().as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy()
    return flat.data


class SafetensorsWriter:
    """One safetensors file, written from front to back past the page cache, where the system can: filling the cache
    costs more than all the rest of a restore on some machines, and the file has to reach the disk anyway.
    """

    def __init__(self, path: Path, infos: Mapping[str, TensorInfo], metadata: dict[str, str] | None = None) -> None:
        """`infos`: what will be written, or as much at least: room for their header is kept in front."""
        self._metadata = metadata or {"format": "pt"}
        self._infos: dict[str, TensorInfo] = {}
        self._reserved = len(_header(infos, self._metadata))
        self._written = self._used = 0
        self._buffer = mmap.mmap(-1, BLOCK)  # aligned, as direct output must be
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115 (closed by __exit__)
        self._direct(True)
        self.write(bytes(self._reserved))

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes of a tensor, in any pieces; `end` tells which one it was."""
        view = memoryview(data).cast("B")
        while view:
            count = min(len(view), BLOCK - self._used)
            self._buffer[self._used : self._used + count] = view[:count]
            self._used += count
            view = view[count:]
            if self._used == BLOCK:
                self._flush()

    def end(self, name: str, info: TensorInfo) -> None:
        """The bytes since the last tensor were this one."""
        self._infos[name] = info
        place = self._written + self._used - self._reserved
        assert place == sum(each.num_bytes for each in self._infos.values()), f"the bytes of {name} are not {info}"

    def _flush(self) -> None:
        place = 0
        while place < self._used:
            place += self._put(memoryview(self._buffer)[place : self._used])
        self._written += self._used
        self._used = 0

    def _put(self, view: memoryview) -> int:
        with view:
            try:
                return self._file.write(view) or 0
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
            self._direct(False)  # this file system does not take it
            return self._file.write(view) or 0

    def _direct(self, on: bool) -> None:
        if flag := getattr(os, "O_DIRECT", 0):
            flags = fcntl.fcntl(self._file, fcntl.F_GETFL)
            with contextlib.suppress(OSError):
                fcntl.fcntl(self._file, fcntl.F_SETFL, flags | flag if on else flags & ~flag)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self._direct(False)  # the last block and the header have any length
                self._flush()
                self._file.seek(0)
                self._file.write(_header(self._infos, self._metadata, self._reserved))
                os.fsync(self._file.fileno())
        finally:
            self._file.close()
            self._buffer.close()


def _header(infos: Mapping[str, TensorInfo], metadata: dict[str, str], length: int = 0) -> bytes:
    """Header of a file with these tensors one behind the other, `length` bytes long or as long as needed."""
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for name, info in infos.items():
        end = offset + info.num_bytes
        header[name] = {"dtype": DTYPE_NAMES[info.dtype], "shape": list(info.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text = text.ljust(length - 8 if length else -(-len(text) // 8) * 8)
    assert not length or len(text) == length - 8, "the header has outgrown its room"
    return len(text).to_bytes(8, "little") + text


class CheckpointWriter:
    """The weights of a folder: one safetensors file, or several of about `max_bytes` with an index."""

    def __init__(
        self, folder: Path, bounds: Mapping[str, TensorInfo], metadata: dict[str, str] | None = None, max_bytes: int = MAX_BYTES
    ) -> None:
        """`bounds`: every tensor that will be written, as large as it may become."""
        self._folder, self._bounds, self._metadata, self._max_bytes = folder, dict(bounds), metadata, max_bytes
        self._groups: list[dict[str, TensorInfo]] = []
        self._file: SafetensorsWriter | None = None

    def begin(self, num_bytes: int = 0) -> None:
        """A tensor of `num_bytes` (if that is known) follows: in a new file, if it would not fit."""
        used = sum(info.num_bytes for info in self._groups[-1].values()) if self._groups else 0
        if self._file is None or (used and used + num_bytes > self._max_bytes):
            self._close()
            written = {name for group in self._groups for name in group}
            rest = {name: info for name, info in self._bounds.items() if name not in written}
            self._groups.append({})
            self._file = SafetensorsWriter(self._part(len(self._groups)), rest, self._metadata).__enter__()

    def write(self, data: bytes | memoryview) -> None:
        """Bytes of the tensor, in any pieces."""
        assert self._file is not None
        self._file.write(data)

    def end(self, name: str, info: TensorInfo) -> None:
        """The bytes since `begin` were this tensor."""
        assert self._file is not None
        self._file.end(name, info)
        self._groups[-1][name] = info

    def _part(self, number: int) -> Path:
        return self._folder / f"part-{number}.safetensors"

    def _close(self, *error: Any) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            file.__exit__(*(error or (None, None, None)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._close(kind, value, trace)
        if kind is not None:
            return
        count = len(self._groups)
        names = [SINGLE] if count == 1 else [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
        for number, name in enumerate(names, start=1):
            self._part(number).rename(self._folder / name)
        if count > 1:
            total = sum(info.num_bytes for group in self._groups for info in group.values())
            where = {tensor: name for name, group in zip(names, self._groups, strict=True) for tensor in group}
            write_json(self._folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})
