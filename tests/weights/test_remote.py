"""Restoring from hub ids: shard by shard, no more on disk than is needed, nothing left behind, and one line for what fails."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import miniature
import pytest
import safetensors.torch
import torch
from checkpoints import EMBEDDING, NORM, add_noise, assert_restored, assert_weights, nothing_left, tree, weights, with_weights
from hub_server import Hub, serving

from mtllama import cli, hub, progress
from mtllama.errors import UserError
from mtllama.weights import delta, remote, restore
from mtllama.weights.manifest import DELTA_JSON
from mtllama.weights.shards import BIN_SINGLE, INDEX, SINGLE, CheckpointReader, TensorInfo

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def sharded(source: Path, folder: Path, where: dict[str, int]) -> Path:
    """A copy of a folder whose tensors are in the shards of these numbers."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors", INDEX))
    tensors, count = weights(source), max(where.values()) + 1
    files = [f"model-{number + 1:05d}-of-{count:05d}.safetensors" for number in range(count)]
    for number, file in enumerate(files):
        if group := {name: tensors[name] for name in tensors if where[name] == number}:
            safetensors.torch.save_file(group, folder / file, metadata={"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"weight_map": {name: files[where[name]] for name in sorted(where)}}))
    return folder


def in_turn(source: Path, folder: Path, count: int) -> Path:
    """A copy of a folder in so many shards, one behind the other."""
    names = sorted(weights(source))
    return sharded(source, folder, {name: number * count // len(names) for number, name in enumerate(names)})


class Far:
    """A `Source`: a folder elsewhere whose shards are copied when they are wanted."""

    def __init__(self, origin: Path, folder: Path) -> None:
        self.origin, self.label, self.fetched, self.most = origin, f"far {origin.name}", list[str](), 0
        self.folder = Path(shutil.copytree(origin, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.bin")))

    def has(self, path: Path) -> bool:
        return (self.origin / path.name).is_file()

    def announced(self, path: Path) -> dict[str, TensorInfo] | None:
        if path.suffix == ".bin":
            return None
        reader = CheckpointReader(self.origin)
        return {name: reader.info(name) for name in reader if reader.file(name).name == path.name}

    def fetch(self, path: Path) -> None:
        shutil.copyfile(self.origin / path.name, path)
        self.fetched.append(path.name)
        self.most = max(self.most, len(self.here()))

    def drop(self, path: Path) -> None:
        path.unlink()

    def here(self) -> list[Path]:
        return [path for path in self.folder.iterdir() if path.suffix in (".safetensors", ".bin")]


def open_far(base: Far, deltas: Sequence[Far], **options: Any) -> restore.Target:
    """What these restore."""
    sources: dict[Path, Far] = {each.folder: each for each in (base, *deltas)}
    reader = lambda folder: CheckpointReader(folder, sources[folder])  # noqa: E731
    return restore.open_target(base.folder, [each.folder for each in deltas], reader=reader, **options)


def fewest(order: Sequence[str], where: dict[str, int]) -> int:
    """Shards that must be there at once, when tensors are taken in this order: from a shard's first tensor to its last."""
    numbers = [where.get(name) for name in order]
    spans = [(numbers.index(each), len(numbers) - numbers[::-1].index(each)) for each in set(numbers) - {None}]
    return max(sum(first <= place < stop for first, stop in spans) for place in range(len(order)))


@hypothesis.settings(max_examples=12)
@hypothesis.given(data=st.data())
def test_in_any_split_each_shard_comes_once_and_goes_when_it_is_done_with(
    pico: Path, target: Path, made: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    room = tmp_path_factory.mktemp("far")
    shards = st.integers(0, 3)
    where = {kind: {name: data.draw(shards) for name in sorted(weights(folder))} for kind, folder in (("base", pico), ("delta", made))}
    base = Far(sharded(pico, room / "base", where["base"]), room / "base here")
    difference = Far(sharded(made, room / "delta", where["delta"]), room / "delta here")
    restored = open_far(base, [difference])
    assert not base.fetched and not difference.fetched, "names and shapes are known before"
    restore.apply(restored, room / "out", check=data.draw(st.sampled_from(restore.CHECKS)))
    assert_restored(room / "out", target)
    for far, kind in ((base, "base"), (difference, "delta")):
        assert sorted(far.fetched) == sorted(path.name for path in far.origin.glob("*.safetensors"))
        assert far.most == fewest(list(restored.infos), where[kind])
        assert not far.here()


def test_shards_in_the_order_of_the_target_are_there_one_at_a_time(pico: Path, target: Path, made: Path, tmp_path: Path) -> None:
    base = Far(in_turn(pico, tmp_path / "base", 5), tmp_path / "base here")
    difference = Far(in_turn(made, tmp_path / "delta", 3), tmp_path / "delta here")
    restore.apply(open_far(base, [difference]), tmp_path / "out", workers=3)
    assert_restored(tmp_path / "out", target)
    assert (len(base.fetched), base.most, len(difference.fetched), difference.most) == (5, 1, 3, 1)


def test_a_delta_shard_that_no_changed_tensor_is_in_is_not_fetched(pico: Path, target: Path, made: Path, tmp_path: Path) -> None:
    base = Far(in_turn(pico, tmp_path / "base", 4), tmp_path / "base here")
    halves = sharded(made, tmp_path / "delta", {name: int(name == EMBEDDING) for name in weights(made)})
    difference = Far(halves, tmp_path / "delta here")
    restore.apply(open_far(base, [difference], only=EMBEDDING), tmp_path / "out")
    wanted = {**weights(pico), EMBEDDING: weights(target)[EMBEDDING]}
    assert_weights(weights(tmp_path / "out"), wanted)
    assert difference.fetched == ["model-00002-of-00002.safetensors"] and len(base.fetched) == 4


def test_two_deltas_of_a_base_share_its_shards(pico: Path, made: Path, added: Path, tmp_path: Path) -> None:
    base = Far(in_turn(pico, tmp_path / "base", 4), tmp_path / "base here")
    deltas = [Far(in_turn(folder, tmp_path / folder.name, 2), tmp_path / f"{folder.name} here") for folder in (made, added)]
    restore.apply(open_far(base, deltas, scales=[0.5]), tmp_path / "out")
    restore.apply(restore.open_target(pico, [made, added], scales=[0.5]), tmp_path / "near")
    assert_weights(weights(tmp_path / "out"), weights(tmp_path / "near"))
    assert len(base.fetched) == 4 and base.most == 1


@pytest.mark.parametrize("check", restore.CHECKS)
def test_other_values_are_noticed_when_their_shard_comes(pico: Path, made: Path, tmp_path: Path, check: restore.Check) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[NORM] += 1  # the last of all

    other = with_weights(pico, tmp_path / "other", change)
    base = Far(in_turn(other, tmp_path / "base", 4), tmp_path / "base here")
    difference = Far(in_turn(made, tmp_path / "delta", 2), tmp_path / "delta here")
    with pytest.raises(UserError, match=rf"wrong base: in far base the tensor {NORM} differs in its values: .*the delta needs the pico"):
        restore.apply(open_far(base, [difference]), tmp_path / "out", check=check)
    assert len(base.fetched) == 4 and nothing_left(tmp_path / "out")


def test_one_changed_weight_is_noticed_by_the_full_check(pico: Path, made: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[EMBEDDING][1, 1] += 1

    other = with_weights(pico, tmp_path / "other", change)
    base, difference = Far(other, tmp_path / "base here"), Far(made, tmp_path / "delta here")
    with pytest.raises(UserError, match=rf"wrong base: in far other the tensor {EMBEDDING} differs in its values"):
        restore.apply(open_far(base, [difference]), tmp_path / "out")
    assert nothing_left(tmp_path / "out")


def cast(tensors: dict[str, torch.Tensor]) -> None:
    tensors[NORM] = tensors[NORM].float()


def cut(tensors: dict[str, torch.Tensor]) -> None:
    tensors[EMBEDDING] = tensors[EMBEDDING][:-1].clone()


def lose(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[NORM]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (cast, f"in far other the tensor {NORM} is F32, not BF16: another precision, or another model"),
        (cut, rf"in far other the tensor {EMBEDDING} has the shape .*: its vocabulary was resized"),
        (lose, f"far other has no tensor {NORM}: another model"),
    ],
)
def test_another_form_is_refused_before_a_shard_comes(
    pico: Path, made: Path, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], None], message: str
) -> None:
    base = Far(with_weights(pico, tmp_path / "other", change), tmp_path / "base here")
    difference = Far(made, tmp_path / "delta here")
    with pytest.raises(UserError, match=f"wrong base: {message}; the delta needs the pico"):
        restore.apply(open_far(base, [difference]), tmp_path / "out")
    assert not base.fetched and not difference.fetched and nothing_left(tmp_path / "out")


def test_a_shard_that_is_not_what_was_announced_is_named(pico: Path, made: Path, tmp_path: Path) -> None:
    base, difference = Far(pico, tmp_path / "base here"), Far(made, tmp_path / "delta here")
    target = open_far(base, [difference])
    base.origin = with_weights(pico, tmp_path / "newer", cut)
    with pytest.raises(UserError, match=rf"{SINGLE}: tensor {EMBEDDING} is not there, or not as it was announced"):
        restore.apply(target, tmp_path / "out")


@pytest.mark.parametrize("kind", ["Alpaca", "Vicuna"])
def test_published_deltas_come_the_same_way(kind: str, tmp_path: Path) -> None:
    release = miniature.alpaca(tmp_path / "release") if kind == "Alpaca" else miniature.fastchat(tmp_path / "release", "v0", "safetensors")
    base, difference = Far(release.base, tmp_path / "base here"), Far(release.delta, tmp_path / "delta here")
    target = open_far(base, [difference])
    assert len(difference.fetched) == (3 if kind == "Alpaca" else 0), "what a .bin holds, only the file can tell"
    restore.apply(target, tmp_path / "out", checksum=release.check_sum)
    assert_weights(weights(tmp_path / "out"), release.target)
    assert len(base.fetched) == 2 and len(difference.fetched) == (3 if kind == "Alpaca" else 1), "each once"
    assert not base.here() and not difference.here()


def test_a_base_in_bin_shards_is_fetched_as_a_whole(tmp_path: Path) -> None:
    release = miniature.fastchat(tmp_path / "release", "v1.1", "safetensors")
    other = tmp_path / "bin"
    other.mkdir()
    torch.save(weights(release.base), other / BIN_SINGLE)
    base, difference = Far(other, tmp_path / "base here"), Far(release.delta, tmp_path / "delta here")
    target = open_far(base, [difference])
    assert (base.fetched, difference.fetched) == ([BIN_SINGLE], [])
    restore.apply(target, tmp_path / "out")
    assert_weights(weights(tmp_path / "out"), release.target)
    assert base.fetched == [BIN_SINGLE] and not base.here()


# What follows goes over HTTP.


def apply(hub: Hub, room: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, with this hub and an empty cache in `room`."""
    environment = {name: value for name, value in os.environ.items() if not name.upper().endswith("_PROXY")}
    environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(room / "cache"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-m", "mtllama", "delta", "apply", *words, "--out", str(room / "out")]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def assert_one_line(ended: subprocess.CompletedProcess[str], room: Path) -> str:
    """It failed as it should, and left nothing; returns what it said (and not how far a slow fetch was)."""
    lines = [line for line in ended.stderr.splitlines() if not line.startswith("fetch me/")]
    assert ended.returncode == 2 and len(lines) == 1 and lines[0].startswith("mtllama: "), ended.stderr
    assert nothing_left(room / "out") and not ended.stdout
    return lines[0]


class Watch:
    """Sees, in the middle of every file that is sent, which shards are there (or half there) and of which repository."""

    def __init__(self, room: Path) -> None:
        self._room, self.seen = room, list[dict[str, int]]()

    def __call__(self, repository: str, name: str) -> None:
        if name.endswith((".safetensors", ".bin")):
            files = [file for file in self._room.glob(".out.*.fetched/**/*") if file.suffix in (".safetensors", ".bin", ".incomplete")]
            folders = [file.relative_to(self._room).parts[1] for file in files]
            self.seen.append({folder: folders.count(folder) for folder in sorted(set(folders))})

    def most(self, folder: str) -> int:
        """Shards of a repository that were there at once."""
        return max((each.get(folder, 0) for each in self.seen), default=0)


@pytest.fixture
def far(pico: Path, made: Path, tmp_path: Path) -> Iterator[tuple[Hub, Callable[[], None]]]:
    """A hub with the pico in four shards and the delta in two."""
    served = Hub({"me/base": in_turn(pico, tmp_path / "base", 4), "me/delta": in_turn(made, tmp_path / "delta", 2)})
    with serving(served) as die:
        yield served, die


def test_base_and_delta_from_the_hub_are_on_disk_a_shard_at_a_time(
    far: tuple[Hub, Callable[[], None]], target: Path, tmp_path: Path
) -> None:
    served, _ = far
    served.branches["me/delta"] = "v1.0"
    served.halfway = watch = Watch(tmp_path)
    ended = apply(served, tmp_path, "--base", "me/base", "--delta", "me/delta@v1.0")
    assert (ended.returncode, ended.stderr) == (0, "") and "every one as recorded" in ended.stdout
    assert_restored(tmp_path / "out", target)
    for repository in ("me/base", "me/delta"):
        assert served.shards(repository) == sorted(file.name for file in served.folders[repository].glob("*.safetensors"))
    assert served.fetched("me/delta")[0] == DELTA_JSON, "the manifest is the first"
    assert len(watch.seen) == 6 and {"me--base": 1, "me--delta@v1.0": 1} in watch.seen
    assert (watch.most("me--base"), watch.most("me--delta@v1.0")) == (1, 1)
    assert not list(tmp_path.glob(".out*")) and not list((tmp_path / "cache").glob("hub/models--*"))


def test_a_published_bin_delta_comes_first_and_its_base_shard_by_shard(tmp_path: Path) -> None:
    release = miniature.mt_llama(tmp_path / "release")
    served = Hub({"me/base": release.base, "me/delta": release.delta}, halfway=(watch := Watch(tmp_path)))
    with serving(served):
        ended = apply(served, tmp_path, "--base", "me/base", "--delta", "me/delta")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert_weights(weights(tmp_path / "out"), release.target)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == release.rows
    assert len(served.shards("me/delta")) == len(served.shards("me/base")) == watch.most("me--delta") == 2
    assert watch.most("me--base") == 1 and not list(tmp_path.glob(".out*"))


def cache(room: Path, repository: str, commit: str, files: Sequence[Path], root: Path) -> Path:
    """The client's cache with these files of a repository in it; returns its folder."""
    folder = room / "hub" / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    for number, file in enumerate(files):
        blob, place = folder / "blobs" / str(number), folder / "snapshots" / commit / file.relative_to(root)
        for each in (blob, place):
            each.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, blob)
        place.symlink_to(blob)
    return folder


def test_what_is_in_the_cache_is_not_fetched_and_stays(far: tuple[Hub, Callable[[], None]], target: Path, tmp_path: Path) -> None:
    served, _ = far
    base = served.folders["me/base"]
    shards = sorted(base.glob("*.safetensors"))
    cached = [base / INDEX, *shards[1:3]]
    folder = cache(tmp_path / "cache", "me/base", served.commit("me/base"), cached, base)
    before = tree(folder)
    assert len(before) == 1 + 2 * len(cached)
    ended = apply(served, tmp_path, "--base", "me/base", "--delta", "me/delta")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert_restored(tmp_path / "out", target)
    assert served.fetched("me/base") == [shards[0].name, shards[3].name]
    assert tree(folder) == before


def test_a_base_of_other_shapes_is_refused_before_any_shard_is_fetched(
    far: tuple[Hub, Callable[[], None]], pico: Path, tmp_path: Path
) -> None:
    served, _ = far
    served.folders["me/base"] = in_turn(with_weights(pico, tmp_path / "other", cut), tmp_path / "resized", 4)
    line = assert_one_line(apply(served, tmp_path, "--base", "me/base", "--delta", "me/delta"), tmp_path)
    assert f"wrong base: in me/base the tensor {EMBEDDING} has the shape" in line and "its vocabulary was resized" in line
    assert not served.shards("me/base") + served.shards("me/delta")
    assert len([name for repository, name, partly in served.gets if partly and repository == "me/base"]) == 4, "but for their headers"


def test_a_base_of_other_values_leaves_nothing(far: tuple[Hub, Callable[[], None]], pico: Path, tmp_path: Path) -> None:
    served, _ = far
    served.folders["me/base"] = in_turn(with_weights(pico, tmp_path / "other", add_noise), tmp_path / "noisy", 4)
    line = assert_one_line(apply(served, tmp_path, "--base", "me/base", "--delta", "me/delta"), tmp_path)
    assert "wrong base: in me/base the tensor" in line and "trained further" in line
    assert len(served.shards("me/base")) == 1


def test_a_hub_that_dies_in_the_middle_is_one_line_and_leaves_nothing(far: tuple[Hub, Callable[[], None]], tmp_path: Path) -> None:
    served, die = far
    watch = Watch(tmp_path)

    def halfway(repository: str, name: str) -> None:
        watch(repository, name)
        if name.startswith("model-00002-of-00004"):
            die()

    served.halfway = halfway
    line = assert_one_line(apply(served, tmp_path, "--base", "me/base", "--delta", "me/delta"), tmp_path)
    assert "me/base: model-00002-of-00004.safetensors cannot be fetched (" in line
    assert watch.seen[-1] == {"me--base": 1, "me--delta": 1}, "there was something to leave"


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("me/nothing", "no folder 'me/nothing', and the hub model of that id cannot be fetched (the hub has none of that name"),
        ("me/base@v9", "no folder 'me/base@v9', and the hub model of that id cannot be fetched (it has no such revision"),
    ],
)
def test_what_the_hub_does_not_have_is_one_line(far: tuple[Hub, Callable[[], None]], tmp_path: Path, base: str, message: str) -> None:
    served, _ = far
    assert message in assert_one_line(apply(served, tmp_path, "--base", base, "--delta", "me/delta"), tmp_path)
    assert not served.gets


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Offline by the user's wish; returns an empty home of the client's cache."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache" / "hub"))
    monkeypatch.setattr(socket.socket, "connect", lambda *args: pytest.fail("a connection was tried"))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: pytest.fail("a name was looked up"))
    return tmp_path / "cache"


