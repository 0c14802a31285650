"""Checkpoints by tensor name: a reader over any Hugging Face folder, and a writer that streams safetensors shards.

The safetensors layout (8-byte header length, JSON header, raw little-endian bytes) is public:
https://huggingface.co/docs/safetensors. We write it ourselves because its library wants a whole shard in memory.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import safetensors
import torch

from mtllama.errors import UserError
from mtllama.folders import read_json, write_json

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
BIN_SINGLE, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor without reading it."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Size of the data."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class CheckpointReader:
    """Tensors of a checkpoint folder by name: single-file or indexed, safetensors or `.bin`, memory-mapped.

    Raises `UserError` for a folder without weights, and for a shard that is missing, cut off or not what it says.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files, indexed = _files_of(folder)
        self._where: dict[str, Path] = {}
        self._infos: dict[str, TensorInfo] = {}
        self._open: dict[Path, Any] = {}
        for path in self._files:
            for name, info in self._scan(path):
                self._where[name], self._infos[name] = path, info
        for name, path in indexed.items():
            if name not in self._infos:
                raise UserError(f"{path} lacks the tensor {name}, though the index of its folder names it there; fetch it again")

    def _scan(self, path: Path) -> Iterator[tuple[str, TensorInfo]]:
        if path.suffix == ".safetensors":
            handle = self._handle(path)
            for name in list(handle.keys()):
                part = handle.get_slice(name)
                if part.get_dtype() not in DTYPES:
                    raise UserError(f"{path}: tensor {name} has the dtype {part.get_dtype()}, which is not supported")
                yield name, TensorInfo(DTYPES[part.get_dtype()], tuple(part.get_shape()))
        else:
            tensors = self._handle(path)
            if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
                raise UserError(f"{path} is not a checkpoint: it must map names to tensors and hold nothing else")
            for name, tensor in tensors.items():
                if tensor.dtype not in DTYPE_NAMES:
                    raise UserError(f"{path}: tensor {name} has the dtype {tensor.dtype}, which is not supported")
                yield name, TensorInfo(tensor.dtype, tuple(tensor.shape))

    def _handle(self, path: Path) -> Any:
        if path not in self._open:
            try:
                if path.suffix == ".safetensors":
                    self._open[path] = safetensors.safe_open(str(path), framework="pt")
                else:
                    self._open[path] = _load_bin(path)
            except FileNotFoundError as error:
                raise UserError(f"{path} is missing, though the index of its folder names it; fetch it again") from error
            except Exception as error:  # the readers raise many kinds for a damaged file
                reason = " ".join(str(error).split())[:160]
                raise UserError(f"{path} is cut off or damaged ({reason}); fetch or make it again") from error
        return self._open[path]

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

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, read now."""
        path = self._where[name]
        if path.suffix == ".safetensors":
            tensor: torch.Tensor = self._handle(path).get_tensor(name)
        else:
            tensor = self._handle(path)[name].contiguous()
        return tensor


def _files_of(folder: Path) -> tuple[list[Path], dict[str, Path]]:
    """The weight files of a folder, and where its index, if it has one, says that each tensor is."""
    if not folder.is_dir():
        raise UserError(f"model folder {folder} does not exist")
    for index in (INDEX, BIN_INDEX):
        if (folder / index).is_file():
            content = read_json(folder / index)
            weight_map = content.get("weight_map") if isinstance(content, dict) else None
            if not isinstance(weight_map, dict) or not weight_map:
                raise UserError(f"{folder / index} names no weights; fetch it again")
            indexed = {name: folder / str(file) for name, file in weight_map.items()}
            files = list(dict.fromkeys(indexed.values()))
            for file in files:
                if file.parent.resolve() != folder.resolve():
                    raise UserError(f"{folder / index} points outside its folder ({file}); refused")
            return files, indexed
    for single in (SINGLE, BIN_SINGLE):
        if (folder / single).is_file():
            return [folder / single], {}
    raise UserError(f"{folder} holds no weights ({SINGLE}, {INDEX} or {BIN_SINGLE}); is it a model folder?")


def _load_bin(path: Path) -> Any:
    """A `.bin` shard without running code from it; memory-mapped unless it has torch's pre-zip layout."""
    with open(path, "rb") as handle:
        zipped = handle.read(2) == b"PK"
    return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor, without a copy where it is contiguous."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return flat.data


class SafetensorsWriter:
    """One safetensors file, written tensor by tensor: all infos first, then the data in the same order."""

    def __init__(self, path: Path, infos: dict[str, TensorInfo], metadata: dict[str, str] | None = None) -> None:
        header: dict[str, Any] = {"__metadata__": metadata or {"format": "pt"}}
        offset = 0
        for name, info in infos.items():
            end = offset + info.num_bytes
            header[name] = {"dtype": DTYPE_NAMES[info.dtype], "shape": list(info.shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._expected = iter(infos.items())
        self._file = open(path, "wb")  # noqa: SIM115 (closed by __exit__)
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Append the next tensor."""
        expected = next(self._expected, None)
        got = (name, TensorInfo(tensor.dtype, tuple(tensor.shape)))
        assert got == expected, f"{got} written where {expected} was announced"
        self._file.write(raw_bytes(tensor))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            assert next(self._expected, None) is None, "a tensor that was announced was not written"
            self._file.flush()
            os.fsync(self._file.fileno())
        self._file.close()


def plan_shards(infos: dict[str, TensorInfo], max_bytes: int) -> dict[str, dict[str, TensorInfo]]:
    """Distribute tensors over files of at most `max_bytes` (a larger tensor has a file of its own)."""
    groups: list[dict[str, TensorInfo]] = [{}]
    size = 0
    for name, info in infos.items():
        if groups[-1] and size + info.num_bytes > max_bytes:
            groups.append({})
            size = 0
        groups[-1][name] = info
        size += info.num_bytes
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, start=1)}


def write_index(folder: Path, plan: dict[str, dict[str, TensorInfo]]) -> None:
    """The index of a checkpoint in several files (nothing for a single one)."""
    if len(plan) > 1:
        total = sum(info.num_bytes for group in plan.values() for info in group.values())
        names = {name: file for file, group in plan.items() for name in group}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": names})
