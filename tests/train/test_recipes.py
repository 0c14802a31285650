"""Every shipped recipe: read, and run dry: a few steps on the pico model and the embedded data, all else as it stands."""

import json
from dataclasses import replace
from importlib import resources
from pathlib import Path

import pytest

from mtllama import folders
from mtllama.errors import UserError
from mtllama.model import adapter
from mtllama.tasks.catalog import catalog, find_tasks, sampler_dir
from mtllama.tasks.p3 import config_name
from mtllama.train import journal, loop
from mtllama.train.recipe import load_recipe

RECIPES = sorted(Path(str(each)).stem for each in resources.files("mtllama").joinpath("recipes").iterdir() if each.name.endswith(".yaml"))


def test_the_recipes_are_all_there() -> None:
    assert {"mt-llama-7b", "mt-llama-7b-train-sh", "lora-8b", "smollm2-135m-p3", "smollm2-135m-p3-continued", "quickstart"} <= set(RECIPES)


RENDERED = ("trec", "wiki_qa", "dream")
"""Sets with rows that P3 rendered: beside the sampler's own, and instead of any."""


def p3_rows(folder: Path) -> Path:
    """Two prompts of each, by hand."""
    for name in RENDERED:
        for template in catalog()[name].p3_templates[:2]:
            path = folder / config_name(name, template) / "train.jsonl"
            path.parent.mkdir(parents=True)
            rows = [{"inputs": f"{name} asks by {template} what comes after {number}.", "targets": str(number + 1)} for number in range(20)]
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", RECIPES)
def test_a_shipped_recipe_runs(name: str, pico: Path, tmp_path: Path) -> None:
    shipped = resources.files("mtllama").joinpath(f"recipes/{name}.yaml").read_text(encoding="utf-8")
    p3 = [f"mixture.p3={p3_rows(tmp_path / 'p3')}"] if "mixture.p3=" in shipped else []  # a folder that its user is asked to set
    recipe = load_recipe(Path(name), ["mixture.dir=sampler", "mixture.eval_dir=sampler", f"model={pico}", *p3])
    recipe = replace(recipe, out=tmp_path / "out", train=replace(recipe.train, examples=3 * recipe.train.batch_size))
    if isinstance(recipe.mixture.tasks, dict):
        assert all(task.role == "train" for task in find_tasks(recipe.mixture.tasks))
        at_hand = {task.parent.name for task in sampler_dir().glob("*/train.jsonl")} | set(RENDERED if p3 else ())
        there = {task: weight for task, weight in recipe.mixture.tasks.items() if task in at_hand}
        assert len(there) > 10
        recipe = replace(recipe, mixture=replace(recipe.mixture, tasks=there))
    out = loop.run(recipe)
    manifest = folders.read_manifest(out) or {}
    assert manifest["totals"]["steps"] == 3 and manifest["totals"]["examples"] > recipe.train.batch_size
    assert manifest["recipe"]["train"]["lr"] == recipe.train.lr
    assert (out / adapter.WEIGHTS).is_file() == (recipe.lora is not None and not recipe.lora.merge) == (name == "lora-8b")
    drawn = {task for line in (out / journal.METRICS).read_text(encoding="utf-8").splitlines() for task in json.loads(line)["tasks"]}
    assert bool(p3) == name.startswith("smollm2-135m-p3") == bool(drawn & {"wiki_qa", "dream"})  # the sampler has no rows of these two


def test_the_two_recipes_of_mt_llama_have_its_numbers() -> None:
    readme, script = (load_recipe(Path(name)).train for name in ("mt-llama-7b", "mt-llama-7b-train-sh"))
    assert (readme.num_steps, readme.batch_size, readme.lr, readme.max_length, readme.weight_decay) == (300_000, 16, 5e-6, 2048, 0.0)
    assert (script.examples, script.lr, script.schedule, script.warmup_ratio) == (60_000_000, 2e-5, "cosine", 0.03)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("train.lr=.nan", "train.lr is nan; a finite number is needed"),
        ("train.lr=.inf", "train.lr is inf; a finite number is needed"),
        ("train.max_grad_norm=.nan", "train.max_grad_norm is nan"),
        ("train.spike=.nan", "train.spike is nan"),
        ("train.weight_decay=-1", "train.weight_decay is -1.0; it cannot be negative"),
        ("lora={alpha: .nan}", "lora.alpha positive"),
        ("out=/", "out is /; a folder that has a name is needed"),
    ],
)
def test_values_that_no_run_can_have_are_refused_where_the_recipe_is_read(word: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        load_recipe(Path("quickstart"), [word])
    assert said in str(error.value) and "\n" not in str(error.value)