@pytest.mark.parametrize("missing", ["base", "delta"])
def test_offline_and_not_in_the_cache_is_one_line_at_once(
    pico: Path,
    made: Path,
    tmp_path: Path,
    no_network: Path,
    missing: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sources = {"base": str(pico), "delta": str(made), missing: "me/far-away"}
    words = ["delta", "apply", "--base", sources["base"], "--delta", sources["delta"], "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["mtllama", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    lines = capsys.readouterr().err.splitlines()
    kind = {"base": "model", "delta": "delta"}[missing]
    reason = "HF_HUB_OFFLINE is set, and it is not in the local cache"
    assert lines == [f"mtllama: no folder 'me/far-away', and the hub {kind} of that id cannot be fetched ({reason})"]
    assert ended.value.code == 2 and nothing_left(tmp_path / "out")


def test_offline_the_cache_is_enough(pico: Path, target: Path, made: Path, tmp_path: Path, no_network: Path) -> None:
    folders = [cache(no_network, id, COMMIT, [file for file in root.rglob("*") if file.is_file()], root) for id, root in
               (("me/base", pico), ("me/delta", made))]  # fmt: skip
    before = [tree(folder) for folder in folders]
    with remote.Fetcher(tmp_path / "out") as fetcher:
        base, difference = fetcher.base("me/base"), fetcher.delta(f"me/delta@{COMMIT}")
        assert base and difference and base.is_relative_to(folders[0]) and difference.is_relative_to(folders[1])
        restore.apply(restore.open_target(base, [difference], reader=fetcher.reader), tmp_path / "out")
    assert_restored(tmp_path / "out", target)
    assert [tree(folder) for folder in folders] == before


def test_folders_are_folders_though_they_look_like_hub_ids(
    pico: Path, tmp_path: Path, no_network: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(pico, tmp_path / "me" / "base")
    monkeypatch.chdir(tmp_path)
    with remote.Fetcher(tmp_path / "out") as fetcher:
        assert [fetcher.base(text) for text in ("me/base", "./me/base", "../elsewhere", "smollm2-135m", str(pico))] == [None] * 5
        with pytest.raises(UserError, match="no folder 'me/other'"):
            fetcher.base("me/other")
    assert nothing_left(tmp_path / "out")


def test_an_output_that_is_there_is_noticed_before_anything_is_asked(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    with pytest.raises(UserError, match="is not empty"):
        remote.Fetcher(tmp_path / "out")
    remote.Fetcher(tmp_path / "out", overwrite=True)


def test_what_takes_long_is_spoken_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(remote, "say", said.append)
    monkeypatch.setattr(remote, "QUIET_SECONDS", 0.0)
    monkeypatch.setattr(remote, "_cached", lambda *args: None)

    (tmp_path / "x.incomplete").write_bytes(bytes(20_000_000))

    def download(hub_id: str, name: str, *, revision: str, local_dir: Path) -> None:
        while not said:
            time.sleep(0.01)
        (local_dir / "x.incomplete").rename(local_dir / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    remote._Repository("me/base", "me/base", COMMIT, tmp_path, {SINGLE: 4_000_000_000}).get(SINGLE)
    assert said == [f"fetch me/base: {SINGLE}: 20 of 4,000 MB"] and progress.PLAIN_SECONDS > 10
    assert (tmp_path / SINGLE).is_file()


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("owner/name", ("owner/name", None)),
        ("o-w_n.er/na.me-7b", ("o-w_n.er/na.me-7b", None)),
        ("owner/name@v1.0", ("owner/name", "v1.0")),
        ("owner/name@refs/pr/1", ("owner/name", "refs/pr/1")),
        ("name", None),
        ("./name", None),
        ("../name", None),
        ("/owner/name", None),
        ("a/b/c", None),
        ("owner/name@", None),
        ("owner/name\n", None),
    ],
)
def test_hub_ids_are_told_from_paths(text: str, parsed: tuple[str, str | None] | None) -> None:
    assert hub.parse(text) == parsed


def test_a_base_in_one_file_of_the_hub_is_one_shard(pico: Path, target: Path, made: Path, tmp_path: Path) -> None:
    base, difference = Far(pico, tmp_path / "base here"), Far(made, tmp_path / "delta here")
    summary = restore.apply(open_far(base, [difference]), tmp_path / "out")
    assert_restored(tmp_path / "out", target)
    assert base.fetched == difference.fetched == [SINGLE] and isinstance(summary, delta.Summary)
