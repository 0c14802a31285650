"""On a GPU the same comes out as on the CPU, up to the rounding of sums."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
DEVICES = {"cpu": {"CUDA_VISIBLE_DEVICES": ""}, "gpu": {}}


def mtllama(device: str, *arguments: str | Path) -> str:
    run = subprocess.run(
        [sys.executable, "-m", "mtllama", *map(str, arguments)], env=os.environ | DEVICES[device], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_the_tests_see_the_gpu() -> None:
    assert any(line.startswith("ok") and "GPU" in line for line in mtllama("gpu", "doctor").splitlines())
    assert not any(line.startswith("ok") and "GPU" in line for line in mtllama("cpu", "doctor").splitlines())


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-4), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("lora", [False, True])
def test_training_gives_the_same_losses(pico: Path, tmp_path: Path, dtype: str, tolerance: float, lora: bool) -> None:
    settings = [
        "mixture.dir=sampler",
        f"model={pico}",
        "train.examples=48",
        "train.batch_size=8",
        "train.lr=1e-4",
        "train.tokens_per_pass=700",
    ]
    for device, computed in (("cpu", "float32"), ("gpu", dtype)):
        more = [f"train.dtype={computed}", f"out={tmp_path / device}", *(["lora.rank=4"] if lora else [])]
        mtllama(device, "train", "run", "quickstart", *settings, *more)
    theirs, ours = (lines(tmp_path / device / "metrics.jsonl") for device in DEVICES)
    assert len(ours) == len(theirs) == 6 and [line["tokens"] for line in ours] == [line["tokens"] for line in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=tolerance)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_run_that_was_cut_off_goes_on(pico: Path, tmp_path: Path, checkpointing: bool) -> None:
    settings = ["mixture.dir=sampler", f"model={pico}", "train.batch_size=8", "train.lr=1e-4", "train.save_every=2", "train.dtype=float32"]
    settings += [f"train.activation_checkpointing={str(checkpointing).lower()}", "train.examples=64", f"out={tmp_path / 'run'}"]
    killed = subprocess.Popen([sys.executable, "-m", "mtllama", "train", "run", "quickstart", *settings], stderr=subprocess.PIPE, text=True)
    checkpoints = tmp_path / "run.partial" / "checkpoints"
    while killed.poll() is None and not (checkpoints.is_dir() and any(checkpoints.iterdir())):
        pass
    killed.kill()
    killed.communicate()
    mtllama("gpu", "train", "run", "quickstart", *settings)
    assert len(lines(tmp_path / "run" / "metrics.jsonl")) == 8


def test_evaluation_gives_the_same_scores_and_texts(pico: Path, tmp_path: Path) -> None:
    tasks = "squad,openbookqa,rte"
    for device in DEVICES:
        out = ["--out", tmp_path / device]
        mtllama(device, "eval", pico, "--suite", "sampler", "--tasks", tasks, "--limit", "20", "--dtype", "float32", *out)
    theirs, ours = (lines(tmp_path / device / "records.jsonl") for device in DEVICES)
    assert len(ours) == len(theirs) >= 60
    scored = [(mine["logprobs"], other["logprobs"]) for mine, other in zip(ours, theirs, strict=True) if mine["kind"] == "score"]
    assert scored
    for mine, other in scored:
        for one, two in zip(mine, other, strict=True):
            assert one == pytest.approx(two, abs=1e-3)
    texts = [(mine["text"], other["text"]) for mine, other in zip(ours, theirs, strict=True) if mine["kind"] == "generate"]
    assert sum(one == two for one, two in texts) >= 0.9 * len(texts) > 0, "near ties may fall otherwise"
