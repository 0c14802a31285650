"""The catalogue: one YAML file a data set, in `catalog/`: family, role, where its rows are, metric, prompts."""

import difflib
import functools
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

from mtllama import config
from mtllama.errors import UserError
from mtllama.tasks import source
from mtllama.tasks.source import Location, Row
from mtllama.tasks.template import Example, Template

Role = Literal["train", "unseen data set", "unseen task"]
SAMPLER = "sampler"
"""The name of the embedded data, wherever a data folder is asked for."""


@dataclass(frozen=True)
class Task:
    """A data set with its prompts: what is asked, where its rows are, how an answer is judged."""

    name: str
    title: str
    family: str
    role: Role
    location: Location
    columns: tuple[str, ...]
    prompts: tuple[Template, ...]
    licence: str
    metric: Literal["accuracy", "f1", "rouge"]
    split: str
    """The protocol's own split."""
    references: str | None = None
    """Path to the accepted answers in a row (`answers.text`), for metrics with several; else the target."""
    num_train: int | None = None
    """Rows of the published training split, for mixture rates without the data at hand."""

    def template(self, name: str | None) -> Template:
        """The prompt called `name`, or the first one."""
        if name is None:
            return self.prompts[0]
        for template in self.prompts:
            if template.name == name:
                return template
        raise UserError(f"{self.name} has no template {name!r}; it has: {', '.join(t.name for t in self.prompts)}")

    def row_references(self, row: Row, example: Example) -> tuple[str, ...]:
        """All accepted answers of a row."""
        if self.references is None:
            return (example.targets,)
        value: Any = row
        for key in self.references.split("."):
            value = value[key]
        return tuple(dict.fromkeys(value))


@dataclass(frozen=True)
class Rows:
    """The rows of one split, and where they came from."""

    task: Task
    rows: list[Row]
    split: str
    note: str
    origin: str
    """File name, or hub id."""

    def row_id(self, index: int) -> str:
        """The row's own id where it has one, else its number."""
        row = self.rows[index]
        for key in ("id", "idx"):
            if isinstance(row.get(key), str | int):
                return str(row[key])
        return str(index)

    def render(self, index: int, template: Template, *, seed: int = 0) -> Example | None:
        """Render row `index` with `template`; errors name file and row."""
        try:
            return template.render(self.rows[index], task=self.task.name, row_id=str(index), seed=seed)
        except UserError as error:
            raise UserError(f"{self.origin}: {error}") from None


def load_rows(task: Task, data_dir: Path | None, split: str | None = None) -> Rows:
    """Rows of `task`: from `data_dir` if given, else from the hub.

    Without a split asked for: the protocol's own, else validation, else test.
    """
    splits = (split,) if split else tuple(dict.fromkeys((task.split, "validation", "test")))
    if data_dir is not None:
        file = source.find_file(task.name, task.location, data_dir, splits)
        if file is None:
            raise UserError(
                f"{task.name}: no file for the split {' or '.join(splits)} in {data_dir}, such as {task.name}/{splits[0]}.jsonl"
            )
        rows, found, note, origin = source.read_rows(file.path), file.split, file.note, str(file.path)
    else:
        found, note, origin = split or task.split, "", task.location.hub_id
        rows = source.read_hub(task.name, task.location, found)
    if not rows:
        raise UserError(f"{origin} has no rows")
    missing = [column for column in task.columns if column not in rows[0]]
    if missing:
        raise UserError(f"{origin}: the column {missing[0]!r} is missing; {task.name} has the columns {', '.join(task.columns)}")
    return Rows(task, rows, found, note, origin)


@functools.lru_cache(maxsize=1)
def catalog() -> dict[str, Task]:
    """All data sets of the catalogue by name."""
    tasks = {}
    for file in sorted(resources.files("mtllama.tasks").joinpath("catalog").iterdir(), key=lambda f: f.name):
        if file.name.endswith(".yaml"):
            task = config.build(Task, yaml.safe_load(file.read_text(encoding="utf-8")), f"catalog/{file.name}")
            tasks[task.name] = task
    return tasks


def find_tasks(names: Iterable[str]) -> list[Task]:
    """Data sets by name; an unknown one is an error that names the nearest."""
    known, found = catalog(), []
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise UserError(f"unknown task {name!r}; {f'did you mean {near[0]}?' if near else 'see: mtllama tasks list'}")
        found.append(known[name])
    return found


def sampler_dir() -> Path:
    """The folder of the embedded data."""
    return Path(str(resources.files("mtllama.data").joinpath("sampler")))


def data_folder(data_dir: Path | None) -> Path | None:
    """`sampler` is the embedded data, None the hub, anything else a folder."""
    return sampler_dir() if data_dir is not None and str(data_dir) == SAMPLER else data_dir
