"""`train verify` on the pico model: it finds nothing where all is right, and finds what is wrong."""

import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from mtllama.cli import app
from mtllama.data.mixture import MixtureConfig
from mtllama.errors import UserError
from mtllama.train import verify as verification
from mtllama.train.recipe import LoraConfig, Recipe, TrainConfig

HARM = """
import torch
from mtllama.model import attention
def mixed(module, query, key, value, mask, *, segments, **options):
    return attention.segment_attention(module, query, key, value, mask, segments=[sum(segments)], **options)
attention.AttentionInterface.register(attention.SEGMENTS, mixed)
"""
"""Put in front of the runs: attention that sees the examples that stand in front."""
HARM_GRADIENTS = """
import torch
from mtllama.data.batching import pack
from mtllama.train import loop
def means(objective, examples, tokens_per_pass, ranks):
    losses = torch.zeros(len(examples))
    for batch in pack(examples, tokens_per_pass):
        token_losses = objective(batch)
        token_losses.mean().backward()
        losses.index_add_(0, batch.owners, token_losses.detach())
    return losses
loop.backward = means
"""
"""The mean of every pass, added up: right losses, and gradients as large as there are passes."""


def recipe(pico: Path, out: Path) -> Recipe:
    train = TrainConfig(examples=1000, batch_size=4, lr=1e-3, max_length=128)
    return Recipe(out=out, train=train, model=str(pico), mixture=MixtureConfig(dir=Path("sampler")))


def test_the_four_ways_come_to_the_same(pico: Path, tmp_path: Path) -> None:
    found = list(verification.verify(recipe(pico, tmp_path / "m")))
    assert [each.what for each in found] == ["packing", "accumulation", "resume", "ranks"]
    assert all(each.holds and each.num_steps == 4 and each.loss < 1e-4 and each.norm < 1e-3 for each in found)
    assert [each.weight for each in found] == [None, None, 0.0, None]
    assert not list(tmp_path.iterdir())


@pytest.mark.soak
def test_adapters_can_be_verified_too(pico: Path, tmp_path: Path) -> None:
    (found,) = verification.verify(replace(recipe(pico, tmp_path / "m"), lora=LoraConfig(rank=4, merge=False)), ["resume"], steps=3)
    assert found.holds and found.weight == 0.0
    with pytest.raises(UserError, match=r"lora\.dropout"):
        verification.verify(replace(recipe(pico, tmp_path / "m"), lora=LoraConfig(rank=4, dropout=0.1)), ["packing"])


