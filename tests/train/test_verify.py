"""`train verify` on the pico model: it finds nothing where all is right, and finds what is wrong."""

import math
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
loop._backward = means
"""
"""The mean of every pass, added up: right losses, and gradients as large as there are passes."""


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


def test_a_folder_of_other_files_is_not_taken_for_verify_s_own(pico: Path, tmp_path: Path) -> None:
    (tmp_path / "m.verify").mkdir()
    (tmp_path / "m.verify" / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"m\.verify holds other files"):
        verification.verify(recipe(pico, tmp_path / "m"), ["packing"])
    assert (tmp_path / "m.verify" / "thesis.tex").is_file()


def test_a_run_that_fails_is_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a run to compare with failed: no model") as error:
        verification.verify(recipe(Path("nobody-knows"), tmp_path / "m"), ["packing"], steps=2)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())
