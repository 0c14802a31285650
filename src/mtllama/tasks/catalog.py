"""The catalogue: one YAML file a data set, in `catalog/`: family, role, where its rows are, metric, prompts."""

import difflib
import functools
import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
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
ANSWER_TOKENS, SUMMARY_TOKENS = 64, 256
"""Tokens that a generated answer may have: the original's number, and where it is a text of several sentences."""
SAMPLER = "sampler"
"""The name of the embedded data, wherever a data folder is asked for."""


@dataclass(frozen=True)
class Joined:
    """A set made of two others: the rows of one, some columns taken from the rows of the same `id` in the other."""

    rows: str
    """The set whose rows these are."""
    columns: tuple[str, ...]
    source: str
    """The set that the columns come from."""


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
    metrics: tuple[str, ...]
    """What an answer is judged by (names of `evaluate.metrics.METRICS`), the headline first."""
    split: str
    """The protocol's own split."""
    languages: tuple[str, ...] = ("en",)
    """The language, or two: the context's (and so the answer's), and that of the question asked about it."""
    joined: Joined | None = None
    """The two sets that this one is made of, where it has no rows of its own."""
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

    @property
    def metric(self) -> str:
        """The headline: the first of the metrics."""
        return self.metrics[0]

    @property
    def summary(self) -> bool:
        """Whether an answer is a text of some length: what ROUGE judges."""
        return self.metric.startswith("rouge")

    @property
    def max_new_tokens(self) -> int:
        """Tokens that a generated answer may have."""
        return SUMMARY_TOKENS if self.summary else ANSWER_TOKENS

    @property
    def stop(self) -> tuple[str, ...]:
        """What a generated answer is cut before; a summary may have several lines."""
        return () if self.summary else ("\n",)

    @property
    def validation(self) -> str | None:
        """The published split to choose a checkpoint by: `validation`, or its name here; None where there is none.

        A test split is never it, though the protocol's own split may be one.
        """
        names = ("validation", self.split, "val", "dev", "eval")
        return next((name for name in names if name in self.splits and not name.startswith(("train", "test"))), None)

    def template(self, name: str | None) -> Template:
        """The prompt called `name`, or the first one."""
        if name is None:
            return self.prompts[0]
        return find_template(self, self.prompts, name)

    def unanswered(self, row: Row) -> bool:
        """Whether a row has a place for accepted answers, and none there: a question that its text does not answer, as SQuAD 2's."""
        value: Any = row
        for key in () if self.references is None else self.references.split("."):
            if not isinstance(value, dict) or key not in value:
                return False
            value = value[key]
        return not value

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
    sources: tuple[str, ...] = ()
    """Further ones that columns were taken from."""

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

    Without a split asked for: the protocol's own, else validation, else test. Where `validation` is asked for and the set
    calls it otherwise (`val`, `dev_r1`), that name does too.
    """
    if task.joined is not None:
        return _joined(task, task.joined, data_dir, split)
    if split == "validation":
        splits = tuple(dict.fromkeys(("validation", task.validation or "validation")))
    else:
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
        if split == "validation" and task.validation is None:
            raise MissingDataError(
                f"{task.name}: its publisher has no validation split; pass --data-dir with a file {task.name}/validation.jsonl"
            )
        found, note, origin = (task.split if split is None else splits[-1]), "", task.location.hub_id
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


def _joined(task: Task, joined: Joined, data_dir: Path | None, split: str | None) -> Rows:
    first, second = (load_rows(catalog()[name], data_dir, split) for name in (joined.rows, joined.source))
    note = " ".join(dict.fromkeys(filter(None, (first.note, second.note))))
    rows = _Joined(first, second, joined.columns)
    return Rows(task, rows, first.split, note, first.origin, (second.origin,))


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


class _Joined(_View):
    """Rows with some columns of the rows of the same id in another file."""

    def __init__(self, first: Rows, second: Rows, columns: tuple[str, ...]) -> None:
        self.rows, self.others, self.columns = first.rows, second.rows, columns
        theirs = _ids(second)
        self.places = []
        for index, row_id in enumerate(_ids(first)):
            if row_id not in theirs:
                raise UserError(
                    f"{first.origin}, row {first.number(index)}: its id {row_id!r} is not in {second.origin}; both need the same rows"
                )
            self.places.append(theirs[row_id])

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, index: int) -> Row:
        other = self.others[self.places[index]]
        return {**self.rows[index], **{column: other[column] for column in self.columns}}


def _ids(rows: Rows) -> dict[str, int]:
    """Id -> place of each row."""
    places: dict[str, int] = {}
    for index, row in enumerate(rows.rows):
        row_id = row.get("id")
        if not isinstance(row_id, str) or row_id in places:
            fault = "has no id" if not isinstance(row_id, str) else f"has the id {row_id!r} of row {rows.number(places[row_id])}"
            raise UserError(f"{rows.origin}, row {rows.number(index)}: it {fault}; rows are joined by their ids")
        places[row_id] = index
    return places


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
            first: Task | None = None
            for values in _entries(yaml.load(file.read_text(encoding="utf-8"), loader)):
                if first is None:
                    task = first = config.build(Task, values, f"catalog/{file.name}")
                else:  # the prompts are the same ones, and most of the work
                    task = replace(config.build(Task, values | {"prompts": []}, f"catalog/{file.name}"), prompts=first.prompts)
                tasks[task.name] = task
    return tasks


def _entries(values: dict[str, Any]) -> list[dict[str, Any]]:
    """One entry as it stands, or one for each of its `languages`.

    `pairs` says in what an entry of two languages differs: `{lang}` is the context's, `{asked}` the question's.
    """
    languages, pairs = values.pop("languages", None), values.pop("pairs", None)
    if languages is None:
        return [values]
    words = languages if isinstance(languages, dict) else dict.fromkeys(languages)
    entries = [_filled(values, (lang,), {"lang": lang, "language": word or lang}) for lang, word in words.items()]
    if pairs is not None:
        for (lang, word), (asked, other) in itertools.permutations(words.items(), 2):
            given = {"lang": lang, "language": word or lang, "asked": asked, "asked_language": other or asked}
            entries.append(_filled(values | pairs, (lang, asked), given))
    return entries


def _filled(values: dict[str, Any], languages: tuple[str, ...], words: dict[str, str]) -> dict[str, Any]:
    """An entry with its languages filled into all but its prompts; sizes are found by language, or `ar-de` for both orders."""

    def fill(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: fill(item) for key, item in value.items()}
        if isinstance(value, list):
            return [fill(item) for item in value]
        return _PLACE.sub(lambda found: words[found[1]], value) if isinstance(value, str) else value

    key = "-".join(sorted(languages))
    return (
        values
        | {field: fill(values[field]) for field in ("name", "title", "location", "metrics", "joined") if field in values}
        | {"splits": {split: size[key] if isinstance(size, dict) else size for split, size in values["splits"].items()}}
        | {"languages": languages}
    )


_PLACE = re.compile(r"\{(lang|language|asked|asked_language)\}")

GROUPS: dict[str, Callable[[Task], bool]] = {
    "t0-train": lambda task: bool(task.p3_templates),
    "train": lambda task: task.role == "train",
    "cross-lingual": lambda task: len(task.languages) == 2,
}
"""Names that stand for several data sets: T0's training mixture, every training set of the catalogue, and the sets whose
contexts are asked about in another language."""


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
