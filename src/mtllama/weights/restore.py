"""Base + delta -> target: by slices into a new folder, or tensor by tensor into memory; everything checked.

What can be restored from is a `Target`: a delta of ours, a published one of FastChat's, Vicuna's, MT-LLaMA's or
Stanford Alpaca's kind (`foreign`), or a weighted sum of deltas. Base and deltas may come shard by shard (`remote`).
"""

import atexit
import contextlib
import functools
import hashlib
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from mtllama import folders
from mtllama.errors import UserError
from mtllama.progress import progress
from mtllama.weights import codec, diagnosis, pins, pipeline
from mtllama.weights.delta import Summary, arithmetic, patterns, refuse_inside, sha256
from mtllama.weights.manifest import DELTA_JSON, FILES, Entry, Manifest
from mtllama.weights.shards import CheckpointReader, CheckpointWriter, TensorInfo

Check = Literal["full", "fast"]
CHECKS: tuple[Check, ...] = ("full", "fast")
NewRows = Literal["auto", "zero", "mean"]
NEW_ROWS: tuple[NewRows, ...] = ("auto", "zero", "mean")
CHECKSUM_TOLERANCE = 0.01
"""As Stanford Alpaca's own script has it."""
Read = Callable[[slice], np.ndarray]
Opener = Callable[[Path], CheckpointReader]
_File = tuple[CheckpointReader, Path]


