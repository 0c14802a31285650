"""Make a weight delta of a base and a target, and verify a model against one. `restore` is the way back.

A delta folder holds `delta.json`, `model*.safetensors` and under `files/` every other file of the target
(docs/delta-format.md). Its config.json is no model's, so that nothing loads it as a model by mistake.
"""

import functools
import hashlib
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mtllama import folders
from mtllama.errors import UserError
from mtllama.progress import progress
from mtllama.weights import card, codec, pipeline
from mtllama.weights.manifest import FILES, FORMAT, SAMPLES, BaseTensor, Entry, Manifest, Mode
from mtllama.weights.shards import BIN_INDEX, INDEX, CheckpointReader, CheckpointWriter, TensorInfo, small_files

TIED = {"lm_head.weight": "model.embed_tokens.weight"}
"""Where a base with tied embeddings has what an untied target has apart."""
_LARGEST_CODED = TensorInfo(torch.uint8, (10**13,))


@dataclass(frozen=True)
class Summary:
    """What `make` or `apply` did."""

    num_tensors: int
    num_weights: int
    num_bytes: int
    """Bytes of weights written."""
    num_equal: int
    """Tensors that are the same in base and target."""
    num_inexact: int = 0
    """Weights that will not come back exact (only mode `add`)."""
    left_out: tuple[str, ...] = ()
    """What of the target's folder the delta does not carry: folders, other formats of weights, files over 128 MB."""

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
    mode: Mode = "bits",
    level: codec.Level = "default",
    workers: int | None = None,
) -> Summary:
    """Write the delta that turns the checkpoint in `base_dir` into that in `target_dir`.

    Mode `bits` restores every bit. Mode `add` writes the arithmetic difference as a checkpoint, as FastChat's tools expect it.
    Slices of tensors are read, compared and written by `workers` threads (default: one a core).
    """
    base, target = CheckpointReader(base_dir), CheckpointReader(target_dir)
    refuse_inside(out, base_dir, target_dir)
    infos = {name: target.info(name) for name in target}
    bounds = infos if mode == "add" else dict.fromkeys(infos, _LARGEST_CODED)
    with folders.new_folder(out, overwrite=overwrite) as folder:
        entries: dict[str, Entry] = {}
        writer = CheckpointWriter(folder, bounds, {"format": "pt" if mode == "add" else FORMAT})
        with progress("delta", len(infos)) as advance, pipeline.threads(workers) as pool, writer:
            for name in infos:
                pair = Pair(base, target, name)
                entries[name] = _add(pair, writer, pool) if mode == "add" else _bits(pair, writer, level, pool)
                advance()
        manifest = Manifest(
            mode,
            base_name or base_dir.name,
            {file.name: folders.sha256_file(file) for file in small_files(base_dir)},
            folders.read_json(base_dir / "config.json") if (base_dir / "config.json").is_file() else None,
            _copy_files(target_dir, folder / FILES),
            entries,
            sorted(set(base) - set(target)),
            folders.versions(),
        )
        manifest.write(folder)
        card.write(folder, manifest, base_dir)
        folders.write_manifest(folder, "delta", base=manifest.base_name, target=str(target_dir))
        num_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    equal, inexact = (sum(each) for each in zip(*((e.kind == "equal", e.num_inexact) for e in entries.values()), strict=True))
    carried = {INDEX, BIN_INDEX, *(path.name for path in target.held), *manifest.files}
    left_out = tuple(path.name for path in sorted(target_dir.iterdir()) if path.name not in carried and not path.name.startswith("."))
    return Summary(len(entries), sum(info.size for info in infos.values()), num_bytes, equal, inexact, left_out)


class Pair:
    """A tensor of the target and the one of the base that it is compared with, by slices."""

    def __init__(self, base: CheckpointReader, target: CheckpointReader, name: str) -> None:
        self.info = target.info(name)
        self.name, self.base_name = name, _counterpart(base, name, self.info)
        self._base, self._target = base, target
        self.before = patterns(base, self.base_name, self.info)
        """The base's patterns in a slice."""

    def after(self, part: slice) -> np.ndarray:
        """The target's patterns in a slice."""
        return codec.bits(self._target.read(self.name, part.start, part.stop))

    def describe_base(self, pool: ThreadPoolExecutor) -> tuple[str, BaseTensor | None]:
        """SHA-256 of the target, and what the base's tensor is."""
        target = pool.submit(sha256, self._target, self.name)
        if self.base_name is None:
            return target.result(), None
        found = sha256(self._base, self.base_name)
        return target.result(), BaseTensor(self.base_name, self._base.info(self.base_name), found, sample(self._base, self.base_name))


