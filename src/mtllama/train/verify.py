"""Whether a run is what it should be, on the user's own model and data: a short run in float32, done in several ways, must come out the same.

Every way is a run of its own, by the same command as any other, in a folder beside the recipe's `out` that is removed again.
"""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mtllama import config as configs
from mtllama import folders
from mtllama.errors import UserError
from mtllama.model.load import pick_device
from mtllama.progress import progress
from mtllama.train.journal import METRICS
from mtllama.train.recipe import RECIPE, ParallelConfig, Recipe
from mtllama.train.state import folder_of
from mtllama.weights.shards import CheckpointReader

WHAT = ("packing", "accumulation", "resume", "ranks")
STEPS = 4
"""Steps of each run."""
ALLOWED = 1e-4
"""Difference of a loss (nat) that rounding in float32 explains; losses are around 1, and float32 has 7 digits."""
ALLOWED_NORM = 1e-3
"""The same of a gradient norm, as a part of it. It is judged, too: at LR the losses of a few steps hardly tell what the gradients were."""
TRIES = 3
"""A run is killed as soon as it has a checkpoint; one that is done by then is tried again."""
LR = 1e-6
"""Adam's first steps go by the signs of gradients alone: at a usual rate, rounding of those near zero would soon show in the losses."""
LIMIT = 3600.0
"""Seconds after which a run of a few steps is given up."""
RANKS = 2
"""Processes that are compared with one."""


@dataclass(frozen=True)
class Finding:
    """What one comparison found."""

    what: str
    ways: str
    """What was compared."""
    num_steps: int
    loss: float | None
    """Largest difference of a loss: of a step or, within it, of a task (nat a target token); None where there are no figures."""
    norm: float | None
    """Largest relative difference of a step's gradient norm."""
    weight: float | None
    """Largest difference of a weight at the end, where they must be the same."""
    holds: bool | None
    """None: there is nothing to compare."""
    why: str = ""
    """Why there are no figures."""


def verify(recipe: Recipe, what: Sequence[str] = WHAT, *, steps: int = STEPS) -> Iterator[Finding]:
    """Compare ways to do the first `steps` steps of a recipe that must come to the same; each finding comes as soon as it is made.

    packing: examples one behind the other in passes as large as the recipe's, against each in a pass of its own. accumulation: such passes,
    against some of a third of their size.
    resume: killed with SIGKILL after a checkpoint and started again, against in one go. ranks: two processes, against one.
    """
    for each in what:
        if each not in WHAT:
            raise UserError(f"--what {each!r} is unknown; choose from {', '.join(WHAT)}")
    work = recipe.beside("verify")
    train = replace(
        recipe.train,
        dtype="float32",
        lr=min(recipe.train.lr, LR),
        examples=steps * recipe.train.batch_size,
        save_every=steps,
        keep=1,
        spike=0.0,
        tensorboard=False,
    )
    # As large as the recipe's own pass, so that it fits where the recipe does, but for room for two of the longest examples.
    train = replace(train, tokens_per_pass=max(train.tokens_per_pass, 2 * train.max_length))
    one = replace(recipe, out=work / "one", train=train, parallel=ParallelConfig(), save_dtype="auto" if recipe.lora else "float32")
    if one.lora:
        one = replace(one, lora=replace(one.lora, merge=True))
    if recipe.lora and recipe.lora.dropout:
        raise UserError("lora.dropout drops others in every way to pack; verify with lora.dropout=0")
    return _findings(one, what)


def _findings(one: Recipe, what: Sequence[str]) -> Iterator[Finding]:
    work = one.out.parent
    with folders.explained(work), folders.locked(work, (folders.LOCK,)):
        try:
            for left in work.iterdir():  # by a run that was killed
                if left.is_dir():
                    shutil.rmtree(left)
            for number, each in enumerate(("the run to compare with", *what)):
                # No bar stands while a finding is looked at: what is printed beside one goes to standard error.
                with progress("verify", 1 + len(what), done=number) as advance:
                    advance(0, note=f"{each},")
                    if not number:
                        _run(one)
                        continue
                    try:
                        found = _compare(each, one)
                    except UserError as error:
                        found = Finding(each, "", one.train.num_steps, None, None, None, holds=False, why=str(error))
                yield found
        finally:
            folders.remove(work)


