"""The working folder of a run that is not done: whose it is, and which parts of a recipe may change before it is."""

from pathlib import Path
from typing import Any

import torch

from mtllama import config as configs
from mtllama import folders
from mtllama.data.mixture import Mixture
from mtllama.errors import UserError
from mtllama.progress import say
from mtllama.train import state
from mtllama.train.recipe import CHANGES, DATA, RECIPE, Recipe, TrainConfig

HOW = ("activation_checkpointing", "compile", "tokens_per_pass", "save_every", "keep", "tensorboard")
"""Keys of `train` that say how a run is computed and kept, not what comes out: they may change while it is not done; so may `parallel`."""
STEERING = ("lr", "warmup_ratio", "schedule", "weight_decay", "max_grad_norm", "dtype", "spike")
"""Keys that say how far a step goes, not what is read in it: they may change, too, and from which step on they did is kept."""


def is_done(recipe: Recipe, mixture: Mixture, folder: Path) -> bool:
    """Whether the result is there, of this recipe and this data. What a kill left of the run that made it goes."""
    made = folders.read_manifest(recipe.out) or {}
    if "recipe" not in made or _what(made["recipe"]) != _what(configs.to_dict(recipe)) or made.get("data") != mixture.data():
        return False
    if folder.is_dir():
        if not state.folder_of(folder / "checkpoints", recipe.train.num_steps).is_dir():
            return False  # begun after it: to be gone on with
        with folders.locked(folder, (RECIPE,)):
            folders.remove(folder)
    return True


def claim(folder: Path, recipe: Recipe, mixture: Mixture, *, overwrite: bool) -> None:
    """Begin in the working folder, or check that the run in it is of the same recipe and the same data."""
    folders.require_new(recipe.out, overwrite=overwrite)  # whoever had the folder until now may be done
    wanted, data = configs.to_dict(recipe), mixture.data()
    if (folder / RECIPE).is_file():
        if _what(folders.read_json(folder / RECIPE), *STEERING) != _what(wanted, *STEERING):
            raise UserError(f"{folder} holds an unfinished run of another recipe; remove it, or choose another out")
        before = folders.read_json(folder / DATA) if (folder / DATA).is_file() else data
        if changed := sorted(name for name in {*before, *data} if before.get(name) != data.get(name)):
            then, now = (marks.get(changed[0], "none of it") for marks in (before, data))
            raise UserError(
                f"{folder}: the data of {changed[0]} is not what the run began with ({then} then, {now} now); "
                "bring it back, remove the folder to begin anew, or choose another out"
            )
    state.tidy(folder / "checkpoints")
    folder.mkdir(parents=True, exist_ok=True)
    folders.write_json(folder / RECIPE, wanted)  # first: it tells that the folder is ours
    folders.write_json(folder / DATA, data)


def _what(recipe: dict[str, Any], *but: str) -> dict[str, Any]:
    """The part of a recipe that decides what comes out, but for these keys of `train`."""
    train = {key: value for key, value in recipe.get("train", {}).items() if key not in (*HOW, *but)}
    return {**recipe, "train": train, "parallel": None}


def note_changes(folder: Path, train: TrainConfig, compute: torch.dtype, start: int) -> None:
    """Keep which values the steps from here on are done with, and say so where they are others than before.

    The dtype is the one that is computed in: `auto` is another one on another machine.
    """
    now = {key: getattr(train, key) for key in STEERING} | {"dtype": str(compute).removeprefix("torch.")}
    before = folders.read_json(folder / CHANGES) if (folder / CHANGES).is_file() else []
    before = [each for each in before if each["from_step"] <= start]  # later steps are done again
    was = before[-1]["train"] if before else now
    if odd := [f"train.{key}={now[key]} (was {was[key]})" for key in STEERING if now[key] != was[key]]:
        say(f"from step {start + 1} on with {', '.join(odd)}")
    folders.write_json(folder / CHANGES, before if before and not odd else [*before, {"from_step": start + 1, "train": now}])
