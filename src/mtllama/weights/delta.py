"""Weight deltas: make one of a base and a target, restore the target from base and delta, bit for bit.

A delta folder holds `delta.json` (format, and dtype, shape and SHA-256 of every base and target tensor, and a SHA-256
of itself), `model*.safetensors` shards of compressed differences, and under `files/` every other file of the target.
It has no config.json of its own, so nothing can load it as a model by mistake.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mtllama import folders
from mtllama.errors import UserError
from mtllama.progress import progress
from mtllama.weights import codec
from mtllama.weights.shards import (
    DTYPE_NAMES,
    DTYPES,
    CheckpointReader,
    SafetensorsWriter,
    TensorInfo,
    plan_shards,
    raw_bytes,
    write_index,
)

FORMAT = "mtllama-delta"
FORMAT_VERSION = 2
DELTA_JSON = "delta.json"
FILES = "files"
MAX_SHARD_BYTES = 4_000_000_000
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")
_WEIGHT_INDEX = (".safetensors.index.json", ".bin.index.json")


@dataclass(frozen=True)
class Summary:
    """What `make` or `apply` did."""

    num_tensors: int
    num_weights: int
    num_bytes: int
    """Bytes of weights written."""
    num_equal: int
    """Tensors that are the same in base and target."""

    @property
    def bits_per_weight(self) -> float:
        """Size of the written weights."""
        return 8 * self.num_bytes / max(1, self.num_weights)


def make(
    base_dir: Path,
    target_dir: Path,
    out: Path,
    *,
    overwrite: bool = False,
    base_name: str = "",
    level: codec.Level = "default",
    workers: int | None = None,
) -> Summary:
    """Write the delta that turns the checkpoint in `base_dir` into that in `target_dir`.

    Tensors are read, compared and written one at a time; `workers` threads (default: one a core) share the coding of each.
    """
    base, target = CheckpointReader(base_dir), CheckpointReader(target_dir)
    _refuse_inside(out, base_dir, target_dir)
    tensors: dict[str, Any] = {}
    with folders.new_folder(out, overwrite=overwrite) as folder:
        # Compressed sizes are known only after the fact: each tensor goes to a file of its own, then into one.
        parts = folder / "parts"
        parts.mkdir()
        num_equal = 0
        with progress("delta", len(target)) as advance, _pool(workers) as pool:
            for number, name in enumerate(target):
                after = target.tensor(name)
                entry: dict[str, Any] = {"target": _describe(after)}
                before = base.tensor(name) if name in base else None
                if before is not None:
                    entry["base"] = _describe(before)
                if before is not None and before.dtype == after.dtype and before.shape == after.shape:
                    entry["kind"] = "equal" if entry["base"] == entry["target"] else "difference"
                else:
                    entry["kind"] = "whole"
                num_equal += entry["kind"] == "equal"
                if entry["kind"] != "equal":
                    data = (
                        codec.encode(before, after, level, pool)
                        if entry["kind"] == "difference" and before is not None
                        else codec.encode_whole(after)
                    )
                    (parts / str(number)).write_bytes(data)
                    entry["num_bytes"] = len(data)
                tensors[name] = entry
                advance()
        num_bytes = _join(folder, parts, tensors)
        shutil.rmtree(parts)
        files = _copy_files(target_dir, folder / FILES)
        manifest = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "mode": "bits",
            "base_name": base_name or base_dir.name,
            "versions": folders.versions(),
            "base_unused": sorted(set(base) - set(target)),
            "files": files,
            "tensors": tensors,
        }
        folders.write_json(folder / DELTA_JSON, {**manifest, "sha256": sha256_json(manifest)})
        folders.write_manifest(folder, "delta", base=base_name or str(base_dir), target=str(target_dir))
    return Summary(len(target), _num_weights(target), num_bytes, num_equal)


def apply(base_dir: Path, delta_dir: Path, out: Path, *, overwrite: bool = False, workers: int | None = None) -> Summary:
    """Restore the target into `out`: base checked before a byte is written, every restored tensor checked too.

    `workers` threads (default: one a core) share the decoding of each tensor.
    """
    delta = Delta(base_dir, delta_dir)
    _refuse_inside(out, base_dir, delta_dir)
    folders.require_new(out, overwrite=overwrite)
    delta.check_base()
    delta.check_files()
    with folders.new_folder(out, overwrite=overwrite) as folder, _pool(workers) as pool:
        plan = plan_shards(delta.infos, MAX_SHARD_BYTES)
        with progress("restore", len(delta.infos)) as advance:
            for file, group in plan.items():
                with SafetensorsWriter(folder / file, group) as writer:
                    for name in group:
                        writer.write(name, delta.restore(name, pool))
                        advance()
        write_index(folder, plan)
        delta.copy_files(folder)
    num_bytes = sum(info.num_bytes for info in delta.infos.values())
    num_weights = sum(torch.Size(info.shape).numel() for info in delta.infos.values())
    return Summary(len(delta.infos), num_weights, num_bytes, delta.num_equal)


def verify(model_dir: Path, delta_dir: Path) -> int:
    """Whether the checkpoint in `model_dir` is exactly the delta's target; returns its number of tensors.

    Every tensor's SHA-256 and every other file's is compared; the base is not needed. The first difference is an error.
    """
    manifest, model = read_delta(delta_dir), CheckpointReader(model_dir)
    tensors, where = manifest["tensors"], f"{model_dir} is not the target of {delta_dir}"
    for name in sorted({*model, *tensors}):
        if name not in model:
            raise UserError(f"{where}: it has no tensor {name}")
        if name not in tensors:
            raise UserError(f"{where}: it has a tensor {name}, which the target does not have")
    with progress("verify", len(tensors)) as advance:
        for name, entry in tensors.items():
            found, wanted = _describe(model.tensor(name)), entry["target"]
            for key in ("dtype", "shape", "sha256"):
                if found[key] != wanted[key]:
                    what = "its values differ" if key == "sha256" else f"its {key} is {found[key]}, not {wanted[key]}"
                    raise UserError(f"{where}: tensor {name}: {what}")
            advance()
    for name, digest in manifest["files"].items():
        if not (model_dir / name).is_file() or folders.sha256_file(model_dir / name) != digest:
            raise UserError(f"{where}: the file {name} is missing or differs (all {len(tensors)} tensors are as they should be)")
    return len(tensors)


def _pool(workers: int | None) -> ThreadPoolExecutor:
    if workers is not None and workers < 1:
        raise UserError(f"--workers is {workers}; at least 1 is needed")
    return ThreadPoolExecutor(workers or os.cpu_count())


class Delta:
    """A base and a delta, opened together: the target's tensors by name."""

    def __init__(self, base_dir: Path, delta_dir: Path) -> None:
        self.folder = delta_dir
        self.manifest = read_delta(delta_dir)
        self.base = CheckpointReader(base_dir)
        self.tensors: dict[str, Any] = self.manifest["tensors"]
        self.infos = {
            name: TensorInfo(DTYPES[entry["target"]["dtype"]], tuple(entry["target"]["shape"])) for name, entry in self.tensors.items()
        }
        self.num_equal = sum(entry["kind"] == "equal" for entry in self.tensors.values())
        self.data = CheckpointReader(delta_dir) if self.num_equal < len(self.tensors) else None
        for name, entry in self.tensors.items():
            if entry["kind"] != "equal" and (self.data is None or name not in self.data):
                raise UserError(f"{delta_dir}: the difference of {name} is missing; fetch or make the delta again")

    def check_base(self) -> None:
        """Compare every base tensor that the delta builds on; the first that differs is named."""
        needed = [name for name, entry in self.tensors.items() if entry["kind"] != "whole"]
        with progress("check base", len(needed)) as advance:
            for name in needed:
                entry = self.tensors[name]["base"]
                if name not in self.base:
                    raise UserError(f"wrong base: {self.base.folder} has no tensor {name}; the delta needs {self.manifest['base_name']}")
                self._check(name, self.base.tensor(name), entry, f"wrong base: in {self.base.folder}")
                advance()

    def _check(self, name: str, tensor: torch.Tensor, entry: dict[str, Any], where: str) -> None:
        needed = f"the delta needs {self.manifest['base_name']}"
        if list(tensor.shape) != entry["shape"]:
            raise UserError(f"{where} the tensor {name} has the shape {list(tensor.shape)}, not {entry['shape']}; {needed}")
        if DTYPE_NAMES[tensor.dtype] != entry["dtype"]:
            raise UserError(f"{where} the tensor {name} is {DTYPE_NAMES[tensor.dtype]}, not {entry['dtype']}; {needed}")
        if sha256(tensor) != entry["sha256"]:
            raise UserError(f"{where} the tensor {name} differs in its values; {needed}")

    def restore(self, name: str, pool: ThreadPoolExecutor | None = None) -> torch.Tensor:
        """One tensor of the target, checked against its SHA-256."""
        entry, info, where = self.tensors[name], self.infos[name], f"{self.folder}: {name}"
        if entry["kind"] == "equal":
            tensor = self.base.tensor(name)
        else:
            assert self.data is not None
            data = bytes(raw_bytes(self.data.tensor(name)))
            if entry["kind"] == "difference":
                tensor = codec.decode(self.base.tensor(name), data, where, pool)
            else:
                tensor = codec.decode_whole(data, info.dtype, info.shape, where)
        if TensorInfo(tensor.dtype, tuple(tensor.shape)) != info or sha256(tensor) != entry["target"]["sha256"]:
            raise UserError(f"{where}: the restored tensor is not the target (SHA-256 differs); base or delta is damaged")
        return tensor

    def restore_all(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor of the target, for loading a model without a second copy on disk."""
        self.check_base()
        self.check_files()
        with progress("restore", len(self.infos)) as advance, _pool(None) as pool:
            for name in self.infos:
                yield name, self.restore(name, pool)
                advance()

    def check_files(self) -> None:
        """Compare the target's other files with their SHA-256."""
        for name, digest in self.manifest["files"].items():
            source = self.folder / FILES / name
            if Path(name).name != name:
                raise UserError(f"{self.folder / DELTA_JSON}: the file name {name!r} leaves its folder; refused")
            if not source.is_file() or folders.sha256_file(source) != digest:
                raise UserError(f"{source} is missing or damaged; fetch or make the delta again")

    def copy_files(self, folder: Path) -> None:
        """The target's other files, copied to `folder`."""
        for name in self.manifest["files"]:
            shutil.copyfile(self.folder / FILES / name, folder / name)


def read_delta(folder: Path) -> dict[str, Any]:
    """The manifest of a delta folder, its form checked."""
    path = folder / DELTA_JSON
    if not path.is_file():
        what = "is a model, not a delta" if (folder / "config.json").is_file() else f"has no {DELTA_JSON}"
        raise UserError(f"{folder} {what}; --delta takes a folder made by: mtllama delta make")
    manifest = folders.read_json(path)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"{path} is not a manifest of {FORMAT}")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise UserError(f"{path} has format version {manifest.get('format_version')}; this mtllama reads {FORMAT_VERSION}: update it")
    if manifest.pop("sha256", None) != sha256_json(manifest):
        raise UserError(f"{path} is damaged (its SHA-256 differs); fetch or make the delta again")
    try:
        entries, named = manifest["tensors"].items(), isinstance(manifest["files"], dict) and isinstance(manifest["base_name"], str)
    except (KeyError, AttributeError):
        named = False
    if not named or not entries:
        raise UserError(f"{path} names no base, no files or no tensors; fetch or make the delta again")
    for name, entry in entries:
        try:
            sides = ["target"] if entry["kind"] == "whole" else ["target", "base"]
            known = entry["kind"] in ("equal", "difference", "whole")
            if not (known and all(_described(entry[side]) for side in sides)):
                raise KeyError
        except (KeyError, TypeError):
            raise UserError(f"{path}: the entry of {name} is damaged; fetch or make the delta again") from None
    return manifest


