"""Training on the pico model: exact losses, exact resume, a result that is a normal folder."""

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from typer.testing import CliRunner

from mtllama import config as configs
from mtllama import folders
from mtllama.cli import app
from mtllama.data.batching import pack
from mtllama.data.mixture import Mixture, MixtureConfig
from mtllama.data.prompt import FORMATS, PromptEncoder
from mtllama.errors import UserError
from mtllama.model import attention
from mtllama.model.find import find_model
from mtllama.model.load import LoadedModel, load_model
from mtllama.train import journal, loop, objective
from mtllama.train import result as results
from mtllama.train.objective import Objective, target_losses
from mtllama.train.parallel import Ranks
from mtllama.train.recipe import Recipe, TrainConfig, load_recipe
from mtllama.train.work import claim as claim_folder
from mtllama.train.work import note_changes
from mtllama.weights.shards import CheckpointReader

TRAIN = TrainConfig(examples=160, batch_size=8, lr=1e-2, max_length=256, tokens_per_pass=700, dtype="float32", save_every=4)


def recipe(pico: Path, out: Path, **train: object) -> Recipe:
    return Recipe(out=out, train=TrainConfig(**{**vars(TRAIN), **train}), model=str(pico), mixture=MixtureConfig(dir=Path("sampler")))  # type: ignore[arg-type]


def command(wanted: Recipe, folder: Path) -> list[str]:
    """The command line that runs a recipe, which is written into a file in `folder`."""
    file = folder / "recipe.yaml"
    values = configs.to_dict(wanted)
    file.write_text(
        json.dumps({key: value for key, value in values.items() if value is not None} | {"mixture": {"dir": "sampler"}}), encoding="utf-8"
    )
    return [sys.executable, "-m", "mtllama", "train", "run", str(file)]


def claim(wanted: Recipe) -> None:
    claim_folder(wanted.beside("partial"), wanted, Mixture(wanted.mixture), overwrite=False)


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / journal.METRICS).read_text(encoding="utf-8").splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(folder)
    return {name: reader.tensor(name) for name in reader}


@pytest.fixture
def loaded(pico: Path) -> LoadedModel:
    return load_model(find_model(str(pico)), format="mtllama", train=True)


