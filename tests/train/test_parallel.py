"""Training on two ranks over gloo: the same losses as one process, sharded state, one folder, one line where a rank fails."""

import importlib.util
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from ranks_job import interrupted_after
from transformers import AutoModelForCausalLM

from mtllama import config as configs
from mtllama import folders
from mtllama.data.mixture import MixtureConfig
from mtllama.errors import UserError
from mtllama.train import journal, loop, state
from mtllama.train.parallel import Ranks, joined
from mtllama.train.recipe import LoraConfig, ParallelConfig, Recipe, TrainConfig
from mtllama.weights.shards import SINGLE, CheckpointReader

JOB = Path(__file__).with_name("ranks_job.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
ACCELERATE += ["--mixed_precision", "no", "--dynamo_backend", "no"]
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
STOP = 3
"""The step after which one rank of the run `left` is asked to stop."""
# 41 examples: in the last step of one example the second rank has none; 300 tokens a pass: the ranks have passes of unequal number.
CALM_LR = 3e-4
"""Adam's first steps go by the signs of gradients, and turn the rounding of bfloat16 into steps as large as any."""
TRAIN = TrainConfig(examples=41, batch_size=8, lr=1e-3, max_length=256, tokens_per_pass=300, dtype="float32", save_every=2, keep=9)


def recipe(pico: Path, out: Path, strategy: str = "auto", lora: LoraConfig | None = None, **train: Any) -> Recipe:
    settings = TrainConfig(**{**vars(TRAIN), **train})
    parallel = ParallelConfig(strategy=strategy)  # type: ignore[arg-type]
    return Recipe(out=out, train=settings, model=str(pico), mixture=MixtureConfig(dir=Path("sampler")), parallel=parallel, lora=lora)


def values(recipe: Recipe) -> dict[str, Any]:
    """A recipe as a file has it."""
    return {key: value for key, value in configs.to_dict(recipe).items() if value is not None}


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / journal.METRICS).read_text(encoding="utf-8").splitlines()]


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in metrics(folder)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(folder)
    return {name: reader.tensor(name) for name in reader}


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int, run: Recipe) -> None:
    """Leave a run unfinished with a checkpoint of one process."""
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_interrupts", lambda: interrupted_after(step))
        with pytest.raises(UserError, match=f"interrupted after step {step}"):
            loop.run(run)


@dataclass(frozen=True)
class Two:
    """What two ranks left."""

    folder: Path
    recipes: dict[str, Recipe]
    seen: list[dict[str, Any]]
    """By rank, then by run."""
    status: int
    said: str