def _counterpart(base: CheckpointReader, name: str, info: TensorInfo) -> str | None:
    """The base's tensor to compare with: of the same name (or the tied one) and of the same kind, but for precision and rows."""
    name = name if name in base else TIED.get(name, name)
    if name not in base:
        return None
    found = base.info(name)
    fits = found.shape[1:] == info.shape[1:] and len(found.shape) == len(info.shape)
    alike = found.dtype == info.dtype or (found.dtype.is_floating_point and info.dtype.is_floating_point)
    return name if fits and alike else None


def patterns(
    reader: CheckpointReader, name: str | None, info: TensorInfo, new_rows: np.ndarray | None = None
) -> Callable[[slice], np.ndarray]:
    """A base tensor seen as one of another precision and number of rows: rounded to the dtype, cut, or filled up.

    Rows that it has not are zeros, or each is `new_rows` [columns], patterns of the dtype; without a name it is all zeros.
    """
    size = reader.info(name).size if name is not None else 0

    def read(part: slice) -> np.ndarray:
        stop = min(part.stop, size)
        if name is None or part.start >= stop:
            found = np.zeros(0, codec.UNSIGNED[info.dtype.itemsize])
        else:
            found = codec.bits(reader.read(name, part.start, stop).to(info.dtype))
        if (missing := part.stop - part.start - len(found)) == 0:
            return found
        if new_rows is None:
            return np.append(found, np.zeros(missing, found.dtype))
        return np.append(found, new_rows[np.arange(part.stop - missing, part.stop) % len(new_rows)])

    return read


@dataclass
class _Statistics:
    """What a pass over the slices adds up, for the manifest."""

    num_equal: int = 0
    num_inexact: int = 0
    square: float = 0.0
    base_square: float = 0.0

    def take(self, found: tuple[int, float, float]) -> None:
        self.num_equal += found[0]
        self.square = min(self.square + found[1], sys.float_info.max)
        self.base_square = min(self.base_square + found[2], sys.float_info.max)

    def entry(self, kind: str, info: TensorInfo, digest: str, base: BaseTensor | None, restored: str) -> Entry:
        """What the manifest says of the tensor."""
        return Entry(kind, info, digest, base, restored, self.num_equal, self.num_inexact, self.square**0.5, self.base_square**0.5)


def _statistics(before: np.ndarray, after: np.ndarray, dtype: torch.dtype) -> tuple[int, float, float]:
    change, value = codec.changes(before, after, dtype), codec.changes(np.zeros_like(before), before, dtype)
    return int(np.count_nonzero(before == after)), _square(change), _square(value)


def _square(values: np.ndarray) -> float:
    """Sum of squares; JSON has no infinity, so the largest number stands for what is larger."""
    with np.errstate(over="ignore"):
        found = np.dot(values, values)
        if not np.isfinite(found):  # a mask of the lowest numbers of float32
            found = np.dot(wide := values.astype(np.float64), wide)
    return min(float(found), sys.float_info.max)


def _bits(pair: Pair, writer: CheckpointWriter, level: codec.Level, pool: ThreadPoolExecutor) -> Entry:
    digest, base = pair.describe_base(pool)
    equal = base is not None and base.sha256 == digest and base.info == pair.info
    encoder = codec.Encoder(pair.info.dtype, pair.info.shape, level, alone=base is None)
    parts, statistics = codec.slices(pair.info.size), _Statistics()

    def look(part: slice, first: bool) -> tuple[Any, Any]:
        before, after = pair.before(part), pair.after(part)
        return None if equal else encoder.look(part, before, after), _statistics(before, after, pair.info.dtype) if first else None

    def seen(number: int) -> Any:
        for found, counted in pipeline.in_order(pool, (functools.partial(look, part, number == 0) for part in parts)):
            if counted:
                statistics.take(counted)
            yield found

    if equal:
        for _ in seen(0):
            pass
    else:
        for number in range(encoder.passes):
            encoder.learn(seen(number))
        writer.begin()
        sizes = []
        for coded in pipeline.in_order(pool, (functools.partial(_code, encoder, pair, part) for part in parts)):
            writer.write(coded)
            sizes.append(len(coded))
        foot = encoder.foot(sizes)
        writer.write(foot)
        writer.end(pair.name, TensorInfo(torch.uint8, (sum(sizes) + len(foot),)))
    kind = "equal" if equal else "difference"
    return statistics.entry(kind, pair.info, digest, base, digest)


def _code(encoder: codec.Encoder, pair: Pair, part: slice) -> bytes:
    return encoder.code(part, pair.before(part), pair.after(part))


