"""Checkpoints and deltas of the Hugging Face hub, fetched file by file beside an output folder and deleted as they are done with.

So a model is restored from hub ids with no more on disk than the output and about one shard of base and delta each. What
is in the local cache of the hub's client is used from there and stays. Tensors' names, shapes and dtypes are known before
any safetensors shard comes; a `.bin` says nothing of itself before it is there, so those are all fetched at the beginning.
"""

import contextlib
import os
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mtllama import folders, hub
from mtllama.errors import UserError
from mtllama.progress import PLAIN_SECONDS, say
from mtllama.weights.manifest import DELTA_JSON, FILES, Manifest
from mtllama.weights.shards import BIN_INDEX, BIN_SINGLE, DTYPES, INDEX, SINGLE, CheckpointReader, TensorInfo, is_small

QUIET_SECONDS = 2.0
"""A file that takes longer to fetch is spoken of."""
TIMEOUT = 30.0
"""Seconds to wait for the hub to say what it has."""


class Fetcher:
    """Folders of what hub ids name, for as long as the block runs; readers of them fetch and delete shards.

    Raises `UserError`, one line, for what cannot be fetched; nothing that was fetched is left then either.
    """

    def __init__(self, out: Path, *, overwrite: bool = False) -> None:
        """`out`: the output folder; it must be new, and what is fetched lies beside it."""
        folders.require_new(out, overwrite=overwrite)
        self._out = out.resolve()
        self._room = folders.beside(self._out, "fetched")
        self._repositories: dict[Path, _Repository] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        shutil.rmtree(self._room, ignore_errors=True)

    def base(self, text: str) -> Path | None:
        """The folder of a base that `text` names on the hub, without weights as yet; None where it is a folder or no hub id."""
        return self._folder(text, "model")

    def delta(self, text: str) -> Path | None:
        """The same for a delta: its config, tokenizer and manifest are there."""
        return self._folder(text, "delta")

    def reader(self, folder: Path) -> CheckpointReader:
        """The weights of a folder, be it one of these or any other."""
        return CheckpointReader(folder, self._repositories.get(folder))

    def _folder(self, text: str, kind: str) -> Path | None:
        parsed = hub.parse(text)
        if parsed is None or Path(text).expanduser().is_dir():
            return None
        hub_id, revision = parsed
        folder = self._room / text.replace("/", "--")
        if folder in self._repositories:
            return folder
        reason = hub.unreachable()
        try:
            info = None if reason else _api().model_info(hub_id, revision=revision, files_metadata=True, timeout=TIMEOUT)
        except Exception as error:  # the client raises many kinds; each means the same to the user
            info, reason = None, _reason(error)
        if info is None:
            if cached := _cached_folder(hub_id, revision):
                return cached
            why = f"{reason}, and it is not in the local cache"
            raise UserError(f"no folder {text!r}, and the hub {kind} of that id cannot be fetched ({why})")
        sizes = {sibling.rfilename: sibling.size for sibling in info.siblings or ()}
        # The client's other transport keeps what it fetched in a cache of its own, in some versions.
        os.environ.setdefault("HF_XET_CHUNK_CACHE_SIZE_BYTES", "0")
        repository = _Repository(text, hub_id, info.sha, folder, sizes)
        with folders.explained(self._out):
            folder.mkdir(parents=True, exist_ok=True)
        if kind == "delta":
            repository.get_small_files()
        for index in {INDEX, BIN_INDEX} & set(sizes):
            repository.get(index)
        self._repositories[folder] = repository
        return folder