def _described(side: dict[str, Any]) -> bool:
    return side["dtype"] in DTYPES and isinstance(side["sha256"], str) and all(type(n) is int and n >= 0 for n in side["shape"])


def sha256_json(value: Any) -> str:
    """SHA-256 of a JSON value, whatever its layout, as hex."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sha256(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's bytes, as hex."""
    return hashlib.sha256(raw_bytes(tensor)).hexdigest()


def _describe(tensor: torch.Tensor) -> dict[str, Any]:
    return {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "sha256": sha256(tensor)}


def _num_weights(reader: CheckpointReader) -> int:
    return sum(torch.Size(reader.info(name).shape).numel() for name in reader)


def _join(folder: Path, parts: Path, tensors: dict[str, Any]) -> int:
    """Gather the compressed tensors into safetensors shards of bytes; returns their size."""
    numbers = {name: number for number, name in enumerate(tensors)}
    infos = {name: TensorInfo(torch.uint8, (entry["num_bytes"],)) for name, entry in tensors.items() if "num_bytes" in entry}
    if not infos:
        return 0
    plan = plan_shards(infos, MAX_SHARD_BYTES)
    for file, group in plan.items():
        with SafetensorsWriter(folder / file, group, {"format": FORMAT}) as writer:
            for name in group:
                data = bytearray((parts / str(numbers[name])).read_bytes())
                writer.write(name, torch.frombuffer(data, dtype=torch.uint8))
    write_index(folder, plan)
    return sum(info.num_bytes for info in infos.values())


def _copy_files(source: Path, folder: Path) -> dict[str, str]:
    """Copy every file of a checkpoint that is not weights; returns name -> SHA-256."""
    folder.mkdir()
    copied = {}
    for path in sorted(source.iterdir()):
        if (
            path.is_file()
            and path.suffix not in _WEIGHT_SUFFIXES
            and not path.name.endswith(_WEIGHT_INDEX)
            and not path.name.startswith(".")
        ):
            shutil.copyfile(path, folder / path.name)
            copied[path.name] = folders.sha256_file(path)
    return copied


def _refuse_inside(out: Path, *inputs: Path) -> None:
    """Refuse to replace an input, or a folder that holds one."""
    for each in inputs:
        if out.resolve() in (each.resolve(), *each.resolve().parents):
            raise UserError(f"--out {out} is or holds the input {each}; choose another folder")
