"""Long proofs, run by `make soak`."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mtllama.evaluate import runner
from mtllama.weights.shards import CheckpointReader

pytestmark = pytest.mark.soak
NUM_KILLS = 20


def weights(folder: Path) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(folder)
    return {name: reader.tensor(name) for name in reader}


def test_training_that_is_killed_at_twenty_random_moments_ends_with_the_same_bits(pico: Path, tmp_path: Path) -> None:
    """Moments fall into loading, steps and the writing of checkpoints; a half-written result never appears."""
    values = {
        "model": str(pico),
        "mixture": {"dir": "sampler"},
        "train": {"examples": 1600, "batch_size": 8, "lr": 1e-3, "dtype": "float32", "save_every": 3},
    }
    for name in ("whole", "killed"):
        (tmp_path / f"{name}.yaml").write_text(json.dumps({**values, "out": str(tmp_path / name)}), encoding="utf-8")
    commands = {name: [sys.executable, "-m", "mtllama", "train", "run", str(tmp_path / f"{name}.yaml")] for name in ("whole", "killed")}
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    subprocess.run(commands["whole"], check=True, env=environment, capture_output=True)
    draw, kills = random.Random(0), 0
    for _ in range(NUM_KILLS):
        process = subprocess.Popen(commands["killed"], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + draw.uniform(2, 12)
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            assert not (tmp_path / "killed").exists()
        else:
            break
    subprocess.run(commands["killed"], env=environment, capture_output=True)
    assert kills >= 5
    ours, theirs = weights(tmp_path / "killed"), weights(tmp_path / "whole")
    assert len(theirs) > 10
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    losses = [[json.loads(line)["loss"] for line in (tmp_path / n / "metrics.jsonl").open(encoding="utf-8")] for n in ("killed", "whole")]
    assert losses[0] == losses[1] and len(losses[0]) == 200


@pytest.mark.real
def test_the_quickstart_beats_the_base_on_the_unseen_data_sets_within_its_memory(smollm2: Path, tmp_path: Path) -> None:
    out = tmp_path / "quickstart"
    command = [sys.executable, "-m", "mtllama", "quickstart", "--out", str(out)]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    means = json.loads((out / "report" / "comparison.json").read_text(encoding="utf-8"))["comparisons"][0]["means"]
    unseen = next(mean for mean in means if mean["role"] == "unseen data set")
    assert unseen["num_items"] == 240
    assert unseen["difference"] > 0 and unseen["p"] < 0.05
    peak = float(done.stdout.split("peak memory ")[1].split(" GB")[0])
    assert 0.5 < peak < 8
    ours, theirs = weights(out / "restored"), weights(out / "tuned")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    _, records = runner.read_run(out / "eval-tuned")
    assert len(records) == 640