class Target(ABC):
    """Something that can be restored: tensors by slices, and the other files of the model."""

    infos: dict[str, TensorInfo]
    promise: str
    """What is known of the restored weights."""
    buffers: float = 0.0
    """Sum of what the target's own version of transformers saved beside the weights, and counted in a published check sum."""

    @abstractmethod
    def check(self, how: Check, pool: ThreadPoolExecutor) -> None:
        """Whether base and delta are what they should be, as far as can be told before restoring."""

    @abstractmethod
    def open(self, name: str) -> Read:
        """A function that restores the patterns of a slice; it may be called in threads."""

    @abstractmethod
    def reads(self, name: str) -> list[tuple[CheckpointReader, str]]:
        """The tensors that `open` reads for one of the target, and where."""

    @abstractmethod
    def files(self) -> dict[str, bytes]:
        """Config, tokenizer and the like."""

    @abstractmethod
    def arrived(self, names: Sequence[str], pool: ThreadPoolExecutor) -> None:
        """Check what these tensors are built on, where `check` could not: shards of the base that have just come."""

    def sha256(self, name: str) -> str | None:
        """What the restored tensor must be, if that is known."""
        return None

    def suspect(self, name: str) -> UserError | None:
        """Why this tensor could not be restored, if more is known than that."""
        return None

    @property
    def num_equal(self) -> int:
        """Tensors that are the base's."""
        return 0

    def slices(self, pool: ThreadPoolExecutor) -> Iterator[tuple[str, Iterator[np.ndarray]]]:
        """Every tensor's slices, in order, checked against its SHA-256 while later ones come: all are right when the last was taken."""
        for names, files in self._batches():
            _hold(files)
            self.arrived(names, pool)
            yield from self.slices_of(names, pool)

    def slices_of(self, names: Sequence[str], pool: ThreadPoolExecutor) -> Iterator[tuple[str, Iterator[np.ndarray]]]:
        """The same for tensors whose files are there."""

        def right(name: str, digest: Any) -> None:
            if digest.hexdigest() != self.sha256(name):
                what = f"{name}: the restored tensor is not the target (SHA-256 differs); base or delta is damaged or another"
                raise self.suspect(name) or UserError(what)

        def of(name: str) -> Iterator[np.ndarray]:
            digest = hashlib.sha256() if self.sha256(name) else None
            for _ in codec.slices(self.infos[name].size):
                piece = next(restored)
                if digest:
                    hashing.call(digest.update, piece.data)
                yield piece
            if digest:
                hashing.call(right, name, digest)

        calls = (
            functools.partial(read, part) for name in names for read in [self.open(name)] for part in codec.slices(self.infos[name].size)
        )
        restored = pipeline.in_order(pool, calls)
        with pipeline.Aside() as hashing:
            for name in names:
                yield name, of(name)
            hashing.finish()

    def _batches(self) -> Iterator[tuple[list[str], dict[CheckpointReader, set[Path]]]]:
        """The tensors in their order, and the fetched files that must be there for them; all at once, where none is to be fetched.

        A batch ends where another file has to come. By then nothing runs ahead any more, so that what is not needed again can go.
        """
        needs = {name: {(reader, reader.file(source)) for reader, source in self.reads(name) if reader.on_demand} for name in self.infos}
        last = {file: number for number, need in enumerate(needs.values()) for file in need}
        readers = {reader for reader, _ in last}
        here = {(reader, path) for reader in readers for path in reader.held}
        batch: list[str] = []
        for number, (name, need) in enumerate(needs.items()):
            if not need <= here:
                if batch:
                    yield batch, _by_reader(here, readers)
                here, batch = {file for file in here if last.get(file, -1) >= number} | need, []
            batch.append(name)
        yield batch, _by_reader(here, readers)
        _hold(_by_reader(set(), readers))

    def tensors(self, check: Check = "full", workers: int | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor, for loading a model without a second copy on disk."""
        with pipeline.threads(workers) as pool:
            self.check(check, pool)
            with progress("restore", len(self.infos)) as advance:
                for name, pieces in self.slices(pool):
                    info = self.infos[name]
                    tensor, place = torch.empty(info.shape, dtype=info.dtype), 0
                    flat = codec.bits(tensor)
                    for piece in pieces:
                        flat[place : place + len(piece)] = piece
                        place += len(piece)
                    yield name, tensor
                    advance()


def _by_reader(files: set[_File], readers: set[CheckpointReader]) -> dict[CheckpointReader, set[Path]]:
    return {reader: {path for each, path in files if each is reader} for reader in readers}


def _hold(files: Mapping[CheckpointReader, set[Path]]) -> None:
    for reader, paths in files.items():
        reader.hold(paths)


class Own(Target):
    """The target of a delta made by `delta.make`."""

    def __init__(self, base: CheckpointReader, delta_dir: Path, manifest: Manifest, reader: Opener) -> None:
        self.base, self.folder, self.manifest = base, delta_dir, manifest
        self._how: Check = "full"
        self.promise = "every one as recorded (SHA-256)"
        if inexact := sum(entry.num_inexact for entry in self.manifest.entries.values()):
            self.promise += f"; {inexact:,} weights are not the target's: the sum is rounded"
        self.infos = {name: entry.info for name, entry in self.manifest.entries.items()}
        needed = [name for name, entry in self.manifest.entries.items() if entry.kind != "equal"]
        self._data = reader(delta_dir) if needed else None
        for name in needed:
            info = self._data.info(name) if self._data is not None and name in self._data else None
            wanted = self.infos[name] if self.manifest.entries[name].kind == "sum" else None
            if info is None or (wanted and info != wanted) or (not wanted and (info.dtype != torch.uint8 or len(info.shape) != 1)):
                raise UserError(f"{delta_dir}: the difference of {name} is missing or of another form; fetch or make the delta again")

    @property
    def num_equal(self) -> int:
        """Tensors that are the base's."""
        return sum(entry.kind == "equal" for entry in self.manifest.entries.values())

    def sha256(self, name: str) -> str:
        """As the manifest has it."""
        return self.manifest.entries[name].restored_sha256

    def check(self, how: Check, pool: ThreadPoolExecutor) -> None:
        """The files, and of the base every needed tensor's name, dtype and shape, a sample of its values, and (`full`) its SHA-256.

        Where the base comes shard by shard, values are checked by `arrived`.
        """
        self.files()
        self._how = how
        diagnosis.check_kind(self.base, self.manifest)
        if how == "full" and not self.base.on_demand:
            with progress("check base", len({entry.base.name for entry in self.manifest.entries.values() if entry.base})) as advance:
                self._check_values(self.infos, pool, advance)

    def arrived(self, names: Sequence[str], pool: ThreadPoolExecutor) -> None:
        """As `check` does."""
        if self.base.on_demand:
            diagnosis.check_kind(self.base, self.manifest)
            if self._how == "full":
                self._check_values(names, pool, lambda: None)

    def _check_values(self, names: Iterable[str], pool: ThreadPoolExecutor, advance: Callable[[], None]) -> None:
        needed = {entry.base.name: entry.base for name in names if (entry := self.manifest.entries[name]).base}
        digests = pipeline.in_order(pool, (functools.partial(sha256, self.base, name) for name in needed))
        for tensor, digest in zip(needed.values(), digests, strict=True):
            if digest != tensor.sha256:
                raise diagnosis.wrong_values(self.base, self.manifest, tensor.name)
            advance()

    def suspect(self, name: str) -> UserError | None:
        """The base, after a fast check."""
        base = self.manifest.entries[name].base
        if self._how == "full" or base is None or sha256(self.base, base.name) == base.sha256:
            return None
        return diagnosis.wrong_values(self.base, self.manifest, base.name)

    def reads(self, name: str) -> list[tuple[CheckpointReader, str]]:
        """The base's tensor, and the difference."""
        entry = self.manifest.entries[name]
        base = [(self.base, entry.base.name)] if entry.base else []
        return base if entry.kind == "equal" or self._data is None else [*base, (self._data, name)]

    def open(self, name: str) -> Read:
        """The base's slice, with the coded difference or the sum."""
        entry = self.manifest.entries[name]
        before = patterns(self.base, entry.base.name if entry.base else None, entry.info)
        if entry.kind == "equal":
            return before
        assert self._data is not None
        data = self._data
        if entry.kind == "sum":
            return lambda part: arithmetic(before(part), codec.bits(data.read(name, part.start, part.stop)), entry.info.dtype)
        with self._damage(name):
            decoder = _decoder(data, name, entry)

        def read(part: slice) -> np.ndarray:
            with self._damage(name):
                start, stop = decoder.spans[part.start // codec.SLICE]
                return decoder.decode(part, before(part), codec.bits(data.read(name, start, stop)).data)

        return read

    @contextlib.contextmanager
    def _damage(self, name: str) -> Iterator[None]:
        """Within the block, damaged data becomes an error that says where."""
        try:
            yield
        except codec.Damaged as error:
            what = f"{self.folder}: {name}: the delta is damaged ({error}); fetch or make it again"
            raise self.suspect(name) or UserError(what) from error

    def files(self) -> dict[str, bytes]:
        """Compared with their SHA-256."""
        found = {}
        for name, digest in self.manifest.files.items():
            source = self.folder / FILES / name
            content = source.read_bytes() if source.is_file() else None
            if content is None or hashlib.sha256(content).hexdigest() != digest:
                raise UserError(f"{source} is missing or damaged; fetch or make the delta again")
            found[name] = content
        return found


def _decoder(data: CheckpointReader, name: str, entry: Entry) -> codec.Decoder:
    size = data.info(name).size
    length = (
        int.from_bytes(codec.bits(data.read(name, size - codec.FOOT_SIZE, size)).tobytes(), "little") if size >= codec.FOOT_SIZE else size
    )
    end = size - codec.FOOT_SIZE - length
    if end < 0:
        raise codec.Damaged("it is cut off")
    foot = codec.bits(data.read(name, end, end + length)).tobytes()
    return codec.Decoder(entry.info.dtype, entry.info.shape, foot, end)


class Foreign(Target):
    """The target of a published arithmetic delta: a checkpoint of the differences, with the target's config and tokenizer.

    The result has the delta's precision: the base is rounded to it and the sum is rounded once. Rows that the base has
    not count as zero (FastChat, Vicuna, MT-LLaMA) or as the mean of its rows (Stanford Alpaca).
    """

    def __init__(self, base: CheckpointReader, delta_dir: Path, new_rows: NewRows, reader: Opener) -> None:
        self.folder, self.base, self._data = delta_dir, base, reader(delta_dir)
        self.infos = {name: self._data.info(name) for name in self._data if not _is_buffer(name)}
        for name in self.infos:
            self._check_shape(name)
        for name in self.base:
            if name not in self.infos and not _is_buffer(name):
                raise UserError(f"{delta_dir} has no tensor {name}, which the base {base.label} has; is it a delta of this base?")
        self.promise = "by a published delta, which holds no check of its base: try the model before you trust it"
        wide = any(info.dtype == torch.float32 for info in self.infos.values())
        self.buffers = sum(_rotary_sum(self._data.info(name).size, delta_dir) for name in self._data if name.endswith(_ROTARY))
        self.new_rows = ("mean" if wide else "zero") if new_rows == "auto" else new_rows

    def _check_shape(self, name: str) -> None:
        info, where = self.infos[name], f"wrong base: {self.base.label}"
        if name not in self.base:
            raise UserError(f"{where} has no tensor {name}, which the delta {self.folder} has")
        found = self.base.info(name)
        if found.shape[1:] != info.shape[1:] or len(found.shape) != len(info.shape):
            raise UserError(f"{where}: tensor {name} has the shape {list(found.shape)}, the delta's {list(info.shape)}: another model")
        if found.shape[:1] > info.shape[:1]:
            raise UserError(
                f"{where}: tensor {name} has {found.shape[0]} rows, the delta's {info.shape[0]}: a base whose vocabulary was resized"
            )
        if found.dtype.is_floating_point != info.dtype.is_floating_point or info.dtype == torch.bool:
            raise UserError(f"{where}: tensor {name} is {found.dtype}, the delta's {info.dtype}: these cannot be added")

    def check(self, how: Check, pool: ThreadPoolExecutor) -> None:
        """Names and shapes were compared; a published delta says no more about its base. But a model is not taken for one."""
        if not (self.base.on_demand or self._data.on_demand):
            diagnosis.check_published(self.base, self._data, self.infos)

    def arrived(self, names: Sequence[str], pool: ThreadPoolExecutor) -> None:
        """As `check` does."""
        if self.base.on_demand or self._data.on_demand:
            diagnosis.check_published(self.base, self._data, names)

    def reads(self, name: str) -> list[tuple[CheckpointReader, str]]:
        """Both tensors of the name."""
        return [(self.base, name), (self._data, name)]

    def open(self, name: str) -> Read:
        """The sum of the base's slice and the delta's."""
        info = self.infos[name]
        rows = None
        if self.new_rows == "mean" and self.base.info(name).shape != info.shape:
            rows = codec.bits(_mean_row(self.base, name).to(info.dtype))
        before = patterns(self.base, name, info, rows)
        return lambda part: arithmetic(before(part), codec.bits(self._data.read(name, part.start, part.stop)), info.dtype)

    def files(self) -> dict[str, bytes]:
        """The delta's own, its token ids pinned inside the embedding."""
        return pins.pinned(self.folder, _num_rows(self.infos))


_ROTARY = ".rotary_emb.inv_freq"


def _rotary_sum(size: int, folder: Path) -> float:
    """Sum of the inverse frequencies of one layer: theta^(-i / size)."""
    theta = None
    with contextlib.suppress(UserError, AttributeError):  # a stranger's file, and only a check sum asks for it
        theta = folders.read_json(folder / "config.json").get("rope_theta")
    base = float(theta) if isinstance(theta, int | float) and 0 < theta < 1e15 else 10_000.0
    frequencies: list[float] = [base ** (-i / size) for i in range(size)]
    return sum(frequencies)


def _is_buffer(name: str) -> bool:
    """What older versions of transformers saved, and every version computes."""
    return name.endswith((_ROTARY, ".attn.bias", ".attn.masked_bias"))


def _mean_row(reader: CheckpointReader, name: str) -> torch.Tensor:
    """Mean of the rows of a tensor. [columns] float64"""
    info = reader.info(name)
    rows, columns = info.shape[0], info.size // info.shape[0]
    total = torch.zeros(columns, dtype=torch.float64)
    step = max(1, codec.SLICE // columns)
    for first in range(0, rows, step):
        last = min(first + step, rows)
        total += reader.read(name, first * columns, last * columns).double().reshape(-1, columns).sum(dim=0)
    return total / rows


class Combined(Target):
    """base + the sum of factor x (target - base) over one or more targets, in the tensors that `only` names.

    Computed in float32 (float64 for such tensors) and rounded once; other tensors than floats are the base's. Tensors for
    which the base has no counterpart (buffers, for example) are the first target's: there is nothing to scale them from.
    """

    def __init__(self, targets: Sequence[Own | Foreign], scales: Sequence[float], only: str | None) -> None:
        self._targets, self._scales, self._only = targets, scales, only
        self.infos, self.promise = targets[0].infos, "scaled or in part: there is no record to compare with"
        for other in targets[1:]:
            if other.infos != self.infos:
                name = next(name for name in {**self.infos, **other.infos} if self.infos.get(name) != other.infos.get(name))
                raise UserError(f"{other.folder} and {targets[0].folder} do not restore models of one form: {name} differs")
        if only is not None and not any(map(self._is_meant, self.infos)):
            raise UserError(f"--only {only!r} names no tensor; they are called like {next(iter(self.infos))}")

    def _is_meant(self, name: str) -> bool:
        return self._only is None or fnmatchcase(name, self._only)

    def check(self, how: Check, pool: ThreadPoolExecutor) -> None:
        """Each delta's own check."""
        for target in self._targets:
            target.check(how, pool)

    def arrived(self, names: Sequence[str], pool: ThreadPoolExecutor) -> None:
        """Each delta's own check. Nothing is known of the result, so each target is restored once before, for its SHA-256 alone."""
        for target in self._targets:
            target.arrived(names, pool)
            for _, pieces in target.slices_of([name for name in names if self._changes(name) and target.sha256(name)], pool):
                for _ in pieces:
                    pass

    def reads(self, name: str) -> list[tuple[CheckpointReader, str]]:
        """The base's tensor, and of those that change what each delta adds."""
        first = self._targets[0]
        if (source := _base_name(first, name)) is None:
            return first.reads(name)
        return [each for target in self._targets for each in target.reads(name)] if self._changes(name) else [(first.base, source)]

    def _changes(self, name: str) -> bool:
        return self._is_meant(name) and self.infos[name].dtype.is_floating_point

    def open(self, name: str) -> Read:
        """The base's slice and what each delta adds."""
        info, first = self.infos[name], self._targets[0]
        source = _base_name(first, name)
        if source is None or (self._changes(name) and list(self._scales) == [1.0]):
            return first.open(name)
        before = patterns(first.base, source, info)
        if not self._changes(name):
            return before
        reads = [target.open(name) for target in self._targets]
        wide = torch.float64 if info.dtype == torch.float64 else torch.float32

        def read(part: slice) -> np.ndarray:
            patterns_before = before(part)
            base = _tensor(patterns_before, info.dtype).to(wide)
            total = base.clone()
            for scale, after in zip(self._scales, reads, strict=True):
                total += scale * (_tensor(after(part), info.dtype).to(wide) - base)
            return codec.bits(total.to(info.dtype))

        return read

    def files(self) -> dict[str, bytes]:
        """The first delta's."""
        return self._targets[0].files()


def _base_name(target: Own | Foreign, name: str) -> str | None:
    if isinstance(target, Foreign):
        return name
    base = target.manifest.entries[name].base
    return base.name if base else None


def _tensor(bits: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(bits.view(np.uint8)).view(dtype)


def open_target(
    base_dir: Path,
    deltas: Sequence[Path],
    *,
    scales: Sequence[float] = (),
    only: str | None = None,
    new_rows: NewRows = "auto",
    reader: Opener = CheckpointReader,
) -> Target:
    """What base and deltas restore: one delta as it is, or with `scales` (one for each delta, or one for all) and `only`.

    `reader` opens the weights of a folder.
    """
    if len(scales) not in (0, 1, len(deltas)):
        raise UserError(f"--scale is given {len(scales)} times for {len(deltas)} deltas; give it once, or once for each")
    foreign = {each for each in deltas if (each / "config.json").is_file() and not (each / DELTA_JSON).is_file()}
    own = {each: Manifest.read(each) for each in deltas if each not in foreign}  # says what is missing, before anything is opened
    base = reader(base_dir)
    targets = [Own(base, each, own[each], reader) if each in own else Foreign(base, each, new_rows, reader) for each in deltas]
    if len(targets) == 1 and list(scales) in ([], [1.0]) and only is None:
        return targets[0]
    factors = [*scales] * len(deltas) if len(scales) == 1 else [*scales] or [1.0] * len(deltas)
    return Combined(targets, factors, only)


@functools.cache
def files_folder(delta_dir: Path) -> Path:
    """A folder with the target's config and tokenizer: the delta's own, or a temporary one where token ids have to be pinned."""
    if (delta_dir / DELTA_JSON).is_file() or not (delta_dir / "config.json").is_file():
        Manifest.read(delta_dir)
        return delta_dir / FILES
    data = CheckpointReader(delta_dir)
    folder = Path(tempfile.mkdtemp(prefix="mtllama-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for name, content in pins.pinned(delta_dir, _num_rows({name: data.info(name) for name in data})).items():
        (folder / name).write_bytes(content)
    return folder


def _num_rows(infos: Mapping[str, TensorInfo]) -> int:
    """Rows of the embedding."""
    return min((info.shape[0] for name, info in infos.items() if name.endswith("embed_tokens.weight")), default=0)


def apply(
    target: Target,
    out: Path,
    *inputs: Path,
    overwrite: bool = False,
    check: Check = "full",
    checksum: float | None = None,
    workers: int | None = None,
) -> Summary:
    """Restore into the new folder `out`, which must not be one of `inputs`.

    The base is checked before a byte is written, every tensor before its folder appears. `checksum`: what the sum of all
    weights must be, give or take 0.01 (Stanford Alpaca publishes such a one).
    """
    refuse_inside(out, *inputs)
    folders.require_new(out, overwrite=overwrite)
    with pipeline.threads(workers) as pool:
        target.check(check, pool)
        files = target.files()
        with folders.new_folder(out, overwrite=overwrite) as folder:
            total = 0.0
            with progress("restore", len(target.infos)) as advance, CheckpointWriter(folder, target.infos) as writer:
                for name, pieces in target.slices(pool):
                    info = target.infos[name]
                    writer.begin(info.num_bytes)
                    for piece in pieces:
                        writer.write(piece.data)
                        if checksum is not None:
                            total += float(codec.values(piece, info.dtype).sum(dtype=np.float64))
                    writer.end(name, info)
                    advance()
            if checksum is not None and not any(abs(total + more - checksum) <= CHECKSUM_TOLERANCE for more in (0.0, target.buffers)):
                raise UserError(f"the sum of all weights is {total:.4f}, not {checksum}: base or delta is another, or damaged")
            for file, content in files.items():
                (folder / file).write_bytes(content)
    sizes = [(info.size, info.num_bytes) for info in target.infos.values()]
    return Summary(len(sizes), sum(size for size, _ in sizes), sum(num_bytes for _, num_bytes in sizes), target.num_equal)
