"""What is asked: the rows of a suite's tasks, rendered through their templates."""

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mtllama.errors import MissingDataError, UserError
from mtllama.evaluate import protocols, suites
from mtllama.tasks.catalog import ANSWER_TOKENS, SAMPLER, Rows, Task, data_folder, find_tasks, load_rows
from mtllama.tasks.template import Template


@dataclass(frozen=True)
class EvalConfig:
    """What is measured."""

    suite: str = SAMPLER
    tasks: tuple[str, ...] = ()
    """Names out of the suite; none means all of them."""
    data_dir: Path | None = None
    split: str | None = None
    protocols: tuple[str, ...] = ()
    """None means the suite's."""
    limit: int | None = None
    """Rows a task: a seeded sample without replacement, in file order, the same for every model, template and protocol."""
    seed: int = 0
    templates: str | None = None
    """As `suites.pick_templates` has it; none means the suite's."""

    def __post_init__(self) -> None:
        suites.find_suite(self.suite)
        known = (*protocols.PROTOCOLS, protocols.PRIMARY, protocols.EVERY)
        for protocol in self.protocols:
            if protocol not in known:
                raise UserError(f"unknown protocol {protocol!r}; choose among {', '.join(known)}")
        if self.limit is not None and self.limit < 1:
            raise UserError(f"--limit is {self.limit}; at least 1 is needed")

    @property
    def asked_templates(self) -> str:
        """Which templates, the suite's where none are named."""
        return self.templates or suites.find_suite(self.suite).templates

    @property
    def asked_protocols(self) -> tuple[str, ...]:
        """Which protocols, the suite's where none are named."""
        return self.protocols or suites.find_suite(self.suite).protocols


@dataclass(frozen=True)
class Item:
    """One row of a task, rendered through one template."""

    task: str
    metrics: tuple[str, ...]
    template: str
    item_id: str
    row: int
    """Number of the row in its file."""
    inputs: str
    target: str
    choices: tuple[str, ...] | None
    references: tuple[str, ...]
    max_new_tokens: int = ANSWER_TOKENS
    stop: tuple[str, ...] = ("\n",)

    @property
    def gold(self) -> int | None:
        """Position of the right choice."""
        return self.choices.index(self.target) if self.choices else None

    @cached_property
    def sha256(self) -> str:
        """Digest of what is asked and what is right."""
        text = json.dumps([self.inputs, self.target, self.choices, self.references], ensure_ascii=False)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True)
class TaskItems:
    """The items of one task: row by row, and within a row template by template."""

    task: Task
    rows: Rows
    items: list[Item]
    protocols: tuple[str, ...]
    """Those of the protocols asked for that say something about the task."""
    skipped: int
    """Renderings that a template does not apply to, or of a row without a label or without an answer."""

    def of(self, protocol: str) -> list[Item]:
        """The items that a protocol says something about."""
        return [item for item in self.items if protocols.applies(protocol, item.task, item.template, choices=item.choices is not None)]

    @cached_property
    def sha256(self) -> str:
        """Digest of all that is asked: of the data, the templates, the seed and the limit."""
        named = "".join(f"{item.item_id}\n{item.template}\n{item.sha256}\n" for item in self.items)
        return hashlib.sha256(named.encode("utf-8", "surrogatepass")).hexdigest()


def load_items(config: EvalConfig) -> tuple[list[TaskItems], dict[str, str]]:
    """Items of every task whose data is there, and for the others why not, and what to fetch.

    A task that was named is required; one that is only part of the suite is left out if it lacks data, if a row of it is not as its prompts
    need it, or if none of the protocols applies to it.
    """
    if config.asked_templates.startswith(suites.PROMPTSOURCE):
        suites.promptsource_folder(config.asked_templates)
    find_tasks(config.tasks)
    folder = data_folder(config.data_dir if config.data_dir is not None else Path(SAMPLER) if config.suite == SAMPLER else None)
    found, missing, damaged = [], dict[str, str](), list[str]()
    for task in suites.suite_tasks(config.suite, config.tasks):
        templates = suites.pick_templates(config.asked_templates, task)
        if not templates:
            missing[task.name] = f"{task.name}: there is no template for it in {config.asked_templates}"
            continue
        try:
            rows = load_rows(task, folder, config.split or suites.find_suite(config.suite).split)
            found.append(_task_items(task, rows, templates, config))
        except UserError as error:
            if config.tasks:
                raise
            missing[task.name] = str(error)
            if not isinstance(error, MissingDataError):
                damaged.append(str(error))
    if not found:  # a file that is there and cannot be used says more than those that are not there
        raise UserError(f"no task of the suite {config.suite} can be measured: {next(iter([*damaged, *missing.values()]))}")
    return found, missing


def _task_items(task: Task, rows: Rows, templates: Sequence[Template], config: EvalConfig) -> TaskItems:
    items, skipped = [], 0
    for index in sample_indices(len(rows.rows), config.limit, f"{config.seed}/{task.name}"):
        row = rows.rows[index]
        if task.unanswered(row):
            skipped += len(templates)
            continue
        for template in templates:
            example = rows.render(index, template, seed=config.seed)
            if example is None:
                skipped += 1
                continue
            references: tuple[str, ...] = (example.targets,)
            if example.choices is None and template.metadata.original_task:
                references = task.row_references(row, example)
            where = (task.name, task.metrics, template.name, rows.row_id(index), rows.number(index))
            texts = (example.inputs, example.targets, example.choices, references)
            items.append(Item(*where, *texts, task.max_new_tokens, task.stop))
    if not items:
        raise UserError(f"{rows.origin}: no row has a label or an answer, so {task.name} cannot be judged; use another --split")
    choices = any(item.choices for item in items)
    wanted = protocols.resolve(config.asked_protocols, choices=choices)
    loaded = TaskItems(task, rows, items, wanted, skipped)
    usable = tuple(name for name in wanted if loaded.of(name))
    if not usable:
        advice = "add primary to --protocol" if choices else "it has no choices: add generate to --protocol"
        raise UserError(f"{task.name}: the protocol {', '.join(wanted)} applies to none of its items; {advice}")
    return TaskItems(task, rows, items, usable, skipped)


def sample_indices(n: int, limit: int | None, seed: str) -> list[int]:
    """A seeded sample of row numbers without replacement, in file order."""
    if limit is None or limit >= n:
        return list(range(n))
    return sorted(random.Random(seed).sample(range(n), limit))
