"""The whole job on the embedded data and the small base model, step by step, resumable, with a plan one can see."""

import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from mtllama import config, folders
from mtllama.errors import UserError
from mtllama.evaluate import protocols, report, runner
from mtllama.evaluate.items import EvalConfig
from mtllama.model.convert import NAME
from mtllama.model.engine import Engine
from mtllama.model.find import find_model
from mtllama.model.load import load_model
from mtllama.progress import say
from mtllama.serve.chat import EXAMPLES, Chat
from mtllama.train import loop
from mtllama.train.recipe import Recipe, load_recipe
from mtllama.weights import delta
from mtllama.weights.restore import apply, open_target

RECIPE = "quickstart"
"""Name of the shipped recipe."""
STATE = "seconds.json"
"""Seconds that each step took."""


@dataclass(frozen=True)
class Step:
    """One line of the plan: done when its output is there, and never done twice."""

    title: str
    output: Path
    make: Callable[[], object]


def run(out: Path, *, overwrite: bool = False, base: str = NAME, recipe_overrides: tuple[str, ...] = ()) -> None:
    """Run what is not done yet of the whole job in the folder `out`.

    The folder is the quickstart's own: one that holds anything else is refused without `overwrite`.
    """
    recipe = load_recipe(Path(RECIPE), (f"model={json.dumps(base)}", *recipe_overrides))
    recipe = replace(recipe, out=out / "tuned")
    state = _claim(out, recipe, overwrite=overwrite)
    steps = _plan(out, recipe, base)
    say(f"quickstart in {out}: {len(steps)} steps, each kept when it is done")
    for number, step in enumerate(steps, start=1):
        mark = "done" if step.output.exists() else "to do"
        say(f"  {number}. {step.title} [{mark}]")
    for number, step in enumerate(steps, start=1):
        if step.output.exists():
            continue
        say(f"{number}/{len(steps)} {step.title} ...")
        start = time.monotonic()
        step.make()
        state[step.title] = round(time.monotonic() - start, 1)
        folders.write_json(out / STATE, state)
        say(f"{number}/{len(steps)} done in {state[step.title]:.0f} s")
    _show(out, base, sum(state.values()))


def _claim(out: Path, recipe: Recipe, *, overwrite: bool) -> dict[str, float]:
    """The seconds of the steps done so far; a folder of something else, or of another recipe, is refused."""
    if out.is_dir() and any(out.iterdir()):
        known = folders.read_manifest(out)
        same = known is not None and known.get("stage") == "quickstart" and known.get("recipe") == _plain(recipe)
        if same and not overwrite:
            return dict(folders.read_json(out / STATE)) if (out / STATE).is_file() else {}
        if not overwrite:
            what = "a quickstart by another recipe" if known else "other files"
            raise UserError(f"{out} holds {what}; choose another --out, or pass --overwrite to replace it")
        if known is None or known.get("stage") != "quickstart":
            raise UserError(f"{out} is not a quickstart's folder, so it is not removed; choose another --out")
        folders.remove(out)
    with folders.explained(out):
        out.mkdir(parents=True, exist_ok=True)
        folders.write_manifest(out, "quickstart", recipe=_plain(recipe))
    return {}


def _plain(recipe: Recipe) -> object:
    """The recipe as it reads back from JSON."""
    return json.loads(json.dumps(config.to_dict(recipe)))


def _plan(out: Path, recipe: Recipe, base: str) -> list[Step]:
    tuned, delta_dir, restored = out / "tuned", out / "delta", out / "restored"

    def evaluate(folder: Path, name: str) -> None:
        engine = Engine(load_model(find_model(name), format=recipe.format))
        # Choices are ranked and questions answered in text; the other combinations are `mtllama eval`'s to show.
        runner.evaluate(engine, EvalConfig(protocols=(protocols.PRIMARY,)), folder)

    def show_chat() -> None:
        chat = Chat(Engine(load_model(find_model(str(restored)))), max_new_tokens=64)
        lines = []
        for title, text in EXAMPLES:
            answer = "".join(chat.answer(text))
            chat.history.clear()
            lines.append(f"# {title}\n{text}\n-> {answer}\n")
        folders.write_text(out / "chat.txt", "\n".join(lines))

    def base_folder() -> Path:
        return find_model(base).folder

    def restore() -> None:
        apply(open_target(base_folder(), [delta_dir]), restored, base_folder(), delta_dir)

    return [
        Step("evaluate the base model", out / "eval-base", lambda: evaluate(out / "eval-base", base)),
        Step(f"train it on the sampler, {recipe.train.examples} examples", tuned, lambda: loop.run(recipe)),
        Step("make the delta", delta_dir, lambda: delta.make(base_folder(), tuned, delta_dir, base_name=find_model(base).name)),
        Step("restore the tuned model from base and delta", restored, restore),
        Step("evaluate the restored model", out / "eval-tuned", lambda: evaluate(out / "eval-tuned", str(restored))),
        Step("write the report", out / "report", lambda: report.write_report([out / "eval-base", out / "eval-tuned"], out / "report")),
        Step("ask it the sample dialogues", out / "chat.txt", show_chat),
    ]


def _show(out: Path, base: str, seconds: float) -> None:
    print(report.table([runner.read_run(out / name)[0] for name in ("eval-base", "eval-tuned")]))
    print()
    for sentence in folders.read_json(out / "report" / "comparison.json")["headline"]:
        print(sentence)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "linux" else 1e9)
    print(f"\nthe steps took {seconds / 60:.1f} minutes; peak memory {peak:.1f} GB in this run")
    for what, path in (
        ("tuned model", "tuned"),
        ("delta", "delta"),
        ("restored model", "restored"),
        ("report", "report/report.html"),
        ("sample dialogues", "chat.txt"),
    ):
        print(f"{what:<17} {out / path}")
    command = _command()
    print("\nto go on:")
    print(f"  {command} chat --base {base} --delta {out / 'delta'}")
    print(f"  {command} eval {out / 'tuned'} --suite sampler --protocol all --out {out / 'eval-both'}")
    print(f"  {command} mix plan quickstart")


def _command() -> str:
    """How the reader can type this command: by its path where its environment is not active."""
    beside = Path(sys.executable).with_name("mtllama")
    return "mtllama" if shutil.which("mtllama") or not beside.exists() else os.path.relpath(beside)
