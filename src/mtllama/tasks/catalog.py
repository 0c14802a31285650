"""The catalogue: one YAML file a data set, in `catalog/`: family, role, where its rows are, metric, prompts."""

import difflib
import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal, overload

import yaml
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mtllama import config
from mtllama.errors import MissingDataError, UserError
from mtllama.tasks import source
from mtllama.tasks.files import read_rows
from mtllama.tasks.source import Location, Row
from mtllama.tasks.template import Example, Template

Role = Literal["train", "unseen data set", "unseen task"]
HIDDEN, LABELS = -1, ("label", "coarse_label")
"""A label that was withheld (in published test splits), and the columns where it may stand: such a row is asked nothing."""
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
    splits: dict[str, int]
    """Published splits and their numbers of rows."""
    columns: tuple[str, ...]
    """Columns that the prompts need."""
    passages: tuple[str, ...]
    """Columns whose text makes a row what it is (context, question, document): where the same text is looked for in two sets."""
    prompts: tuple[Template, ...]
    licence: str
    metric: Literal["accuracy", "f1", "rouge"]
    split: str
    """The protocol's own split."""
    references: str | None = None
    """Path to the accepted answers in a row (`answers.text`), for metrics with several; else the target."""
    derive: dict[str, str] = field(default_factory=dict)
    """Columns that are computed, as Jinja expressions over the others, for rows that lack one of them."""
    promptsource: str | None = None
    """Folder of the set among promptsource's templates: `<dataset>[/<subset>]`."""
    p3_templates: tuple[str, ...] = ()
    """The templates that T0's training mixture asks this set through; empty where it is not part of it."""
    p3_rows: dict[str, int] = field(default_factory=dict)
    """Training rows in P3 of each template that does not apply to every row of the set."""

    def template(self, name: str | None) -> Template:
        """The prompt called `name`, or the first one."""
        if name is None:
            return self.prompts[0]
        return find_template(self, self.prompts, name)

    def row_references(self, row: Row, example: Example) -> tuple[str, ...]:
        """All accepted answers of a row."""
        if self.references is None:
            return (example.targets,)
        value: Any = row
        for key in self.references.split("."):
            value = value[key]
        return tuple(dict.fromkeys(value))


def find_template(task: Task, templates: Sequence[Template], name: str) -> Template:
    """The one of `templates` that is called `name`."""
    for template in templates:
        if template.name == name:
            return template
    raise UserError(f"{task.name} has no template {name!r}; it has: {', '.join(t.name for t in templates)}")


@dataclass(frozen=True)
class Rows:
    """The rows of one split, and where they came from."""

    task: Task
    rows: Sequence[Row]
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
        row = self.rows[index]
        if not template.lenient and any(row.get(column) == HIDDEN for column in LABELS):
            return None
        try:
            return template.render(row, task=self.task.name, row_id=str(self.number(index)), seed=seed)
        except UserError as error:
            raise UserError(f"{self.origin}: {error}") from None

    def number(self, index: int) -> int:
        """The number of a row in its file, which may hold other sub-sets as well."""
        return self.rows.number(index) if isinstance(self.rows, _View) else index


def load_rows(task: Task, data_dir: Path | None, split: str | None = None) -> Rows:
    """Rows of `task`: from `data_dir` if given, else from the hub.

    Without a split asked for: the protocol's own, else validation, else test.
    """
    splits = (split,) if split else tuple(dict.fromkeys((task.split, "validation", "test")))
    rows: Sequence[Row]
    if data_dir is not None:
        file = source.find_file(task.name, task.location, data_dir, splits)
        if file is None:
            raise MissingDataError(
                f"{task.name}: no file for the split {' or '.join(splits)} in {data_dir}, such as {task.name}/{splits[0]}.jsonl"
            )
        rows, found, note, origin = read_rows(file.path), file.split, file.note, str(file.path)
        if len(rows) and task.location.local_prefix and file.shared:
            rows = _Chosen(rows, task.location.local_prefix)
            if not len(rows):
                raise MissingDataError(f"{task.name}: no file for the split {file.split}: {origin} has no row of this sub-set")
    else:
        found, note, origin = split or task.split, "", task.location.hub_id
        rows = source.read_hub(task.name, task.location, found)
        if task.location.hub_prefix:
            rows = _Chosen(rows, task.location.hub_prefix)
    if not len(rows):
        raise UserError(f"{origin} has no rows")
    if task.derive:
        rows = _Derived(rows, task.derive)
    first = rows[0]
    missing = [column for column in task.columns if column not in first]
    if missing:
        raise UserError(f"{origin}: the column {missing[0]!r} is missing; {task.name} has the columns {', '.join(task.columns)}")
    return Rows(task, rows, found, note, origin)


