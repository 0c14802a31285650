"""Output folders and small files: whole or not there at all, and clear words where the disk says no."""

import errno
import hashlib
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtllama import __version__, folders
from mtllama.errors import UserError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def standing(folder: Path) -> dict[str, str]:
    """Every file below a folder, hidden ones too, with its text."""
    return {str(path.relative_to(folder)): path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*")) if path.is_file()}


def old_folder(path: Path) -> Path:
    path.mkdir()
    (path / "old").write_text("old", encoding="utf-8")
    return path


def test_a_folder_appears_whole_and_only_at_the_end(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with folders.new_folder(out) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("text", encoding="utf-8")
        assert not out.exists() and folder.parent == out.parent
    assert standing(tmp_path) == {"deep/out/sub/file": "text"}
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt(), UserError("bad input"), SystemExit(2)], ids=repr)
@pytest.mark.parametrize("overwrite", [False, True])
def test_after_an_error_nothing_is_left_and_the_old_folder_stands(tmp_path: Path, error: BaseException, overwrite: bool) -> None:
    out = tmp_path / "out"
    if overwrite:
        old_folder(out)
    before = standing(tmp_path)
    assert bool(before) == overwrite
    with pytest.raises(type(error)) as caught, folders.new_folder(out, overwrite=overwrite) as folder:
        (folder / "file").write_text("text", encoding="utf-8")
        raise error
    assert caught.value is error
    assert standing(tmp_path) == before and len(list(tmp_path.iterdir())) == overwrite


def test_a_folder_that_holds_something_is_replaced_only_when_asked(tmp_path: Path) -> None:
    out = old_folder(tmp_path / "out")
    with pytest.raises(UserError, match=r"out is not empty; choose another output folder, or pass --overwrite"), folders.new_folder(out):
        raise AssertionError("the block must not begin")
    assert standing(tmp_path) == {"out/old": "old"}
    with folders.new_folder(out, overwrite=True) as folder:
        (folder / "new").write_text("new", encoding="utf-8")
        assert standing(out) == {"old": "old"}
    assert standing(tmp_path) == {"out/new": "new"} and len(list(tmp_path.iterdir())) == 1


def test_an_empty_folder_is_taken_and_a_file_never(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with folders.new_folder(tmp_path / "empty") as folder:
        (folder / "new").write_text("new", encoding="utf-8")
    assert standing(tmp_path) == {"empty/new": "new"}
    with (
        pytest.raises(UserError, match="is a file; an output folder is needed"),
        folders.new_folder(tmp_path / "empty" / "new", overwrite=True),
    ):
        raise AssertionError("the block must not begin")
    with pytest.raises(UserError, match="Not a directory"), folders.new_folder(tmp_path / "empty" / "new" / "below"):
        raise AssertionError("the block must not begin")
    assert standing(tmp_path) == {"empty/new": "new"}


def test_the_working_folder_itself_can_be_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with folders.new_folder(Path(".")) as folder:
        (folder / "new").write_text("new", encoding="utf-8")
    assert standing(tmp_path) == {"here/new": "new"} and len(list(tmp_path.iterdir())) == 1


def test_a_link_is_followed_and_stays_a_link(tmp_path: Path) -> None:
    old_folder(tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    with folders.new_folder(tmp_path / "link", overwrite=True) as folder:
        (folder / "new").write_text("new", encoding="utf-8")
    assert (tmp_path / "link").is_symlink() and standing(tmp_path / "real") == {"new": "new"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


def test_a_failed_replacement_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = old_folder(tmp_path / "out")
    rename, calls = Path.rename, []

    def second_fails(self: Path, to: Path) -> Path:
        calls.append(to)
        if len(calls) == 2:
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", second_fails)
    with pytest.raises(OSError, match="Input/output"), folders.new_folder(out, overwrite=True) as folder:
        (folder / "new").write_text("new", encoding="utf-8")
    assert len(calls) == 3
    assert standing(tmp_path) == {"out/old": "old"} and len(list(tmp_path.iterdir())) == 1


def test_every_file_is_on_the_disk_before_the_folder_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, synced = tmp_path / "out", []

    def sync(file: Path) -> None:
        assert not out.exists()
        synced.append(file.name)

    monkeypatch.setattr(folders, "sync", sync)
    with folders.new_folder(out) as folder:
        for name in ("a", "b"):
            (folder / name).write_text(name, encoding="utf-8")
    assert sorted(synced) == ["a", "b"] and out.is_dir()


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, r"no space left on the disk of .*out \(\d+ MB free\)"),
        (errno.EDQUOT, "no space left on the disk"),
        (errno.EACCES, r"weights cannot be written \(.*\); choose another output folder"),
        (errno.EROFS, r"weights cannot be written"),
        (errno.EPERM, r"weights cannot be written"),
        (errno.ENOTDIR, r"weights: .*; choose another output folder"),
    ],
)
def test_what_a_user_can_mend_is_one_clear_line(tmp_path: Path, number: int, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught, folders.new_folder(tmp_path / "out"):
        raise OSError(number, os.strerror(number), "weights")
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_other_errors_of_the_system_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), folders.new_folder(tmp_path / "out") as folder:
        (folder / "gone").read_text(encoding="utf-8")
    assert not list(tmp_path.iterdir())


