"""Suites: which tasks, asked through which templates, judged by which protocols. All of them stand here."""

import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mtllama.errors import UserError
from mtllama.evaluate.protocols import PRIMARY, PROTOCOLS, RANKS
from mtllama.tasks.catalog import SAMPLER, Task, catalog, find_template
from mtllama.tasks.promptsource import read_templates, templates_folder
from mtllama.tasks.template import Template

FIRST, OWN, ALL = "mt-llama", "own", "all"
PROMPTSOURCE = "promptsource:"
_OURS = "ours_"
"""How the catalogue's prompts of this project's own begin."""


@dataclass(frozen=True)
class Suite:
    """A group of tasks that are measured together, and how they are asked and judged where nothing else is said."""

    tasks: tuple[str, ...]
    """Names, or patterns of names (`xnli-*`)."""
    templates: str = FIRST
    protocols: tuple[str, ...] = PROTOCOLS
    takes: Callable[[Task], bool] = lambda task: True
    """Which of them, where a pattern says too much."""
    split: str | None = None
    """The split that is read; none: the protocol's own of each task."""


_MT_LLAMA = ("sst2", "openbookqa", "copa", "winogrande", "wic", "mnli", "rte")
SUITES = {
    SAMPLER: Suite(("squad", *_MT_LLAMA)),
    "mt-llama": Suite(("squad", "xquad-en", "tydiqa-en", "mlqa-en", *_MT_LLAMA)),
    "mt-llama-multilingual": Suite(
        ("xquad-*", "tydiqa-*", "mlqa-*", "pawsx-*", "xnli-*", "xcopa-*", "xstorycloze-*", "xwinograd-*", "marc-*"),
        takes=lambda task: len(task.languages) == 1,
    ),
    "cross-lingual": Suite(("xquad-*", "mlqa-*"), takes=lambda task: len(task.languages) == 2),
    "t0": Suite(
        ("rte", "cb", "anli_r1", "anli_r2", "anli_r3", "wsc", "winogrande", "wic", "hellaswag", "copa", "story_cloze"),
        templates=PROMPTSOURCE,
        protocols=RANKS,
    ),
    "train-validation": Suite(("*",), protocols=(PRIMARY,), takes=lambda task: task.role == "train", split="validation"),
}
"""`sampler` reads the embedded data, the others real sets."""


def find_suite(name: str) -> Suite:
    """A suite by name."""
    if name not in SUITES:
        raise UserError(f"unknown suite {name!r}; choose one of {', '.join(SUITES)}")
    return SUITES[name]


def suite_tasks(name: str, only: Sequence[str] = ()) -> list[Task]:
    """The tasks of a suite, or some of them by name, in the suite's order."""
    suite, known = find_suite(name), catalog()
    found: dict[str, Task] = {}
    for pattern in suite.tasks:
        for task in fnmatch.filter(known, pattern):
            if suite.takes(known[task]):
                found[task] = known[task]
    for each in only:
        if each not in found:
            raise UserError(f"{each} is not in the suite {name}; it has: {', '.join(found)}")
    return [task for task in found.values() if not only or task.name in only]


def pick_templates(words: str, task: Task) -> tuple[Template, ...]:
    """The templates that a task is asked through; none where those that were asked for do not have it.

    `mt-llama`: MT-LLaMA's prompt, or the catalogue's first one where it has none; `own`: the catalogue's own ones; `all`: both;
    `promptsource:PATH`: every template of a promptsource checkout that asks the original task; else names with commas between.
    Only prompts that ask for what the set's answers are answers to are taken, but for those that are named.
    """
    if words == FIRST:
        return task.prompts[:1]
    if words in (OWN, ALL):
        original = [prompt for prompt in task.prompts if prompt.metadata.original_task]
        return tuple(prompt for prompt in original if words == ALL or prompt.name.startswith(_OURS))
    if words.startswith(PROMPTSOURCE):
        folder = promptsource_folder(words)
        found = read_templates(folder, task.promptsource) if task.promptsource else ()
        return tuple(template for template in found if template.metadata.original_task)
    return tuple(find_template(task, task.prompts, name) for name in words.split(","))


def promptsource_folder(words: str) -> Path:
    """The folder that `promptsource:PATH` names."""
    path = words.removeprefix(PROMPTSOURCE)
    if not path:
        raise UserError("these tasks are asked through promptsource's templates: pass --templates promptsource:PATH, or --templates all")
    templates_folder(folder := Path(path).expanduser())
    return folder