class _View(Sequence[Row]):
    """Rows made of other rows when they are asked for."""

    rows: Sequence[Row]

    def number(self, index: int) -> int:
        """The number of the row at `index` in its file."""
        return self.rows.number(index) if isinstance(self.rows, _View) else index

    def row(self, index: int) -> Row:
        """The row at `index`."""
        raise NotImplementedError

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        return [self.row(each) for each in range(*index.indices(len(self)))] if isinstance(index, slice) else self.row(index)


class _Chosen(_View):
    """The rows of one sub-set of a file that holds several."""

    def __init__(self, rows: Sequence[Row], prefix: dict[str, str]) -> None:
        self.rows = rows
        ((column, start),) = prefix.items()
        self.places = [place for place, row in enumerate(rows) if str(row.get(column, "")).startswith(start)]

    def __len__(self) -> int:
        return len(self.places)

    def row(self, index: int) -> Row:
        return self.rows[self.places[index]]

    def number(self, index: int) -> int:
        return self.places[index]


class _Derived(_View):
    """Rows with further columns, computed from their own."""

    def __init__(self, rows: Sequence[Row], derive: dict[str, str]) -> None:
        self.rows, self.derive = rows, derive

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, index: int) -> Row:
        row = self.rows[index]
        if all(column in row for column in self.derive):
            return row
        try:
            derived = {column: _expression(source)(**row) for column, source in self.derive.items()}
        except Exception as error:  # a row of another shape than the published one
            raise UserError(
                f"row {index}: the column {', '.join(self.derive)} cannot be derived ({error}); columns: {', '.join(row)}"
            ) from None
        return {**row, **{column: value for column, value in derived.items() if value is not None}}


@functools.cache
def _expression(source: str) -> Callable[..., Any]:
    compiled: Callable[..., Any] = ImmutableSandboxedEnvironment().compile_expression(source)
    return compiled


@functools.lru_cache(maxsize=1)
def catalog() -> dict[str, Task]:
    """All data sets of the catalogue by name."""
    tasks = {}
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    for file in sorted(resources.files("mtllama.tasks").joinpath("catalog").iterdir(), key=lambda f: f.name):
        if file.name.endswith(".yaml"):
            for values in _languages(yaml.load(file.read_text(encoding="utf-8"), loader)):
                task = config.build(Task, values, f"catalog/{file.name}")
                tasks[task.name] = task
    return tasks


def _languages(values: dict[str, Any]) -> Iterable[dict[str, Any]]:
    """One entry as it stands, or one for each of its `languages`, with the language filled into name, title and location."""
    languages = values.pop("languages", None)
    if languages is None:
        return [values]
    words = languages if isinstance(languages, dict) else dict.fromkeys(languages)

    def fill(value: Any, lang: str, word: str) -> Any:
        if isinstance(value, dict):
            return {key: fill(item, lang, word) for key, item in value.items()}
        if isinstance(value, list):
            return [fill(item, lang, word) for item in value]
        return value.replace("{lang}", lang).replace("{language}", word) if isinstance(value, str) else value

    return [
        values
        | {key: fill(values[key], lang, word or lang) for key in ("name", "title", "location")}
        | {"splits": {split: size[lang] if isinstance(size, dict) else size for split, size in values["splits"].items()}}
        for lang, word in words.items()
    ]


GROUPS: dict[str, Callable[[Task], bool]] = {
    "t0-train": lambda task: bool(task.p3_templates),
    "train": lambda task: task.role == "train",
}
"""Names that stand for several data sets: T0's training mixture, and every training set of the catalogue."""


def find_tasks(names: Iterable[str]) -> list[Task]:
    """Data sets by name, groups of them included; an unknown one is an error that names the nearest."""
    known, found = catalog(), dict[str, Task]()
    for name in names:
        if name in GROUPS:
            found.update({task.name: task for task in known.values() if GROUPS[name](task)})
        elif name in known:
            found[name] = known[name]
        else:
            near = difflib.get_close_matches(name, [*known, *GROUPS], n=1)
            raise UserError(f"unknown task {name!r}; {f'did you mean {near[0]}?' if near else 'see: mtllama tasks list'}")
    return list(found.values())


def sampler_dir() -> Path:
    """The folder of the embedded data."""
    return Path(str(resources.files("mtllama.data").joinpath("sampler")))


def data_folder(data_dir: Path | None) -> Path | None:
    """`sampler` is the embedded data, None the hub, anything else a folder."""
    return sampler_dir() if data_dir is not None and str(data_dir) == SAMPLER else data_dir