@dataclass(frozen=True)
class _Repository:
    """A repository at one commit, and the folder that its files come to: the `Source` of a reader."""

    label: str
    hub_id: str
    commit: str
    folder: Path
    sizes: dict[str, int | None]
    """Every file, and its bytes."""

    def get_small_files(self) -> None:
        """What a delta has beside its weights: the manifest, which is checked, and what it names; or all that another tool's has."""
        if DELTA_JSON in self.sizes:
            self.get(DELTA_JSON)
            wanted = [f"{FILES}/{name}" for name in Manifest.read(self.folder).files]
        else:
            wanted = [name for name, size in self.sizes.items() if is_small(name, size or 0)]
        for name in wanted:
            if name in self.sizes:
                self.get(name)

    def get(self, name: str) -> None:
        """Bring a file to its folder: a link to the client's cache, or a copy from the hub."""
        import huggingface_hub

        path = self.folder / name
        if path.exists():
            return
        try:
            with folders.explained(self.folder):
                path.parent.mkdir(parents=True, exist_ok=True)
                if cached := _cached(self.hub_id, name, self.commit):
                    path.symlink_to(cached.resolve())
                else:
                    with self._spoken_of(name):
                        huggingface_hub.hf_hub_download(self.hub_id, name, revision=self.commit, local_dir=self.folder)
        except UserError:
            raise
        except Exception as error:  # the client raises many kinds; each means the same to the user
            raise UserError(f"{self.label}: {name} cannot be fetched ({_reason(error)}); try again") from error

    @contextlib.contextmanager
    def _spoken_of(self, name: str) -> Iterator[None]:
        """Say now and then how far a file is, while the block fetches it."""
        done, total = threading.Event(), self.sizes.get(name) or 0

        def speak() -> None:
            wait = QUIET_SECONDS
            while not done.wait(wait):
                with contextlib.suppress(OSError):  # it may just have become whole
                    num = sum(file.stat().st_size for file in self.folder.rglob("*.incomplete"))
                    say(f"fetch {self.label}: {name}: {num / 1e6:,.0f} of {total / 1e6:,.0f} MB")
                wait = PLAIN_SECONDS

        thread = threading.Thread(target=speak, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def has(self, path: Path) -> bool:
        """Whether the repository has such a file."""
        return path.name in self.sizes

    def announced(self, path: Path) -> dict[str, TensorInfo] | None:
        """Read from the beginning of the file on the hub; None for a `.bin`, and for what need not be fetched."""
        if path.name not in self.sizes:
            raise UserError(f"{self.label} has no {path.name}, though its index names it")
        if path.suffix != ".safetensors" or path.exists() or _cached(self.hub_id, path.name, self.commit):
            return None
        try:
            tensors = _api().parse_safetensors_file_metadata(self.hub_id, path.name, revision=self.commit).tensors
        except Exception as error:  # as above
            raise UserError(f"{self.label}: {path.name} cannot be fetched ({_reason(error)}); try again") from error
        found = {}
        for name, tensor in sorted(tensors.items(), key=lambda item: item[1].data_offsets):
            if tensor.dtype not in DTYPES:
                raise UserError(f"{self.label}: tensor {name} of {path.name} has the dtype {tensor.dtype}, which is not supported")
            found[name] = TensorInfo(DTYPES[tensor.dtype], tuple(tensor.shape))
        return found

    def fetch(self, path: Path) -> None:
        """Bring a shard."""
        self.get(path.name)

    def drop(self, path: Path) -> None:
        """Delete it, or the link to it."""
        path.unlink(missing_ok=True)


def _api() -> Any:
    import huggingface_hub

    return huggingface_hub.HfApi()


def _cached(hub_id: str, name: str, revision: str | None) -> Path | None:
    """A file of the client's own cache."""
    import huggingface_hub

    found = huggingface_hub.try_to_load_from_cache(hub_id, name, revision=revision)
    return Path(found) if isinstance(found, str) else None


def _cached_folder(hub_id: str, revision: str | None) -> Path | None:
    """A repository of the client's own cache, as whole as it is there."""
    for name in (DELTA_JSON, INDEX, BIN_INDEX, SINGLE, BIN_SINGLE, "config.json"):
        if found := _cached(hub_id, name, revision):
            return found.parent
    return None


def _reason(error: Exception) -> str:
    """What went wrong, in words where the client's are many."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return "its owner gives access on request: ask on its page, then run: hf auth login"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "the hub has none of that name, or it is private"
    if isinstance(error, errors.RevisionNotFoundError):
        return "it has no such revision"
    return " ".join(str(error).split())[:160] or type(error).__name__