def _compare(what: str, one: Recipe) -> Finding:
    work = one.out.parent
    other = replace(one, out=work / what)
    if what in ("packing", "accumulation") and one.train.batch_size == 1:
        why = "a step has one example (train.batch_size=1)"
        return Finding(what, "", one.train.num_steps, None, None, None, holds=None, why=why)
    if what == "packing":
        other = replace(other, train=replace(one.train, tokens_per_pass=1))
        ways = f"examples behind each other in passes of {one.train.tokens_per_pass} tokens, and each alone"
        _run(other)
    elif what == "accumulation":
        whole = min(one.train.tokens_per_pass, _lines(one)[0]["tokens"])
        tokens = whole // 3 + 1
        other = replace(other, train=replace(one.train, tokens_per_pass=tokens))
        ways = f"passes of {whole} tokens, and of {tokens}"
        _run(other)
    elif what == "resume":
        ways = "in one go, and killed after a checkpoint and started again"
        other = replace(other, train=replace(one.train, save_every=1))
        _run_killed(other)
    else:
        ways = "one process, and two with sharded weights"
        gpus = torch.cuda.device_count()
        if on_cpu := 0 < gpus < RANKS:
            ways += f", all on the CPU: this machine has {gpus} GPU"
            one = replace(one, out=work / "one on the CPU")
            _run(one, on_cpu=True)
        _run(replace(other, parallel=replace(one.parallel, strategy="fsdp")), RANKS, on_cpu=on_cpu)
    loss, norm = _differences(_lines(one), _lines(other))
    weight = _largest_difference(one.out, other.out) if what == "resume" else None
    # On a GPU, sums of gradients may be added up in another order from run to run.
    same = weight is None or weight <= (0.0 if pick_device().type == "cpu" else ALLOWED)
    shutil.rmtree(other.out)
    return Finding(what, ways, one.train.num_steps, loss, norm, weight, loss <= ALLOWED and norm <= ALLOWED_NORM and same)


def _command(recipe: Recipe, ranks: int) -> list[str]:
    settings = recipe.out.with_name(recipe.out.name + ".recipe")
    settings.mkdir(parents=True, exist_ok=True)
    folders.write_json(settings / RECIPE, configs.to_dict(recipe))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    return [sys.executable, *launch, "-m", "mtllama", "train", "run", str(settings)]


def _run(recipe: Recipe, ranks: int = 1, *, on_cpu: bool = False) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // ranks)))}
    if on_cpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = _command(recipe, ranks)
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LIMIT, env=environment)
    except subprocess.TimeoutExpired as error:
        raise UserError(f"a run to compare with was not done after {LIMIT:.0f} s; verify with fewer --steps, or a smaller model") from error
    if done.returncode:
        last = [line for line in done.stderr.splitlines() if line.strip()]
        if done.returncode == -signal.SIGKILL:
            raise UserError("a run to compare with was killed; was there too little memory? It needs what one process does in float32")
        why = next((line for line in last if line.startswith("mtllama: ")), last[-1] if last else f"status {done.returncode}")
        raise UserError(f"a run to compare with failed: {why.removeprefix('mtllama: ')}")


def _run_killed(recipe: Recipe) -> None:
    """Run it, kill it after its first checkpoint, and run it again to the end."""
    checkpoints = recipe.beside("partial") / "checkpoints"
    last = folder_of(checkpoints, recipe.train.num_steps)
    for _ in range(TRIES):
        process = subprocess.Popen(_command(recipe, 1), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        began = time.monotonic()
        while process.poll() is None and not any(checkpoints.glob("step-*")) and time.monotonic() - began < LIMIT:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        if process.wait() != 0 and not last.is_dir():
            return _run(recipe)  # goes on from the checkpoint, or tells what is wrong
        for left in (recipe.out, checkpoints.parent):  # all steps were done: nothing to go on with
            shutil.rmtree(left, ignore_errors=True)
    raise UserError("the run was done before it could be killed; verify --what resume with more --steps")


def _lines(recipe: Recipe) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (recipe.out / METRICS).read_text(encoding="utf-8").splitlines()]


def _differences(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> tuple[float, float]:
    """Largest difference of a loss, of a step or of a task within it, and largest relative difference of a gradient norm."""
    if [line["tasks"].keys() for line in ours] != [line["tasks"].keys() for line in theirs]:
        return math.inf, math.inf
    losses, norms = [], []
    for our, their in zip(ours, theirs, strict=True):
        if not our["tasks"]:  # nothing to train on, on both sides
            continue
        pairs = [(our["loss"], their["loss"]), *((our["tasks"][task]["loss"], their["tasks"][task]["loss"]) for task in our["tasks"])]
        losses += [abs(one - other) if None not in (one, other) else math.inf for one, other in pairs]
        norms.append(_relative(our["grad_norm"], their["grad_norm"]))
    return max(losses, default=math.inf), max(norms, default=math.inf)


def _relative(our: float | None, their: float | None) -> float:
    """What two norms differ by, as a part of the first; None is one that is no number."""
    if our is None or their is None:
        return math.inf
    return abs(our - their) / our if our else math.inf if their else 0.0


def _largest_difference(ours: Path, theirs: Path) -> float:
    one, other = CheckpointReader(ours), CheckpointReader(theirs)
    return max(float((one.tensor(name).double() - other.tensor(name).double()).abs().max()) for name in one)
