"""`train verify` on the pico model: it finds nothing where all is right, and finds what is wrong."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
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
"""A `sitecustomize` for the runs: attention that sees the examples that stand in front."""


def recipe(pico: Path, out: Path) -> Recipe:
    train = TrainConfig(examples=1000, batch_size=4, lr=1e-3, max_length=128)
    return Recipe(out=out, train=train, model=str(pico), mixture=MixtureConfig(dir=Path("sampler")))


def test_the_four_ways_come_to_the_same(pico: Path, tmp_path: Path) -> None:
    found = verification.verify(recipe(pico, tmp_path / "m"))
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


def test_examples_that_see_each_other_are_found(pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "harmed.py"
    program.write_text(f"{HARM}\nfrom mtllama.cli import main\nmain()\n", encoding="utf-8")
    command = verification._command
    monkeypatch.setattr(verification, "_command", lambda recipe, ranks: [sys.executable, str(program), *command(recipe, ranks)[-3:]])
    (found,) = verification.verify(recipe(pico, tmp_path / "m"), ["packing"], steps=2)
    assert not found.holds and found.loss > verification.ALLOWED


def test_the_command_prints_a_table_and_its_status_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = verification.Finding("packing", "this and that", 4, 1e-6, 1e-5, None, holds=True)
    bad = verification.Finding("resume", "this and that", 4, 1e-6, 1e-5, 0.25, holds=False)
    for found, status in (([good], 0), ([good, bad], 1)):
        monkeypatch.setattr(verification, "verify", lambda *rest, found=found, **options: found)
        done = CliRunner().invoke(app, ["train", "verify", "quickstart"])
        assert done.exit_code == status and "packing  4      1.0e-06" in done.stdout
    assert "2.5e-01" in done.stdout and "False" in done.stdout
    monkeypatch.undo()
    wrong = CliRunner().invoke(app, ["train", "verify", "quickstart", "--what", "speed"])
    assert wrong.exit_code == 1 and "choose from packing, accumulation, resume, ranks" in str(wrong.exception)


def test_a_run_that_fails_is_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a run to compare with failed: no model") as error:
        verification.verify(recipe(Path("nobody-knows"), tmp_path / "m"), ["packing"], steps=2)
    assert "\n" not in str(error.value)