def test_remove_takes_the_whole_folder_and_nothing_else(tmp_path: Path) -> None:
    old_folder(tmp_path / "out")
    old_folder(tmp_path / "other")
    folders.remove(tmp_path / "out")
    assert standing(tmp_path) == {"other/old": "old"} and len(list(tmp_path.iterdir())) == 1


def test_a_folder_is_one_process_s_alone_and_somebody_else_s_is_refused(tmp_path: Path) -> None:
    work = tmp_path / "work"
    with folders.locked(work, ("state",)):
        (work / "state").touch()
        with pytest.raises(UserError, match=r"another process writes to .*work; wait for it"), folders.locked(work, ("state",)):
            raise AssertionError("the block must not begin")
    with folders.locked(work, ("state",)):  # what it holds is ours
        folders.remove(work)
    with folders.locked(work, ("state",)):
        assert work.is_dir()
    assert not list(tmp_path.iterdir())  # nothing was put into it
    old_folder(work)
    with pytest.raises(UserError, match="holds other files"), folders.locked(work, ("state",)):
        raise AssertionError("the block must not begin")
    assert standing(tmp_path) == {"work/old": "old"}


def test_a_lock_of_a_folder_that_its_owner_has_removed_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between opening the file and locking it, the other one is done."""
    work, flock = tmp_path / "work", folders.fcntl.flock

    def late(*rest: Any) -> None:
        folders.remove(work)
        flock(*rest)

    monkeypatch.setattr(folders.fcntl, "flock", late)
    with pytest.raises(UserError, match="another process writes"), folders.locked(work, ()):
        raise AssertionError("the block must not begin")


@given(JSON)
def test_json_comes_back_as_it_was(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "value.json"
    folders.write_json(path, value)
    assert folders.read_json(path) == value
    assert path.read_text(encoding="utf-8").endswith("\n")


def test_a_small_file_is_replaced_at_once_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.json"
    folders.write_json(path, {"step": 1, "note": "Übung"})
    assert "Übung" in path.read_text(encoding="utf-8")

    def full(number: int) -> None:
        assert folders.read_json(path)["step"] == 1, "the old file stands until the new one is on the disk"
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        folders.write_json(path, {"step": 2})
    assert folders.read_json(path)["step"] == 1
    monkeypatch.undo()
    folders.write_json(path, {"step": 3})
    assert folders.read_json(path) == {"step": 3} and [each.name for each in tmp_path.iterdir()] == ["state.json"]


@pytest.mark.parametrize("data", [b"", b'{"a": 1', b"\xff\xfe", b'{"a": 1} x'])
def test_a_broken_json_file_is_named(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "state.json"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"state\.json is not valid JSON .*make it again"):
        folders.read_json(path)


def test_a_manifest_says_stage_and_versions(tmp_path: Path) -> None:
    assert folders.read_manifest(tmp_path) is None
    folders.write_manifest(tmp_path, "model", name="pico", format="mtllama")
    manifest = folders.read_manifest(tmp_path)
    assert manifest is not None and manifest == json.loads((tmp_path / folders.MANIFEST).read_text(encoding="utf-8"))
    assert (manifest["stage"], manifest["name"], manifest["format"]) == ("model", "pico", "mtllama")
    assert manifest["versions"]["mtllama"] == __version__ and {"python", "torch", "transformers"} <= manifest["versions"].keys()


def test_a_digest_is_that_of_the_bytes(tmp_path: Path) -> None:
    data = bytes(range(256)) * 5000
    (tmp_path / "file").write_bytes(data)
    ours, theirs = folders.sha256_file(tmp_path / "file"), hashlib.sha256(data).hexdigest()
    assert ours == theirs


def test_a_full_disk_is_one_line_whichever_library_met_it(tmp_path: Path) -> None:
    """safetensors reports the disk's error as text of its own kind."""
    for error in (OSError(28, "No space left on device"), RuntimeError("Error while serializing: I/O error: No space left (os error 28)")):
        with pytest.raises(UserError, match="no space left on the disk"), folders.new_folder(tmp_path / "out"):
            raise error
    with pytest.raises(RuntimeError, match="os error 999"), folders.new_folder(tmp_path / "out"):
        raise RuntimeError("something else (os error 999)")
    assert list(tmp_path.iterdir()) == []


