"""Output folders: written beside, synced, renamed, never half there; each with a manifest of how it came to be."""

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
from collections.abc import Collection, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

from mtllama import __version__
from mtllama.errors import UserError

MANIFEST = "mtllama.json"
"""File name of the manifest that every stage leaves in its folder."""
LOCK = "lock"
"""File in a folder that one process at a time may write into."""
_THIS = secrets.token_hex(4)
"""Tells this process from earlier ones of the same number: in containers, that of the first one is 1 at every start."""


def require_new(path: Path, *, overwrite: bool) -> None:
    """Refuse an output folder that already holds something, unless `overwrite`."""
    if path.is_file():
        raise UserError(f"{path} is a file; an output folder is needed: choose another")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise UserError(f"{path} is not empty; choose another output folder, or pass --overwrite to replace it")


@contextlib.contextmanager
def new_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a folder beside `path`; when the block ends without an error it is synced and becomes `path`.

    After an error or an interrupt nothing of it is left, and what stood at `path` before stands there still.
    """
    path = path.resolve()  # "." has no name, and a link is followed, not replaced
    _tidy(path)
    require_new(path, overwrite=overwrite)
    partial = beside(path, "partial")
    with explained(path):
        try:
            partial.mkdir(parents=True)
            yield partial
            for file in partial.rglob("*"):
                if file.is_file():
                    sync(file)
            replace_folder(partial, path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def beside(path: Path, kind: str) -> Path:
    """A hidden name beside `path` that tells which process made it, so that what a killed one left can be told."""
    return path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}-{_THIS}.{kind}")


def _tidy(path: Path) -> None:
    """Remove what processes of this machine that are no more left beside `path`; a result that one had moved aside goes back."""
    for kind in ("old", "partial", "fetched", "removed"):
        for left in path.parent.glob(f".{glob.escape(path.name)}.{glob.escape(platform.node())}.*.{kind}"):
            number, _, made_by = left.name.split(".")[-2].partition("-")
            ours = number == str(os.getpid())
            if not number.isdigit() or (made_by == _THIS if ours else os.path.exists(f"/proc/{number}")) or not os.path.isdir("/proc/self"):
                continue
            if kind == "old" and not path.exists():
                left.rename(path)
            else:
                shutil.rmtree(left, ignore_errors=True)


def replace_folder(source: Path, path: Path) -> None:
    """Rename `source` to `path`; a folder standing there is moved aside first and removed last."""
    old = beside(path, "old")
    if path.exists():
        path.rename(old)
    try:
        source.rename(path)
    except BaseException:
        if old.exists():
            old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def remove(path: Path) -> None:
    """Remove a folder of ours; it is renamed first, so that it is never seen half gone."""
    removed = beside(path, "removed")
    path.rename(removed)
    shutil.rmtree(removed)


@contextlib.contextmanager
def locked(folder: Path, marks: Collection[str]) -> Iterator[None]:
    """While the block runs, `folder` is this process's alone; it is made where it is not there, and goes again if nothing is put into it.

    One that holds files but none of `marks`, the names that tell that it is ours, is somebody else's: it is refused.
    """
    _tidy(folder)
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    ours = any(name == mark or name.startswith(f".{mark}.") for name in names for mark in marks)  # a kill may have left it half written
    if set(names) - {LOCK} and not ours:
        raise UserError(f"{folder} holds other files, where an unfinished run would be; move them, or choose another output folder")
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / LOCK, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        with contextlib.suppress(OSError):  # a file system without locks: two runs in one folder are the user's to avoid
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                free = os.path.samestat(os.fstat(descriptor), os.stat(folder / LOCK))  # the one who had it may have removed the folder
            except (BlockingIOError, FileNotFoundError):
                free = False
            if not free:
                raise UserError(f"another process writes to {folder}; wait for it, or choose another output folder")
        try:
            yield
        finally:
            if folder.is_dir() and [path.name for path in folder.iterdir()] == [LOCK]:
                (folder / LOCK).unlink()
                folder.rmdir()
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Within the block, errors that a user can mend (disk full, no permission) become one clear line about `path`."""
    try:
        yield
    except Exception as error:
        if reason := _reason(error, path):
            raise UserError(reason) from error
        raise


def _reason(error: Exception, path: Path) -> str | None:
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (found := re.search(r"\(os error (\d+)\)", str(error))):  # safetensors' own error has no errno
        number = int(found[1])
    where = getattr(error, "filename", None)
    if number in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(next(p for p in (path, *path.parents) if p.exists())).free
        return f"no space left on the disk of {path} ({free / 1e6:.0f} MB free); free some or choose another output folder"
    if number in (errno.EACCES, errno.EROFS, errno.EPERM):
        return f"{where or path} cannot be written ({os.strerror(number)}); choose another output folder"
    if number in (errno.ENOTDIR, errno.EEXIST) and where:
        return f"{where}: {os.strerror(number)}; choose another output folder"
    return None


def sync(file: Path) -> None:
    """Flush one file to the disk."""
    with open(file, "rb") as handle:
        os.fsync(handle.fileno())


def write_text(path: Path, text: str) -> None:
    """Write a small file atomically: beside, synced, renamed."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """The same for bytes."""
    with new_file(path) as handle:
        handle.write(content)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a file beside `path`; when the block ends without an error it is synced and becomes `path`."""
    partial = beside(path, "partial")
    try:
        with open(partial, "wb") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file; a broken one is an error that names the line."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); it may be cut off: make it again") from error


def write_manifest(folder: Path, stage: str, **facts: Any) -> None:
    """Write the manifest of one stage: what it is, from what, with which versions."""
    write_json(folder / MANIFEST, {"stage": stage, "versions": versions(), **facts})


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder, or None if it has none."""
    path = folder / MANIFEST
    return dict(read_json(path)) if path.is_file() else None


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    found = {"mtllama": __version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "tokenizers", "safetensors"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, as hex."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