def harm(by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "harmed.py"
    program.write_text(f"{by}\nfrom mtllama.cli import main\nmain()\n", encoding="utf-8")
    command = verification._command
    monkeypatch.setattr(verification, "_command", lambda recipe, ranks: [sys.executable, str(program), *command(recipe, ranks)[-3:]])


def test_examples_that_see_each_other_are_found(pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    harm(HARM, tmp_path, monkeypatch)
    (found,) = verification.verify(recipe(pico, tmp_path / "m"), ["packing"], steps=2)
    assert not found.holds and found.loss > verification.ALLOWED


def test_gradients_that_grow_with_the_passes_are_found_though_the_losses_agree(
    pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    harm(HARM_GRADIENTS, tmp_path, monkeypatch)
    (found,) = verification.verify(recipe(pico, tmp_path / "m"), ["accumulation"], steps=2)
    assert found.loss <= verification.ALLOWED and found.norm > 0.5 and not found.holds


def test_a_norm_that_is_no_number_or_there_on_one_side_alone_is_no_agreement() -> None:
    assert verification._relative(2.0, 2.002) == pytest.approx(1e-3) and verification._relative(0.0, 0.0) == 0.0
    assert verification._relative(0.0, 1.0) == verification._relative(None, 1.0) == verification._relative(1.0, None) == math.inf


def test_the_command_prints_each_finding_as_it_comes_and_its_status_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    good = verification.Finding("packing", "this and that", 4, 1e-6, 1e-5, None, holds=True)
    none = verification.Finding("accumulation", "", 4, None, None, None, holds=None, why="a step has one example")
    bad = verification.Finding("resume", "this and that", 4, 1e-6, 1e-5, 0.25, holds=False)
    failed = verification.Finding("ranks", "", 4, None, None, None, holds=False, why="no port is free")
    figures = "over 4 steps; largest difference of a loss 1.0e-06, of a gradient norm 1.0e-05 of it, of a weight"
    for other, status, line in (
        (none, 0, "accumulation: nothing to compare: a step has one example"),
        (bad, 1, f"resume: DIFFERS {figures} 2.5e-01; compared: this and that"),
        (failed, 1, "ranks: FAILED: no port is free"),
    ):
        monkeypatch.setattr(verification, "verify", lambda *rest, other=other, **options: iter((good, other)))
        done = CliRunner().invoke(app, ["train", "verify", "quickstart"])
        assert (done.exit_code, done.stdout.splitlines()) == (status, [f"packing: holds {figures} -; compared: this and that", line])

    def breaks_off() -> Iterator[verification.Finding]:
        yield good
        raise UserError("the disk is full")

    monkeypatch.setattr(verification, "verify", lambda *rest, **options: breaks_off())
    assert "packing: holds" in CliRunner().invoke(app, ["train", "verify", "quickstart"]).stdout
    monkeypatch.undo()
    monkeypatch.setattr(verification, "verify", lambda recipe, what, **options: iter([replace(good, what=" and ".join(what))]))
    assert "packing and resume: holds" in CliRunner().invoke(app, ["train", "verify", "quickstart", "--what", "packing, resume"]).stdout
    monkeypatch.undo()
    wrong = CliRunner().invoke(app, ["train", "verify", "quickstart", "--what", "speed"])
    assert wrong.exit_code == 1 and "choose from packing, accumulation, resume, ranks" in str(wrong.exception)


def test_a_folder_of_other_files_is_not_taken_for_verify_s_own(pico: Path, tmp_path: Path) -> None:
    (tmp_path / "m.verify").mkdir()
    (tmp_path / "m.verify" / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"m\.verify holds other files"):
        list(verification.verify(recipe(pico, tmp_path / "m"), ["packing"]))
    assert (tmp_path / "m.verify" / "thesis.tex").is_file()


def test_a_run_that_fails_is_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a run to compare with failed: no model") as error:
        list(verification.verify(recipe(Path("nobody-knows"), tmp_path / "m"), ["packing"], steps=2))
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_a_check_that_fails_is_a_finding_and_the_others_are_made(pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = verification._command

    def broken(recipe: Recipe, ranks: int) -> list[str]:
        return [sys.executable, "-c", "import sys; sys.exit('mtllama: no port is free')"] if ranks > 1 else command(recipe, ranks)

    monkeypatch.setattr(verification, "_command", broken)
    failed, good = verification.verify(recipe(pico, tmp_path / "m"), ["ranks", "packing"], steps=2)
    assert (failed.holds, failed.why, failed.loss) == (False, "a run to compare with failed: no port is free", None)
    assert good.holds and not list(tmp_path.iterdir())


def test_a_run_that_takes_too_long_is_told_in_one_line(pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "LIMIT", 0.1)
    monkeypatch.setattr(verification, "_command", lambda *rest: [sys.executable, "-c", "import time; time.sleep(60)"])
    for run in (verification._run, verification._run_killed):
        with pytest.raises(UserError, match=r"not done after 0 s; verify with fewer --steps"):
            run(recipe(pico, tmp_path / "m"))


def test_one_example_a_step_leaves_nothing_to_pack_or_to_split(pico: Path, tmp_path: Path) -> None:
    one = recipe(pico, tmp_path / "m")
    found = list(verification.verify(replace(one, train=replace(one.train, batch_size=1)), ["packing", "accumulation"], steps=2))
    assert [(each.holds, each.loss) for each in found] == [(None, None)] * 2 and all("batch_size=1" in each.why for each in found)


@pytest.mark.soak
def test_with_one_gpu_ranks_are_compared_on_the_cpu(pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environments, run = [], subprocess.run

    def watched(command: list[str], **options: Any) -> Any:
        environments.append((options["env"].get("CUDA_VISIBLE_DEVICES"), "torch.distributed.run" in command))
        return run(command, **options)

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(subprocess, "run", watched)
    (found,) = verification.verify(recipe(pico, tmp_path / "m"), ["ranks"], steps=2)
    assert found.holds and found.ways.endswith("all on the CPU: this machine has 1 GPU")
    assert environments == [("0", False), ("", False), ("", True)]  # the usual run, one process to compare with, and two