def dead_process() -> int:
    """The number of a process that is no more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def left_by(number: int, out: Path, kind: str) -> Path:
    """What a process of this machine that was killed would have left beside `out`."""
    folder = out.with_name(f".{out.name}.{platform.node()}.{number}-0123abcd.{kind}")
    folder.mkdir()
    (folder / "file").write_text(kind, encoding="utf-8")
    return folder


def test_what_a_killed_process_left_is_removed_by_the_next_one(tmp_path: Path) -> None:
    out = tmp_path / "out"
    left, other = left_by(dead_process(), out, "partial"), left_by(dead_process(), tmp_path / "other", "partial")
    running, elsewhere = left_by(os.getppid(), out, "partial"), tmp_path / f".out.elsewhere.{dead_process()}.partial"
    fetched = left_by(dead_process(), out, "fetched")
    elsewhere.mkdir()
    with folders.new_folder(out) as folder:
        (folder / "file").write_text("new", encoding="utf-8")
    assert not left.exists() and not fetched.exists()
    assert other.exists() and running.exists() and elsewhere.exists()  # not ours, or not dead as far as we know
    assert (out / "file").read_text(encoding="utf-8") == "new"


def test_what_a_killed_process_of_the_same_number_left_is_not_in_the_way(tmp_path: Path) -> None:
    """In a container the first process has the number 1 at every start; what this one makes itself is left alone."""
    out = tmp_path / "out"
    left, mine = left_by(os.getpid(), out, "partial"), folders.beside(out, "fetched")
    mine.mkdir()
    with folders.new_folder(out) as folder:
        assert not left.exists() and mine.exists() and folder != left
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([mine.name, "out"])


def test_a_result_that_a_killed_process_had_moved_aside_goes_back(tmp_path: Path) -> None:
    out = tmp_path / "out"
    left_by(dead_process(), out, "old")
    with pytest.raises(UserError, match="not empty"), folders.new_folder(out):
        pass
    assert standing(tmp_path) == {"out/file": "old"}


def test_a_result_moved_aside_goes_when_the_new_one_stands(tmp_path: Path) -> None:
    out = tmp_path / "out"
    left_by(dead_process(), out, "old")
    out.mkdir()
    (out / "file").write_text("new", encoding="utf-8")
    with folders.new_folder(out, overwrite=True) as folder:
        (folder / "file").write_text("newer", encoding="utf-8")
    assert standing(tmp_path) == {"out/file": "newer"}
