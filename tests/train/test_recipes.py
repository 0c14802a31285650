"""Every shipped recipe: read, and run dry: a few steps on the pico model and the embedded data, all else as it stands."""

from dataclasses import replace
from importlib import resources
from pathlib import Path

import pytest

from mtllama import folders
from mtllama.tasks.catalog import find_tasks, sampler_dir
from mtllama.train import loop
from mtllama.train.recipe import load_recipe

RECIPES = sorted(Path(str(each)).stem for each in resources.files("mtllama").joinpath("recipes").iterdir() if each.name.endswith(".yaml"))


def test_the_recipes_are_all_there() -> None:
    assert {"mt-llama-7b", "mt-llama-7b-train-sh", "lora-8b", "smollm2-135m-p3", "quickstart"} <= set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_shipped_recipe_runs(name: str, pico: Path, tmp_path: Path) -> None:
    recipe = load_recipe(Path(name), ["mixture.dir=sampler", "mixture.templates=own", "mixture.eval_dir=sampler", f"model={pico}"])
    recipe = replace(recipe, out=tmp_path / "out", train=replace(recipe.train, examples=3 * recipe.train.batch_size))
    if isinstance(recipe.mixture.tasks, dict):
        assert all(task.role == "train" for task in find_tasks(recipe.mixture.tasks))
        there = {task: weight for task, weight in recipe.mixture.tasks.items() if (sampler_dir() / task / "train.jsonl").is_file()}
        assert len(there) > 10
        recipe = replace(recipe, mixture=replace(recipe.mixture, tasks=there))
    if recipe.lora:
        recipe = replace(recipe, lora=replace(recipe.lora, merge=True))
    out = loop.run(recipe)
    manifest = folders.read_manifest(out) or {}
    assert manifest["totals"]["steps"] == 3 and manifest["totals"]["examples"] > recipe.train.batch_size
    assert manifest["recipe"]["train"]["lr"] == recipe.train.lr


def test_the_two_recipes_of_mt_llama_have_its_numbers() -> None:
    readme, script = (load_recipe(Path(name)).train for name in ("mt-llama-7b", "mt-llama-7b-train-sh"))
    assert (readme.num_steps, readme.batch_size, readme.lr, readme.max_length, readme.weight_decay) == (300_000, 16, 5e-6, 2048, 0.0)
    assert (script.examples, script.lr, script.schedule, script.warmup_ratio) == (60_000_000, 2e-5, "cosine", 0.03)
