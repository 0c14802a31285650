"""Long proofs for deltas, run by `make soak`: killed, corrupted and starved, nothing wrong ever stands there."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from checkpoints import add_noise, assert_restored, with_weights

from mtllama import cli
from mtllama.weights import delta
from mtllama.weights.shards import CheckpointReader

pytestmark = pytest.mark.soak
NUM_FLIPS, NUM_KILLS = 1000, 50


@pytest.fixture(scope="module")
def target(pico: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_weights(pico, tmp_path_factory.mktemp("soak") / "target", add_noise)


@pytest.fixture(scope="module")
def large(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real base model with noise on its weights."""
    return with_weights(smollm2, tmp_path_factory.mktemp("soak") / "large", add_noise)


@pytest.mark.parametrize(("mode", "level"), [("bits", "default"), ("bits", "small"), ("bits", "fast"), ("add", "default")])
def test_every_one_of_a_thousand_flipped_bits_is_named_or_without_effect(
    pico: Path, target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, mode: str, level: str
) -> None:
    base, made, out = shutil.copytree(pico, tmp_path / "base"), tmp_path / "made", tmp_path / "out"
    delta.make(base, target, made, mode=mode, level=level)  # type: ignore[arg-type]
    files = sorted(path for folder in (base, made) for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    draw, seen = random.Random(mode + level), Counter[str]()
    monkeypatch.setattr(sys, "argv", ["mtllama", "delta", "apply", "--base", str(base), "--delta", str(made), "--out", str(out)])
    for _ in range(NUM_FLIPS // 4):
        file = draw.choice(files)
        place, bit = draw.randrange(file.stat().st_size), draw.randrange(8)
        flip(file, place, bit)
        try:
            cli.main()
            status = 0
        except SystemExit as ended:
            status = int(ended.code or 0)
        error = capsys.readouterr().err.strip()
        flip(file, place, bit)
        where = f"{file.relative_to(tmp_path)}, byte {place}, bit {bit}: {error}"
        if status:
            assert status == 2 and len(error.splitlines()) == 1 and not out.exists(), where
            assert any(name in error for name in (file.name, *CheckpointReader(target))), where
            seen["refused"] += 1
        else:
            if mode == "bits":
                assert_restored(out, target)
            else:
                assert delta.verify(out, made), where
            shutil.rmtree(out)
            seen["without effect"] += 1
        assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "made"], where
    assert seen["refused"] > NUM_FLIPS // 16 and seen["without effect"] > 0, seen


def flip(file: Path, place: int, bit: int) -> None:
    with open(file, "r+b") as handle:
        handle.seek(place)
        byte = handle.read(1)[0] ^ (1 << bit)
        handle.seek(place)
        handle.write(bytes([byte]))


@pytest.mark.real
@pytest.mark.parametrize("what", ["make", "apply"])
def test_killed_at_random_moments_it_leaves_nothing_and_the_next_run_is_right(
    smollm2: Path, large: Path, tmp_path: Path, what: str
) -> None:
    made, out = tmp_path / "made", tmp_path / "out"
    delta.make(smollm2, large, made)
    source = ["--target", str(large)] if what == "make" else ["--delta", str(made)]
    command = [sys.executable, "-m", "mtllama", "delta", what, "--base", str(smollm2), *source, "--out", str(out)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    began = time.monotonic()
    subprocess.run(command, check=True, env=environment, capture_output=True)
    whole = time.monotonic() - began
    shutil.rmtree(out)
    draw, kills, left = random.Random(what), 0, 0
    while kills < NUM_KILLS // 2:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + draw.uniform(0, whole)
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        if process.wait() == -signal.SIGKILL and not out.exists():
            kills += 1
            left += any(path.name.startswith(".out.") for path in tmp_path.iterdir())
        else:  # it was done, or killed as it ended
            check(what, out, large, smollm2, tmp_path)
            shutil.rmtree(out)
    subprocess.run(command, check=True, env=environment, capture_output=True)
    check(what, out, large, smollm2, tmp_path)
    assert left > 3  # some were killed while they wrote
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith("check")) == ["made", "out"]


def check(what: str, out: Path, target: Path, base: Path, room: Path) -> None:
    """Whether what stands at `out` is whole."""
    assert delta.verify(target if what == "make" else out, out if what == "make" else room / "made") > 100
    ours = CheckpointReader(out)
    assert all(ours.info(name).num_bytes >= 0 for name in ours)
    if what == "apply":
        theirs = CheckpointReader(target)
        assert all(torch.equal(ours.tensor(name), theirs.tensor(name)) for name in theirs)


@pytest.mark.real
@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small disk")
@pytest.mark.parametrize("megabytes", [1, 20, 100, 250])
def test_a_full_disk_is_said_in_one_line_and_leaves_nothing(smollm2: Path, large: Path, tmp_path: Path, megabytes: int) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    delta.make(smollm2, large, tmp_path / "made")
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(disk)], check=True)
    try:
        command = [sys.executable, "-m", "mtllama", "delta", "apply", "--base", str(smollm2), "--delta", str(tmp_path / "made")]
        done = subprocess.run([*command, "--out", str(disk / "out")], capture_output=True, text=True)
        assert done.returncode == 2 and "no space left on the disk" in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)
