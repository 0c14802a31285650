"""The working folder of a run that is not done: whose it is, and which parts of a recipe may change before it is."""

from pathlib import Path
from typing import Any

import torch

from mtllama import config as configs
from mtllama import folders
from mtllama.data.mixture import Mixture
from mtllama.errors import UserError
from mtllama.model.load import weights_digest
from mtllama.progress import say
from mtllama.train import state
from mtllama.train.recipe import CHANGES, DATA, RECIPE, Recipe, TrainConfig

HOW = ("activation_checkpointing", "compile", "tokens_per_pass", "save_every", "keep", "tensorboard")
"""Keys of `train` that say how a run is computed and kept, not what comes out: they may change while it is not done; so may `parallel`."""
STEERING = ("lr", "warmup_ratio", "schedule", "weight_decay", "max_grad_norm", "dtype", "spike")
"""Keys that say how far a step goes, not what is read in it: they may change, too, and from which step on they did is kept."""


BASE = "(base)"
"""Key of `data` under which the weights stand that are trained on from; the others are names of tasks."""


def is_done(recipe: Recipe, mixture: Mixture, folder: Path) -> bool:
    """Whether the result is there, of this recipe, this base and this data. What a kill left of the run that made it goes."""
    made = folders.read_manifest(recipe.out) or {}
    data = made.get("data")
    if "recipe" not in made or _what(made["recipe"]) != _what(configs.to_dict(recipe)) or not data or _changed(data, recipe, mixture):
        return False
    if (folder / RECIPE).is_file():
        left = folders.read_json(folder / DATA) if (folder / DATA).is_file() else {}
        if _what(folders.read_json(folder / RECIPE)) != _what(made["recipe"]) or left != data:
            return True  # it is another run's, and stays
        if not state.folder_of(folder / "checkpoints", recipe.train.num_steps).is_dir():
            return False  # begun after it: to be gone on with
        with folders.locked(folder, (RECIPE,)):
            folders.remove(folder)
    return True


def _data(recipe: Recipe, mixture: Mixture) -> dict[str, Any]:
    """What the run is made from, by its contents: each task's data, and the base's weights, if they are in a folder (a name has but one)."""
    local = [path for each in (recipe.model, recipe.base, recipe.delta) if each and (path := Path(each).expanduser()).is_dir()]
    return mixture.data() | ({BASE: weights_digest(*local)[:16]} if local else {})


def _changed(before: dict[str, Any], recipe: Recipe, mixture: Mixture) -> str | None:
    """What of the data is not as it was, in words; None if all is."""
    now = _data(recipe, mixture)
    if BASE not in before:  # by a version that did not look
        now.pop(BASE, None)
    for name in sorted({*before, *now}):
        if before.get(name) != now.get(name):
            what = "the base" if name == BASE else f"the data of {name}"
            return f"{what} is not what the run began with ({before.get(name, 'none of it')} then, {now.get(name, 'none of it')} now)"
    return None


def claim(folder: Path, recipe: Recipe, mixture: Mixture, *, overwrite: bool) -> None:
    """Begin in the working folder, or check that the run in it is of the same recipe and the same data."""
    folders.require_new(recipe.out, overwrite=overwrite)  # whoever had the folder until now may be done
    wanted = configs.to_dict(recipe)
    if (folder / RECIPE).is_file():
        if _what(folders.read_json(folder / RECIPE), *STEERING) != _what(wanted, *STEERING):
            raise UserError(f"{folder} holds an unfinished run of another recipe; remove it, or choose another out")
        if (folder / DATA).is_file() and (changed := _changed(folders.read_json(folder / DATA), recipe, mixture)):
            raise UserError(f"{folder}: {changed}; bring it back, remove the folder to begin anew, or choose another out")
    state.tidy(folder / "checkpoints")
    folder.mkdir(parents=True, exist_ok=True)
    folders.write_json(folder / RECIPE, wanted)  # first: it tells that the folder is ours
    folders.write_json(folder / DATA, _data(recipe, mixture))


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