@pytest.fixture(scope="module")
def trained(pico: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pico model after twenty steps."""
    return loop.run(recipe(pico, tmp_path_factory.mktemp("trained") / "model"))


def test_the_loss_falls_and_every_family_is_accounted_for(trained: Path) -> None:
    lines = metrics(trained)
    assert [line["step"] for line in lines] == list(range(1, 21))
    assert sum(line["loss"] for line in lines[-5:]) / 5 < 0.85 * lines[0]["loss"]
    tokens = 0
    for line in lines:
        for kind in ("families", "tasks"):
            parts = line[kind].values()
            assert sum(p["loss"] * p["targets"] for p in parts) / sum(p["targets"] for p in parts) == pytest.approx(line["loss"], rel=1e-5)
            assert sum(p["tokens"] for p in parts) + tokens == line["tokens"]
        tokens = line["tokens"]
        assert 0 < line["mfu"] < 1
    assert len({family for line in lines for family in line["families"]}) == 8


def test_golden_losses_of_the_pico_model(trained: Path) -> None:
    """Another number here is another training: change it only with a reason in the commit."""
    golden = json.loads((Path(__file__).parent / "golden_losses.json").read_text(encoding="utf-8"))
    assert len(golden) == 20
    losses = [line["loss"] for line in metrics(trained)]
    assert losses[:3] == pytest.approx(golden[:3], rel=1e-4)
    assert losses == pytest.approx(golden, rel=1e-2)  # rounding of other processors grows with the steps


def test_the_loss_of_target_rows_equals_that_of_the_whole_logits(loaded: LoadedModel, pico: Path) -> None:
    encoder = PromptEncoder(loaded.tokenizer, loaded.format, 256)
    mixture = Mixture(MixtureConfig(dir=Path("sampler")))
    examples = [encoder.encode(e.inputs, e.targets) for e in map(mixture.__getitem__, range(6)) if e]
    assert len(examples) == 6 and all(examples)
    ours = torch.cat([target_losses(loaded.model, batch) for batch in pack([e for e in examples if e], 10_000)])
    reference = LlamaForCausalLM.from_pretrained(pico, dtype=torch.float32)
    theirs = []
    for example in examples:
        assert example is not None
        ids = torch.tensor([example.ids])
        labels = ids.clone()
        labels[:, : -example.num_target] = -100
        theirs.append(float(reference(input_ids=ids, labels=labels).loss.detach()) * example.num_target)
    sums = torch.stack([part.sum() for part in ours.split([e.num_target for e in examples if e])])
    torch.testing.assert_close(sums, torch.tensor(theirs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens_per_pass", [1, 150, 100_000])
def test_gradients_do_not_depend_on_how_a_batch_is_split(loaded: LoadedModel, tokens_per_pass: int) -> None:
    encoder = PromptEncoder(loaded.tokenizer, loaded.format, 256)
    mixture = Mixture(MixtureConfig(dir=Path("sampler")))
    examples = [e for e in (encoder.encode(x.inputs, x.targets) for x in map(mixture.__getitem__, range(7)) if x) if e]
    passes = len(list(pack(examples, tokens_per_pass)))
    assert passes == {1: 7, 100_000: 1}.get(tokens_per_pass, passes) and len(examples) == 7

    def gradients(budget: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        loaded.model.zero_grad()
        losses = loop.backward(Objective(loaded.model, torch.float32), examples, budget, Ranks())
        return losses, [p.grad.clone() for p in loaded.model.parameters()]

    ours, theirs = gradients(tokens_per_pass), gradients(400)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-4, atol=1e-6)
    assert any(float(g.abs().max()) > 1e-3 for g in ours[1])


def test_no_example_of_a_pack_sees_another(loaded: LoadedModel) -> None:
    encoder = PromptEncoder(loaded.tokenizer, loaded.format, 256)
    first, other, last = (
        encoder.encode(text, "one") for text in ("What is it?", "Something wholly different, and longer.", "Who was that?")
    )
    assert first and other and last
    losses = []
    for neighbour in (first, other):
        (batch,) = pack([neighbour, last], 10_000)
        losses.append(target_losses(loaded.model, batch)[-last.num_target :])
    assert batch.segments[0] != len(first.ids)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)


def test_the_result_is_a_normal_folder_that_carries_its_format(trained: Path, pico: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(trained), AutoTokenizer.from_pretrained(trained)
    assert model.dtype == torch.bfloat16
    settings = json.loads((trained / "config.json").read_text(encoding="utf-8"))
    assert settings["rope_theta"] == settings["rope_parameters"]["rope_theta"] == 10_000.0
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    encoder = PromptEncoder(tokenizer, FORMATS["mtllama"], 256)
    mixture, compared = Mixture(MixtureConfig(dir=Path("sampler"))), 0
    for example in filter(None, map(mixture.__getitem__, range(60))):
        user = {"role": "user", "content": example.inputs}
        asked = tokenizer.apply_chat_template([user], add_generation_prompt=True, return_dict=False)
        told = tokenizer.apply_chat_template([user, {"role": "assistant", "content": example.targets}], return_dict=False)
        whole = encoder.prompt_ids(example.inputs, room=-10_000)[0]
        assert asked == whole
        assert told == whole + encoder.answer_ids(example.targets)
        compared += 1
    assert compared == 60
    manifest = folders.read_manifest(trained)
    assert manifest is not None and manifest["format"] == "mtllama" and manifest["totals"]["examples"] == 160
    before, after = weights(pico), weights(trained)
    assert before.keys() == after.keys()
    assert sum(not torch.equal(before[name], after[name]) for name in before) > len(before) // 2


def test_a_text_end_marker_becomes_a_stop_string(pico: Path, tmp_path: Path) -> None:
    run = Recipe(
        out=tmp_path / "m",
        train=TrainConfig(examples=2, batch_size=2),
        model=str(pico),
        format="mt-llama-train",
        mixture=MixtureConfig(dir=Path("sampler")),
    )
    model = AutoModelForCausalLM.from_pretrained(loop.run(run))
    assert model.generation_config.stop_strings == ["\n"]


def test_a_run_that_was_killed_ends_with_the_same_bits(pico: Path, tmp_path: Path, trained: Path) -> None:
    """kill -9 while it trains, as often as it takes; the same command goes on."""
    work, kills = tmp_path / "model.partial", 0
    words = command(recipe(pico, tmp_path / "model", save_every=1), tmp_path)
    for wanted in (2, 5):
        process = subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        while process.poll() is None and len(list((work / "checkpoints").glob("step-*"))) == 0:
            time.sleep(0.02)
        while process.poll() is None and len((work / journal.METRICS).read_text(encoding="utf-8").splitlines()) < wanted:
            time.sleep(0.005)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
        assert not (tmp_path / "model").exists() or kills == 0
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    assert kills == 2
    assert "going on from step" in done.stderr
    ours, theirs = weights(tmp_path / "model"), weights(trained)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert [line["loss"] for line in metrics(tmp_path / "model")] == [line["loss"] for line in metrics(trained)]
    assert not work.exists()


def interrupt(wanted: Recipe, step: int, *, overwrite: bool = False) -> None:
    """Run it, and end it after so many of its steps, as a signal would."""

    @contextlib.contextmanager
    def after() -> Iterator[Any]:
        calls = itertools.count(1)
        yield lambda: next(calls) >= step

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_interrupts", after)
        with pytest.raises(UserError, match=r"interrupted after step \d+ of \d+; kept in"):
            loop.run(wanted, overwrite=overwrite)


def test_what_kills_left_of_checkpoints_goes_when_the_run_goes_on(pico: Path, tmp_path: Path) -> None:
    """Of other steps and of other machines, too: each is three times as large as the model."""
    wanted = recipe(pico, tmp_path / "m", examples=24, save_every=1)
    interrupt(wanted, 2)
    checkpoints = tmp_path / "m.partial" / "checkpoints"
    left = checkpoints / ".step-0000001.another-machine.7-0123abcd.partial"
    left.mkdir()
    (left / "rank-00000.safetensors").write_bytes(b"half")
    interrupt(wanted, 1)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-0000002", "step-0000003"]


def test_a_second_term_waits_for_the_checkpoint_and_a_second_ctrl_c_does_not() -> None:
    with loop._interrupts() as asked:
        assert not asked()
        for _ in range(3):  # a scheduler's, and torchrun's, which hands it on
            os.kill(os.getpid(), signal.SIGTERM)
        assert asked()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    with loop._interrupts() as asked:
        os.kill(os.getpid(), signal.SIGINT)
        assert asked()


def test_a_dtype_that_auto_finds_elsewhere_is_a_change_that_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = replace(TRAIN, dtype="auto")
    for compute, start in ((torch.bfloat16, 0), (torch.bfloat16, 2), (torch.float32, 4)):
        note_changes(tmp_path, train, compute, start)
    assert "from step 5 on with train.dtype=float32 (was bfloat16)" in capsys.readouterr().err
    assert [each["from_step"] for each in folders.read_json(tmp_path / "changes.json")] == [1, 5]


def test_a_run_goes_on_from_before_its_first_update(pico: Path, tmp_path: Path) -> None:
    """The first example is skipped, so that there are no moments yet when the run is interrupted."""
    wanted = recipe(pico, tmp_path / "m", examples=8, batch_size=1, max_length=13)
    interrupt(wanted, 1)
    (line,) = metrics(tmp_path / "m.partial")
    assert line["targets"] == 0 and line["loss"] is line["grad_norm"] is None  # there is none: it is not 0
    ours, theirs = loop.run(wanted), loop.run(replace(wanted, out=tmp_path / "n"))
    assert [line["loss"] for line in metrics(ours)] == [line["loss"] for line in metrics(theirs)]
    assert (folders.read_manifest(ours) or {})["totals"]["targets"] > 0


def test_an_unfinished_run_of_another_recipe_is_refused(pico: Path, tmp_path: Path) -> None:
    claim(recipe(pico, tmp_path / "m"))
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"m\.partial holds an unfinished run of another recipe; remove it, or choose another out"):
            loop.run(recipe(pico, tmp_path / "m", batch_size=4), overwrite=overwrite)


def steps_done(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every step that is computed."""
    done: list[int] = []
    backward = loop.backward

    def counted(objective: Objective, examples: list[Any], *rest: Any) -> torch.Tensor:
        done.append(len(examples))
        return backward(objective, examples, *rest)

    monkeypatch.setattr(loop, "backward", counted)
    return done


def test_overwrite_is_for_the_result_and_an_unfinished_run_goes_on_all_the_same(
    pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, done = recipe(pico, tmp_path / "m", examples=32), steps_done(monkeypatch)
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "old").touch()
    interrupt(wanted, 3, overwrite=True)
    assert (tmp_path / "m" / "old").is_file() and len(done) == 3
    loop.run(wanted, overwrite=True)
    assert not (tmp_path / "m" / "old").exists() and len(done) == 4


def test_a_run_that_could_not_write_its_result_does_no_step_again(pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, done = recipe(pico, tmp_path / "m", examples=24, save_every=100), steps_done(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(results, "_write_weights", Mock(side_effect=OSError(28, "No space left on device")))
        with pytest.raises(UserError, match="no space left"):
            loop.run(wanted)
    assert len(done) == 3 and not (tmp_path / "m").exists()
    with monkeypatch.context() as patch:
        patch.setattr(folders, "remove", Mock(side_effect=KeyboardInterrupt))  # the result stands; the working folder does, too
        with pytest.raises(KeyboardInterrupt):
            loop.run(wanted)
    result = weights(tmp_path / "m")
    assert (tmp_path / "m.partial").is_dir()
    assert loop.run(wanted) == tmp_path / "m"
    assert len(done) == 3 and [path.name for path in tmp_path.iterdir()] == ["m"]
    plain = weights(loop.run(replace(wanted, out=tmp_path / "n")))
    assert all(torch.equal(result[name], plain[name]) for name in plain)


def test_a_result_of_the_same_recipe_is_not_made_again_and_one_of_another_is_not_taken_for_it(
    pico: Path, tmp_path: Path, trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done = steps_done(monkeypatch)
    same = recipe(pico, trained)
    assert loop.run(replace(same, train=replace(same.train, keep=1))) == trained and not done
    assert "is the result of this recipe already; --overwrite trains anew" in capsys.readouterr().err
    with pytest.raises(UserError, match="is not empty"):
        loop.run(recipe(pico, trained, lr=1e-3))
    monkeypatch.setattr(Mixture, "data", lambda mixture: {"other": [1, 1]})
    with pytest.raises(UserError, match="is not empty"):
        loop.run(same)


def test_what_came_to_the_place_of_the_result_meanwhile_is_not_replaced_and_the_run_is_kept(
    pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, done, backward = recipe(pico, tmp_path / "m", examples=16), steps_done(monkeypatch), loop.backward

    def meanwhile(*rest: Any) -> torch.Tensor:
        (tmp_path / "m").mkdir(exist_ok=True)
        (tmp_path / "m" / "thesis.tex").touch()
        return backward(*rest)

    monkeypatch.setattr(loop, "backward", meanwhile)
    with pytest.raises(UserError, match="is not empty"):
        loop.run(wanted)
    assert [path.name for path in (tmp_path / "m").iterdir()] == ["thesis.tex"]
    loop.run(wanted, overwrite=True)
    assert len(done) == 2 and (tmp_path / "m" / "config.json").is_file()


def test_an_unfinished_run_of_another_recipe_is_left_alone_by_one_that_is_done(
    pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have done all its steps, as where the disk was full when its result was to be written."""
    first, other = (recipe(pico, tmp_path / "m", examples=16, seed=seed) for seed in (0, 1))
    loop.run(first)
    with monkeypatch.context() as patch:
        patch.setattr(results, "_write_weights", Mock(side_effect=OSError(28, "No space left on device")))
        with pytest.raises(UserError, match="no space left"):
            loop.run(other, overwrite=True)
    done = steps_done(monkeypatch)
    assert loop.run(first) == tmp_path / "m"
    loop.run(other, overwrite=True)
    assert not done and (folders.read_manifest(tmp_path / "m") or {})["recipe"]["train"]["seed"] == 1


def test_another_base_at_the_same_place_is_another_run(pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, out = tmp_path / "base", tmp_path / "m"
    shutil.copytree(pico, base)
    interrupt(recipe(base, out, examples=16), 1)
    before = weights(base)
    moved = {name: (tensor.float() * 1.5).to(tensor.dtype) for name, tensor in before.items()}
    safetensors.torch.save_file(moved, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"m\.partial: the base is not what the run began with \(\w{16} then, \w{16} now\); bring it back"):
        loop.run(recipe(base, out, examples=16))
    safetensors.torch.save_file(before, base / "model.safetensors", metadata={"format": "pt"})
    loop.run(recipe(base, out, examples=16))
    done = steps_done(monkeypatch)
    loop.run(recipe(base, out, examples=16))
    assert not done
    safetensors.torch.save_file(moved, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="is not empty"):
        loop.run(recipe(base, out, examples=16))


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory"), MemoryError()]
)
def test_too_little_memory_is_told_in_one_line_with_what_to_do(
    pico: Path, tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "backward", Mock(side_effect=error))
    with pytest.raises(UserError, match=r"^out of memory .*; give the same command with a lower train\.tokens_per_pass") as told:
        loop.run(recipe(pico, tmp_path / "m"))
    assert "\n" not in str(told.value)
    monkeypatch.setattr(loop, "backward", Mock(side_effect=RuntimeError("a fault of ours")))
    with pytest.raises(RuntimeError, match="a fault of ours"):
        loop.run(recipe(pico, tmp_path / "m"))


def test_two_processes_do_not_train_into_one_folder(pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, met, backward = recipe(pico, tmp_path / "m", examples=8), [], loop.backward

    def meanwhile(*rest: Any) -> torch.Tensor:
        monkeypatch.setattr(loop, "backward", backward)
        with pytest.raises(UserError) as other:
            loop.run(wanted)
        met.append(str(other.value))
        return backward(*rest)

    monkeypatch.setattr(loop, "backward", meanwhile)
    assert (loop.run(wanted) / journal.METRICS).is_file()
    assert len(met) == 1 and "another process writes to" in met[0]


def test_a_folder_of_other_files_is_not_taken_for_an_unfinished_run(pico: Path, tmp_path: Path) -> None:
    (tmp_path / "m.partial").mkdir()
    (tmp_path / "m.partial" / "thesis.tex").touch()
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"m\.partial holds other files"):
            loop.run(recipe(pico, tmp_path / "m", examples=8), overwrite=overwrite)
    assert (tmp_path / "m.partial" / "thesis.tex").is_file()


def test_the_working_folder_can_be_the_result(pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    loop.run(recipe(pico, Path("."), examples=8))
    assert (tmp_path / "here" / journal.METRICS).is_file() and [path.name for path in tmp_path.iterdir()] == ["here"]


def test_a_run_whose_data_gives_nothing_to_train_on_has_no_result(pico: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"^nothing was trained on: 8 of 8 draws skipped \(8: its answer alone is longer than train.max_length\)"
    ):
        loop.run(recipe(pico, tmp_path / "m", examples=8, max_length=8))
    assert not list(tmp_path.iterdir())


def test_a_long_log_is_rewound_without_holding_it(tmp_path: Path) -> None:
    file, norms = tmp_path / "metrics.jsonl", []
    lines = [json.dumps({"step": step, "grad_norm": step / 7, "tasks": dict.fromkeys(map(str, range(60)), 0.5)}) for step in range(1, 3001)]
    file.write_text("\n".join(lines) + '\n{"step": 30', encoding="utf-8")
    tracemalloc.start()
    journal.rewind(file, 2000, lambda line: norms.append(line["grad_norm"]))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert file.read_text(encoding="utf-8") == "".join(line + "\n" for line in lines[:2000])
    assert norms == [step / 7 for step in range(1, 2001)]
    assert peak < file.stat().st_size / 2


def test_an_unfinished_run_of_other_data_is_refused(pico: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    (data / "rotten_tomatoes").mkdir(parents=True)
    rows = [{"text": f"a film, number {number}", "label": number % 2} for number in range(40)]
    (data / "rotten_tomatoes" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    begun = replace(recipe(pico, tmp_path / "m"), mixture=MixtureConfig(dir=data))
    claim(begun)
    (data / "rotten_tomatoes" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:-1]), encoding="utf-8")
    with pytest.raises(
        UserError,
        match=r"the data of rotten_tomatoes is not what the run began with \(40 rows, \w+ then, 39 rows, \w+ now\); bring it back",
    ):
        loop.run(begun)


def test_how_a_run_is_computed_may_change_while_it_is_not_done(
    pico: Path, tmp_path: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """More memory or less, another checkpoint interval: the result is the same."""
    interrupt(recipe(pico, tmp_path / "m", save_every=9), 5)
    interrupt(recipe(pico, tmp_path / "m", keep=1), 4)
    out = loop.run(recipe(pico, tmp_path / "m", activation_checkpointing=True, tokens_per_pass=300))
    assert "going on from step 9 of 20" in capsys.readouterr().err
    assert [line["loss"] for line in metrics(out)] == pytest.approx([line["loss"] for line in metrics(trained)], rel=1e-4)
    manifest = folders.read_manifest(out) or {}
    assert manifest["recipe"]["train"]["activation_checkpointing"] and manifest["recipe"]["train"]["tokens_per_pass"] == 300


def test_activation_checkpointing_computes_layers_anew(pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, attend = [], attention.segment_attention
    monkeypatch.setattr(results, "write", lambda *rest, **options: tmp_path)
    for switch in (False, True):
        calls.append(0)

        def counted(*args: object, **options: object) -> object:
            calls[-1] += 1
            return attend(*args, **options)  # type: ignore[arg-type]

        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, attention.SEGMENTS, counted)
        loop.run(recipe(pico, tmp_path / str(switch), examples=8, activation_checkpointing=switch))
    assert calls[0] > 0 and calls[1] == 2 * calls[0]
    with pytest.raises(ValueError, match="do not go together"):
        TrainConfig(examples=1, activation_checkpointing=True, compile=True)


@pytest.mark.soak
def test_compiled_layers_have_the_losses_of_plain_ones_and_are_compiled_once(pico: Path, tmp_path: Path, trained: Path) -> None:
    torch._dynamo.reset()
    out = loop.run(recipe(pico, tmp_path / "m", compile=True))
    assert [line["loss"] for line in metrics(out)] == pytest.approx([line["loss"] for line in metrics(trained)], rel=1e-3)
    frames = torch._dynamo.utils.counters["frames"]
    assert 0 < frames["ok"] == frames["total"] < 12  # not anew for every number of segments
    assert "attn" not in (out / "config.json").read_text(encoding="utf-8")


def poisoned(monkeypatch: pytest.MonkeyPatch, steps: set[int], value: float) -> None:
    """In these steps the first example's loss and all gradients are this many times what they are."""
    step, backward = [0], loop.backward

    def spoilt(objective: Objective, *rest: Any) -> torch.Tensor:
        losses = backward(objective, *rest)
        step[0] += 1
        if step[0] in steps:
            losses[0] *= value
            for parameter in objective.parameters():
                if parameter.grad is not None:
                    parameter.grad *= value
        return losses

    monkeypatch.setattr(loop, "backward", spoilt)


def test_a_step_whose_loss_is_no_number_is_passed_over_and_its_examples_are_named(
    pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    poisoned(monkeypatch, {3}, float("nan"))
    out = loop.run(recipe(pico, tmp_path / "m", examples=48))
    lines = metrics(out)
    assert [line["step"] for line in lines if "passed_over" in line] == [3] and lines[2]["loss"] is None
    first = Mixture(MixtureConfig(dir=Path("sampler"))).draw(16)
    named = lines[2]["examples"][0]
    assert (named["index"], named["task"], named["template"], named["row"]) == (16, first.task, first.template, first.row)
    assert (
        "step 3 is passed over: loss nan" in (said := capsys.readouterr().err)
        and f"{first.task} / {first.template} row {first.row}" in said
    )
    assert all(value.isfinite().all() for value in weights(out).values())


def test_three_steps_in_a_row_that_cannot_be_taken_end_the_run(pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poisoned(monkeypatch, {2, 4, 5, 6}, float("inf"))
    with pytest.raises(UserError, match=r"^step 6 is passed over: .*; that was 3 steps in a row: look at these examples, or"):
        loop.run(recipe(pico, tmp_path / "m"))
    assert not (tmp_path / "m").exists()
    assert [line["step"] for line in metrics(tmp_path / "m.partial")] == [1, 2, 3, 4, 5, 6]


def test_a_run_that_bad_steps_ended_goes_on_with_the_settings_that_its_last_words_name(
    pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        poisoned(patch, {3, 4, 5}, float("inf"))
        with pytest.raises(UserError) as ended:
            loop.run(recipe(pico, tmp_path / "m", examples=48, dtype="bfloat16"))
    for word in ("lower train.lr", "train.dtype=float32", "another train.spike", f"last checkpoint in {tmp_path / 'm.partial'}"):
        assert word in str(ended.value)
    changed = recipe(pico, tmp_path / "m", examples=48, lr=1e-3, spike=50.0)
    out = loop.run(changed)
    assert "from step 5 on with train.lr=0.001 (was 0.01), train.dtype=float32 (was bfloat16), train.spike=50.0 (was 20.0)" in (
        " ".join(capsys.readouterr().err.split())
    )
    assert [line["lr"] for line in metrics(out)[4:]] == [loop.learning_rate(changed.train, step) for step in (4, 5)]
    assert [line["lr"] for line in metrics(out)[:4]] == [10 * loop.learning_rate(changed.train, step) for step in range(4)]
    manifest = folders.read_manifest(out) or {}
    assert [(each["from_step"], each["train"]["lr"], each["train"]["dtype"]) for each in manifest["changes"]] == [
        (1, 0.01, "bfloat16"),
        (5, 0.001, "float32"),
    ]
    assert manifest["recipe"]["train"]["lr"] == 1e-3


def test_a_spike_is_passed_over_and_the_weights_stay_as_they_were(pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poisoned(monkeypatch, {24}, 1e4)
    out = loop.run(recipe(pico, tmp_path / "m", examples=200, lr=1e-4))
    spikes = [line for line in metrics(out) if "passed_over" in line]
    assert [line["step"] for line in spikes] == [24] and "times the median" in spikes[0]["passed_over"]
    taken = loop.run(recipe(pico, tmp_path / "n", examples=200, lr=1e-4, spike=0.0))
    assert not [line for line in metrics(taken) if "passed_over" in line]


def test_more_target_rows_than_fit_at_a_time_give_the_same_losses(
    pico: Path, tmp_path: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objective, "HEAD_ROWS", 7)
    out = loop.run(recipe(pico, tmp_path / "m", examples=24))
    assert max(line["targets"] for line in metrics(out)) > 7
    other = loop.run(recipe(pico, tmp_path / "n", examples=24, activation_checkpointing=True))
    monkeypatch.undo()
    plain = loop.run(recipe(pico, tmp_path / "o", examples=24))
    for found in (out, other):
        assert [line["loss"] for line in metrics(found)] == pytest.approx([line["loss"] for line in metrics(plain)], rel=1e-5)


def test_what_is_written_for_tensorboard_can_be_read_by_it_and_goes_on_after_a_kill(pico: Path, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    wanted = recipe(pico, tmp_path / "m", tensorboard=True, save_every=2)
    work = tmp_path / "m.partial"
    process = subprocess.Popen(command(wanted, tmp_path), env={**os.environ, "HF_HUB_OFFLINE": "1"})
    while process.poll() is None and not (work / "checkpoints" / "step-0000002").is_dir():
        time.sleep(0.005)
    process.kill()
    process.wait()
    out = loop.run(wanted)
    events = accumulator.EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    losses = {event.step: event.value for event in events.Scalars("train/loss")}
    assert losses == pytest.approx({line["step"]: line["loss"] for line in metrics(out)}, rel=1e-6) and len(losses) == 20


KINDS = ("skipped", "cut")
"""What of a mixture is not trained on as it stands: counts in the totals, and files."""


def test_an_answer_that_is_too_long_is_counted_and_never_trained_on_as_nothing(
    pico: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = loop.run(recipe(pico, tmp_path / "m", max_length=24, examples=32))
    totals = (folders.read_manifest(out) or {})["totals"]
    assert totals["skipped"] > 0 and totals["cut"] > 0
    assert totals["examples"] + totals["skipped"] == 32
    said = " ".join(capsys.readouterr().err.split())
    assert f"{totals['skipped']} of 32 draws skipped ({totals['skipped']}: its answer alone is longer" in said
    assert f", {totals['cut']} prompts cut to train.max_length" in said
    listed = {kind: [json.loads(line) for line in (out / f"{kind}.jsonl").read_text(encoding="utf-8").splitlines()] for kind in KINDS}
    assert {kind: len(lines) for kind, lines in listed.items()} == {kind: totals[kind] for kind in KINDS}
    mixture = Mixture(MixtureConfig(dir=Path("sampler")))
    for line in itertools.chain(*listed.values()):
        draw = mixture.draw(line["index"])
        assert (line["task"], line["template"], line["row"], line["step"]) == (draw.task, draw.template, draw.row, line["index"] // 8 + 1)
    assert all(line["targets"] > 0 for line in metrics(out))


def test_gradients_that_are_kept_over_the_steps_change_nothing_and_steps_without_targets_move_nothing(
    pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = replace(recipe(pico, tmp_path / "m", max_length=24, examples=32, batch_size=1, weight_decay=0.1), save_dtype="float32")
    usual = loop.run(wanted)
    assert {line["targets"] == (before["targets"] if before else 0) for before, line in itertools.pairwise([None, *metrics(usual)])} == {
        True,
        False,
    }
    monkeypatch.setattr(loop, "KEPT_GRADIENT", 0)
    kept = loop.run(replace(wanted, out=tmp_path / "n"))
    assert [line["loss"] for line in metrics(kept)] == [line["loss"] for line in metrics(usual)]
    for name, value in weights(kept).items():
        assert torch.equal(value, weights(usual)[name]), name


def test_the_learning_rate_warms_up_and_ends_near_zero() -> None:
    train = TrainConfig(examples=1000, batch_size=10, lr=1.0, warmup_ratio=0.1)
    rates = [loop.learning_rate(train, step) for step in range(train.num_steps)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == pytest.approx(1.0)
    assert max(rates) == rates[9] and 0 < rates[-1] < 0.01
    assert rates[9:] == sorted(rates[9:], reverse=True)


def test_every_shipped_recipe_is_read() -> None:
    shipped = list((Path(loop.__file__).parents[1] / "recipes").glob("*.yaml"))
    assert shipped
    for file in shipped:
        assert load_recipe(Path(file.stem)).train.num_steps > 0


def test_the_name_of_a_shipped_recipe_is_that_recipe_whatever_lies_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("quickstart").mkdir()  # as `make quickstart` leaves it
    assert load_recipe(Path("quickstart")).model == "smollm2-135m"
    with pytest.raises(UserError, match="quickstart is not the folder of a training run"):
        load_recipe(Path("./quickstart").resolve())
    with pytest.raises(UserError, match=r"no recipe fastest: neither a file, nor the folder of a run, nor a name \(lora-8b, mt-llama-7b, "):
        load_recipe(Path("fastest"))
    known = " ".join(CliRunner().invoke(app, ["train", "run", "--help"]).stdout.split())
    assert all(file.stem in known for file in (Path(loop.__file__).parents[1] / "recipes").glob("*.yaml"))


def test_values_on_the_command_line_win_over_the_recipe() -> None:
    assert load_recipe(Path("quickstart"), ["train.lr=3e-5", "train.examples=7"]).train.lr == 3e-5
    with pytest.raises(UserError, match=r"did you mean train\.lr\?"):
        load_recipe(Path("quickstart"), ["train.lrr=1"])


def test_the_result_can_be_kept_as_it_was_trained(pico: Path, tmp_path: Path) -> None:
    usual = loop.run(recipe(pico, tmp_path / "m", examples=8))
    exact = loop.run(replace(recipe(pico, tmp_path / "n", examples=8), save_dtype="float32"))
    assert {value.dtype for value in weights(usual).values()} == {torch.bfloat16}
    for name, value in weights(exact).items():
        assert value.dtype == torch.float32 and torch.equal(value.bfloat16(), weights(usual)[name])
    assert AutoModelForCausalLM.from_pretrained(exact).config.dtype == torch.float32