def _add(pair: Pair, writer: CheckpointWriter, pool: ThreadPoolExecutor) -> Entry:
    if pair.info.dtype == torch.bool:
        raise UserError(f"{pair.name} holds booleans, which have no arithmetic difference; use --mode bits")
    digest, base = pair.describe_base(pool)
    statistics, restored = _Statistics(), hashlib.sha256()

    def subtract(part: slice) -> tuple[np.ndarray, np.ndarray, int, tuple[int, float, float]]:
        before, after = pair.before(part), pair.after(part)
        change = arithmetic(after, before, pair.info.dtype, -1)
        back = arithmetic(before, change, pair.info.dtype)
        return change, back, int(np.count_nonzero(back != after)), _statistics(before, after, pair.info.dtype)

    writer.begin(pair.info.num_bytes)
    for change, back, wrong, counted in pipeline.in_order(
        pool, (functools.partial(subtract, part) for part in codec.slices(pair.info.size))
    ):
        writer.write(change.data)
        restored.update(back.data)
        statistics.num_inexact += wrong
        statistics.take(counted)
    writer.end(pair.name, pair.info)
    return statistics.entry("sum", pair.info, digest, base, restored.hexdigest())


def arithmetic(first: np.ndarray, second: np.ndarray, dtype: torch.dtype, factor: int = 1) -> np.ndarray:
    """The patterns of first + factor * second, rounded once: as torch adds tensors of that dtype."""
    out = np.empty_like(first)
    wide = dtype.is_floating_point and dtype.itemsize == 1  # torch has no sum of bytes of this kind
    for start in range(0, len(first), SERIAL):
        a, b, c = (torch.from_numpy(each[start : start + SERIAL].view(np.uint8)).view(dtype) for each in (first, second, out))
        if wide:
            c.copy_(torch.add(a.float(), b.float(), alpha=factor))
        else:
            torch.add(a, b, alpha=factor, out=c)
    return out


SERIAL = 1 << 15
"""Elements up to which torch computes in the calling thread; the threads here are ours."""


def verify(model_dir: Path, delta_dir: Path, workers: int | None = None) -> int:
    """Whether the checkpoint in `model_dir` is exactly what the delta restores; returns its number of tensors.

    Every tensor's SHA-256 and every other file's is compared; the base is not needed. The first difference is an error.
    """
    manifest, model = Manifest.read(delta_dir), CheckpointReader(model_dir)
    entries, where = manifest.entries, f"{model_dir} is not the target of {delta_dir}"
    for name in sorted({*model, *entries}):
        if name not in model:
            raise UserError(f"{where}: it has no tensor {name}")
        if name not in entries:
            raise UserError(f"{where}: it has a tensor {name}, which the target does not have")
        found, wanted = model.info(name), entries[name].info
        if found.dtype != wanted.dtype:
            raise UserError(f"{where}: tensor {name}: its dtype is {found.dtype}, not {wanted.dtype}")
        if found.shape != wanted.shape:
            raise UserError(f"{where}: tensor {name}: its shape is {list(found.shape)}, not {list(wanted.shape)}")
    with progress("verify", len(entries)) as advance, pipeline.threads(workers) as pool:
        digests = pipeline.in_order(pool, (functools.partial(sha256, model, name) for name in entries))
        for (name, entry), digest in zip(entries.items(), digests, strict=True):
            if digest not in (entry.sha256, entry.restored_sha256):
                raise UserError(f"{where}: tensor {name}: its values differ")
            advance()
    for name, digest in manifest.files.items():
        if not (model_dir / name).is_file() or folders.sha256_file(model_dir / name) != digest:
            raise UserError(f"{where}: the file {name} is missing or differs (all {len(entries)} tensors are as they should be)")
    return len(entries)


def sha256(reader: CheckpointReader, name: str) -> str:
    """SHA-256 of a tensor's bytes, as hex."""
    digest = hashlib.sha256()
    for part in codec.slices(reader.info(name).size):
        digest.update(codec.bits(reader.read(name, part.start, part.stop)).data)
    return digest.hexdigest()


def sample(reader: CheckpointReader, name: str, size: int | None = None) -> bytes:
    """A few values of a tensor (of its first `size` elements), evenly spaced, as bytes."""
    size = reader.info(name).size if size is None else size
    places = [(2 * number + 1) * size // (2 * SAMPLES) for number in range(SAMPLES)] if size else []
    return b"".join(codec.bits(reader.read(name, place, place + 1)).tobytes() for place in places)


def _copy_files(source: Path, folder: Path) -> dict[str, str]:
    """Copy them; returns name -> SHA-256."""
    folder.mkdir()
    copied = {}
    for path in small_files(source):
        shutil.copyfile(path, folder / path.name)
        copied[path.name] = folders.sha256_file(folder / path.name)
    return copied


def refuse_inside(out: Path, *inputs: Path) -> None:
    """Refuse to replace an input, or a folder that holds one."""
    for each in inputs:
        if out.resolve() in (each.resolve(), *each.resolve().parents):
            raise UserError(f"--out {out} is or holds the input {each}; choose another folder")