@pytest.fixture(scope="module")
def calm(pico: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pico with weights of a usual size: those of the other are so large that the rounding of bfloat16 grows from layer to layer.

    Its norms lie between two numbers that bfloat16 has.
    """
    folder = tmp_path_factory.mktemp("calm") / "model"
    shutil.copytree(pico, folder)
    tensors = {name: tensor.float() * (1.0035 if name.endswith("norm.weight") else 0.2) for name, tensor in weights(pico).items()}
    safetensors.torch.save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def one(pico: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    return loop.run(recipe(pico, tmp_path_factory.mktemp("one") / "model"))


@pytest.fixture(scope="module")
def two(pico: Path, calm: Path, tmp_path_factory: pytest.TempPathFactory) -> Two:
    folder = tmp_path_factory.mktemp("two")
    recipes = {
        "fsdp": recipe(pico, folder / "fsdp"),
        "ddp": recipe(pico, folder / "ddp", "ddp"),
        "bf16": recipe(calm, folder / "bf16", dtype="bfloat16", lr=CALM_LR),
        "lora": recipe(pico, folder / "lora", lora=LoraConfig(rank=4), activation_checkpointing=True),
        "left": recipe(pico, folder / "left"),
        "taken": recipe(pico, folder / "taken"),
        "none": recipe(pico, folder / "none", "none"),
    }
    with pytest.MonkeyPatch.context() as monkeypatch:
        stop_after(monkeypatch, STOP, recipes["taken"])
    (folder / "job.json").write_text(
        json.dumps({"recipes": {name: values(each) for name, each in recipes.items()}, "stop": STOP}), encoding="utf-8"
    )
    done = subprocess.run([*TORCHRUN, str(JOB), str(folder)], capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    assert (folder / "seen-1.json").is_file(), done.stderr
    seen = [json.loads((folder / f"seen-{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1)]
    return Two(folder, recipes, seen, done.returncode, done.stderr)


@pytest.mark.parametrize("name", ["fsdp", "ddp"])
def test_two_ranks_have_the_losses_of_one_process(name: str, two: Two, one: Path) -> None:
    ours, theirs = metrics(two.folder / name), metrics(one)
    assert len(ours) == len(theirs) == 6
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
        assert {key: mine[key] for key in ("tokens", "targets")} == {key: other[key] for key in ("tokens", "targets")}
        assert mine["families"].keys() == other["families"].keys()
        for family, counted in other["families"].items():
            assert mine["families"][family] == {**counted, "loss": pytest.approx(counted["loss"], abs=1e-4)}
    assert max(losses(one)) - min(losses(one)) > 0.1


def test_two_ranks_have_the_losses_of_one_process_in_bfloat16(two: Two, calm: Path, tmp_path: Path) -> None:
    ours, theirs, exact = (
        losses(two.folder / "bf16"),
        losses(loop.run(recipe(calm, tmp_path / "bf16", dtype="bfloat16", lr=CALM_LR))),
        losses(loop.run(recipe(calm, tmp_path / "fp32", lr=CALM_LR))),
    )
    assert ours == pytest.approx(theirs, abs=1e-3)
    assert ours[0] == pytest.approx(theirs[0], abs=1e-5)  # norms are not rounded, by one process or by two
    assert ours[0] != pytest.approx(exact[0], abs=1e-5)  # it was another compute dtype


def test_each_step_is_dealt_out_by_length(two: Two, one: Path) -> None:
    steps = list(zip(*(seen["fsdp"]["tokens"] for seen in two.seen), strict=True))
    totals = [line["tokens"] for line in metrics(one)]
    assert [sum(tokens) for tokens in steps] == [totals[0], *(after - before for before, after in itertools.pairwise(totals))]
    assert all(abs(first - second) <= 0.2 * (first + second) for first, second in steps[:-1])
    assert sorted(map(bool, steps[-1])) == [False, True], "the last step has one example"


def test_each_rank_holds_its_rows_and_never_the_whole_model(two: Two) -> None:
    first, second = (seen["fsdp"] for seen in two.seen)
    for seen in (first, second):
        assert seen["kinds"] == ["DTensor"] and seen["loaded empty"] and seen["trained dtypes"] == ["torch.float32"]
        assert seen["whole at a time"] < 0.7 * seen["values"]
    assert first["local values"] + second["local values"] == first["values"] == second["values"]
    assert 0 < second["local values"] <= first["local values"] < 0.6 * first["values"]
    plain = two.seen[1]["ddp"]
    assert plain["kinds"] == ["Tensor"] and plain["local values"] == plain["values"] == first["values"]


@pytest.mark.parametrize("name", ["fsdp", "ddp", "taken"])
def test_the_result_of_two_ranks_is_the_folder_of_one_process(name: str, two: Two, one: Path) -> None:
    ours, theirs = weights(two.folder / name), weights(one)
    assert list(ours) == list(theirs)
    for tensor in theirs:
        assert ours[tensor].dtype == theirs[tensor].dtype == torch.bfloat16
        torch.testing.assert_close(ours[tensor].float(), theirs[tensor].float(), rtol=1e-2, atol=1e-4)
    for file in sorted(one.iterdir()):
        if file.name not in ("model.safetensors", journal.METRICS, folders.MANIFEST):
            assert (two.folder / name / file.name).read_bytes() == file.read_bytes()
    told, same = folders.read_manifest(two.folder / name) or {}, folders.read_manifest(one) or {}
    assert told["ranks"] == 2 and same["ranks"] == 1
    for key in ("examples", "tokens", "targets", "cut", "skipped", "steps"):
        assert told["totals"][key] == same["totals"][key]
    model = AutoModelForCausalLM.from_pretrained(two.folder / name)
    assert all(torch.equal(ours[key], value) for key, value in model.state_dict().items() if key in ours)
    assert not (two.folder / f"{name}.partial").exists()


def test_a_signal_to_one_rank_stops_both_with_a_checkpoint(two: Two) -> None:
    assert [f"interrupted after step {STOP} of 6" in seen["left"]["error"] for seen in two.seen] == [True, True]
    folder = two.folder / "left.partial" / "checkpoints" / f"step-{STOP:07d}"
    assert sorted(path.name for path in folder.iterdir()) == [state.rank_file(0), state.rank_file(1), state.STATE]
    assert len(metrics(two.folder / "left.partial")) == STOP


def test_what_two_ranks_left_one_process_takes_up(two: Two, one: Path) -> None:
    out = loop.run(two.recipes["left"])
    assert losses(out) == pytest.approx(losses(one), abs=1e-5)
    assert [line["step"] for line in metrics(out)] == list(range(1, 7))
    ours, theirs = weights(out), weights(one)
    for tensor in theirs:
        torch.testing.assert_close(ours[tensor].float(), theirs[tensor].float(), rtol=1e-2, atol=1e-4)


def test_what_one_process_left_two_ranks_take_up(two: Two, one: Path) -> None:
    assert losses(two.folder / "taken") == pytest.approx(losses(one), abs=1e-5)
    assert all("error" not in seen["taken"] for seen in two.seen)


def test_adapters_are_sharded_too_and_merged_as_by_one_process(two: Two, pico: Path, tmp_path: Path) -> None:
    theirs = loop.run(recipe(pico, tmp_path / "model", lora=LoraConfig(rank=4)))
    assert losses(two.folder / "lora") == pytest.approx(losses(theirs), abs=1e-5)
    assert two.seen[0]["lora"]["kinds"] == ["DTensor"] and two.seen[0]["lora"]["loaded empty"]
    ours, others, base = weights(two.folder / "lora"), weights(theirs), weights(pico)
    assert ours.keys() == others.keys() == base.keys()
    for tensor in others:
        torch.testing.assert_close(ours[tensor].float(), others[tensor].float(), rtol=1e-2, atol=1e-4)
    assert sum(not torch.equal(ours[tensor], base[tensor]) for tensor in base) == 14  # seven matrices in two layers


def test_several_ranks_without_a_strategy_are_refused(two: Two) -> None:
    assert ["2 ranks were started, but parallel.strategy is none" in seen["none"]["error"] for seen in two.seen] == [True, True]


def test_where_one_rank_fails_all_end_and_one_line_says_why(two: Two) -> None:
    lines = [line for line in two.said.splitlines() if line.startswith("mtllama:")]
    assert lines == ["mtllama: the second rank alone has failed"]
    assert two.status != 0
    assert "Traceback" not in two.said.split("torch/distributed/elastic")[0]


def test_a_killed_rank_ends_the_others_and_the_next_launch_goes_on(pico: Path, one: Path, tmp_path: Path) -> None:
    """By torchrun and the command line; then, where it is installed, by accelerate."""
    file, out = tmp_path / "recipe.yaml", tmp_path / "model"
    file.write_text(json.dumps(values(recipe(pico, out, examples=160))), encoding="utf-8")
    command = ["-m", "mtllama", "train", "run", str(file)]
    process = subprocess.Popen([*TORCHRUN, *command], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
    checkpoints, deadline = tmp_path / "model.partial" / "checkpoints", time.monotonic() + 120
    while process.poll() is None and len(list(checkpoints.glob("step-*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    workers = [int(word) for word in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="utf-8").split()]
    assert len(workers) == 2 and process.poll() is None
    os.kill(max(workers), signal.SIGKILL)
    printed, said = process.communicate(timeout=120)
    lines = [line for line in said.splitlines() if line.startswith("mtllama:")]
    assert len(lines) == 1 and "lost another one" in lines[0] and "goes on from the last checkpoint" in lines[0], said
    assert process.returncode != 0 and printed == "" and not out.exists()
    launch = ACCELERATE if importlib.util.find_spec("accelerate") else TORCHRUN
    done = subprocess.run([*launch, *command], capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(out)]
    assert done.stderr.count("going on from step") == 1
    assert [line["step"] for line in metrics(out)] == list(range(1, 21))
    assert losses(out)[:5] == pytest.approx(losses(loop.run(recipe(pico, tmp_path / "one", examples=160)))[:5], abs=1e-5)
    assert (folders.read_manifest(out) or {})["ranks"] == 2


@pytest.fixture
def group() -> Iterator[None]:
    """Ends the group of one that sharding in this process makes."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def test_one_rank_can_shard_too(pico: Path, one: Path, tmp_path: Path, group: None) -> None:
    out = loop.run(recipe(pico, tmp_path / "model", "fsdp"))
    assert dist.is_initialized()
    assert losses(out) == pytest.approx(losses(one), abs=1e-5)


def test_the_launchers_environment_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(UserError, match="WORLD_SIZE is 'two'; a number is needed"), joined():
        pass
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(UserError, match="start them by torchrun or accelerate launch"), joined():
        pass


def test_offloading_is_for_sharded_models() -> None:
    with pytest.raises(ValueError, match=r"goes with parallel\.strategy fsdp, not ddp"):
        ParallelConfig(strategy="ddp", cpu_offload=True)
    with pytest.raises(UserError, match=r"set parallel\.strategy=fsdp"):
        Ranks().by(ParallelConfig(cpu_offload=True))
