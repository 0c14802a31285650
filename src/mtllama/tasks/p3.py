"""Rows that P3 has rendered already (Sanh et al. 2022), one set for each config: a data set asked through one prompt.

Three layouts are known, all below one folder:

* JSON lines with `inputs` and `targets`: `<config>/<split>.jsonl`, `<config>.<split>.jsonl`, `<config>.jsonl` or
  `p3_<config>_<split>.jsonl`, plain or gzipped. Where rows say their `task` and `template`, a file may hold several
  configs, and where they say their `split`, several splits. A file without a split in its name or rows is training data.
* parquet as on the hub: `<config>/<split>-00000-of-00001.parquet`, or `<config>/<split>/0000.parquet` (its automatic copies).
* TFRecord as P3 was published: `<config>/<split>.tfrecord-00000-of-00001`, with `stats.<split>.json` and `info.<split>.json`.
"""

import json
import operator
import os
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from mtllama.errors import UserError
from mtllama.progress import progress
from mtllama.tasks.files import Row, columns, read_rows
from mtllama.tasks.source import Location, read_hub
from mtllama.tasks.template import Example

HUB_ID = "bigscience/P3"

_TEXTS = ("inputs", "targets")
_NEEDED = ("inputs_pretokenized", "targets_pretokenized", "answer_choices", "is_correct")
"""Columns of P3's own files that make an example; what they call `inputs` and `targets` are token ids of T5."""
_SPLIT = r"(?:train|validation|dev|test)(?:_r\d)?"
_ROWS = re.compile(r"(?P<stem>.+)\.jsonl(?:\.gz)?")
_P3_NAME = re.compile(rf"(?:p3_(?P<config>.+)|p3\w*)_(?P<split>{_SPLIT})")
_TFRECORD = re.compile(r"(?P<split>\w+)\.tfrecords?(?:-(?P<number>\d+)-of-(?P<count>\d+))?(?:\.gz)?")
_PARQUET = re.compile(r"(?P<split>\w+?)(?:-(?P<number>\d+)-of-(?P<count>\d+))?\.parquet")
_NUMBERED = re.compile(r"(?P<number>\d+)\.parquet")


def config_name(prefix: str, template: str) -> str:
    """P3's name of a data set (`dataset` or `dataset_subset`) asked through a template of promptsource."""
    return clean(f"{prefix}_{template}")


def clean(name: str) -> str:
    """A name as P3 writes it."""
    return re.sub(r"[^\w.]+", "_", name)


@dataclass(frozen=True)
class Prompted:
    """The rendered rows of one config."""

    config: str
    rows: Sequence[Row]
    """Only those that count: of a row for each choice, the one with the correct choice."""
    origin: str
    """File, folder of shards, or hub id."""
    task: str
    """The data set, where the rows say it; else the config, as the name alone does not tell the two parts apart."""
    template: str
    note: str = ""
    """What the user must know if `config` turns out to be no config of P3."""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def sources(self) -> tuple[str, ...]:
        """Its files, or hub id."""
        return self.rows.names if isinstance(self.rows, _Rows) else (self.origin,)

    def example(self, index: int) -> Example | None:
        """Row `index` with its texts as they are; None where the target is empty, so the prompt does not apply."""
        row = self.rows[index]
        inputs, targets = (self._text(row, name, index) for name in _TEXTS)
        if not targets.strip():
            return None
        return Example(inputs, targets, self._choices(row, targets, index), self.task, self.template)

    def _text(self, row: Row, name: str, index: int) -> str:
        pretokenized = f"{name}_pretokenized"
        column = pretokenized if pretokenized in row else name
        if column not in row:
            has = ", ".join(map(str, row)) or "none"
            raise UserError(f"{self._where(index)}: the column {name!r} (or {pretokenized!r}) is missing; its columns: {has}")
        if not isinstance(row[column], str):
            raise UserError(f"{self._where(index)}: {column!r} is not text but {type(row[column]).__name__}; mend or remove the row")
        return str(row[column])

    def _choices(self, row: Row, targets: str, index: int) -> tuple[str, ...] | None:
        choices = row.get("answer_choices")
        if not choices:
            return None
        if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
            raise UserError(f"{self._where(index)}: 'answer_choices' is not a list of texts; mend or remove the row")
        # A prompt may wrap the choice in further words (IMDB's "Negation template"): then the choices are not what is answered.
        return tuple(choices) if targets.strip() in (choice.strip() for choice in choices) else None

    def _where(self, index: int) -> str:
        return self.rows.where(index) if isinstance(self.rows, _Rows) else f"{self.origin}, row {index}"


def find(folder: Path, split: str = "train") -> dict[str, Prompted]:
    """The configs that have rows of `split` below `folder`, by name. Files of rows that are not rendered are passed over.

    Only files that hold several configs are read here; the others are opened when their rows are first counted or asked for,
    so what is broken in a file is an error only to those who use it. A file of JSON lines whose name is no config of P3 and
    whose rows do not say their prompts either (Muennighoff/P3's `p31t0_train.jsonl`) cannot be weighted by prompt: it is one
    set, named after the file, and its `note` says so.
    """
    if not folder.is_dir():
        raise UserError(f"P3 folder {folder} does not exist; check the path")
    found: dict[str, Prompted] = {}
    for prompted in _find(folder, split):
        other = found.setdefault(prompted.config, prompted)
        if other is not prompted:
            raise UserError(f"P3 config {prompted.config} stands in two places: {other.origin} and {prompted.origin}; keep one of them")
    return dict(sorted(found.items()))


def from_hub(config: str, split: str = "train") -> Prompted:
    """The rows of one config from the Hugging Face hub (or its local cache)."""
    rows = read_hub(config, Location(HUB_ID, config, "refs/convert/parquet"), split)
    return Prompted(config, _Rows((f"{HUB_ID} {config}",), [rows]), HUB_ID, config, config)


# --- which files hold what


def _find(folder: Path, split: str) -> Iterator[Prompted]:
    shards: dict[tuple[str, Path], list[_Shard]] = {}
    for path in _walk(folder):
        parent = path.parent
        if match := _ROWS.fullmatch(path.name):
            yield from _lines(path, match["stem"], split)
        elif (match := _NUMBERED.fullmatch(path.name)) and parent.name == split:
            shards.setdefault((_name(parent.parent), parent), []).append(_Shard(int(match["number"]), None, path))
        elif (match := _PARQUET.fullmatch(path.name) or _TFRECORD.fullmatch(path.name)) and match["split"] == split:
            number, count = match["number"], match["count"]
            shards.setdefault((_name(parent), parent), []).append(_Shard(int(number or 0), int(count) if count else None, path))
    for (config, parent), entries in shards.items():
        if _is_rendered(entries[0].path):
            yield _join(config, parent, entries, split)


def _walk(folder: Path) -> Iterator[Path]:
    """Files below a folder, through links, in a fixed order; hidden folders (`.git`, `.cache`) left out."""
    seen = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        folders[:] = [] if real in seen else sorted(each for each in folders if not each.startswith("."))
        if real not in seen:
            seen.add(real)
            yield from (Path(place, each) for each in sorted(files))


def _name(folder: Path) -> str:
    return os.path.basename(os.path.abspath(folder))


def _columns(path: Path) -> tuple[str, ...] | None:
    """None where they cannot be had: the file is then taken for what its name says, and is an error to those who use it."""
    try:
        return columns(path)
    except UserError:
        return None


def _is_rendered(path: Path) -> bool:
    if not path.name.endswith(".parquet"):
        return True
    names = _columns(path)
    return names is None or not {*_TEXTS, *_NEEDED}.isdisjoint(names)


@dataclass(frozen=True)
class _Shard:
    number: int
    count: int | None
    """The number of shards, where the name says it."""
    path: Path


def _join(config: str, folder: Path, shards: list[_Shard], split: str) -> Prompted:
    """Several files of a config as one sequence."""
    shards = sorted(shards, key=lambda shard: (shard.number, shard.path))
    for shard, following in pairwise(shards):
        if shard.number == following.number:
            raise UserError(f"P3 config {config}: {shard.path} and {following.path} are the same shard; keep one of them")
    stated = (_stated(folder / f"info.{split}.json", "num_shards"), *(shard.count for shard in shards))
    for count in {count for count in stated if count is not None} or {len(shards)}:
        if [shard.number for shard in shards] != list(range(count)):
            there = ", ".join(str(shard.number) for shard in shards)
            raise UserError(f"{folder}: the split {split} has {count} shards, counted from 0; there are {there}; fetch them again")
    origin = str(shards[0].path) if len(shards) == 1 else str(folder / f"{split} ({len(shards)} shards)")
    rows = _Rows([str(shard.path) for shard in shards], expected=_stated(folder / f"stats.{split}.json", "examples"))
    return Prompted(config, rows, origin, config, config)


def _stated(path: Path, key: str) -> int | None:
    """A number that stands beside TFRecords, as seqio writes it."""
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_bytes()).get(key)
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path} cannot be read ({' '.join(str(error).split())}); fetch it again") from error
    return value if isinstance(value, int) else None


def _lines(path: Path, stem: str, split: str) -> Iterator[Prompted]:
    """The configs of a file of JSON lines."""
    base, _, last = stem.rpartition(".")
    config, said = stem, None
    if stem == split or re.fullmatch(_SPLIT, stem):
        config, said = _name(path.parent), stem
    elif match := _P3_NAME.fullmatch(stem):
        config, said = match["config"] or stem, match["split"]
    elif base and (last == split or re.fullmatch(_SPLIT, last)):
        config, said = base, last
    if said not in (None, split):
        return
    names = _columns(path)
    if names and {*_TEXTS, *_NEEDED}.isdisjoint(names):
        return
    if said is None and split != "train" and "split" not in (names or ()):
        return
    if names and not {"task", "template", "split"}.isdisjoint(names):
        yield from _group(path, config, split)
    else:
        note = f"{path} does not say which prompts made its rows: it is one set, {config}, and has one weight as a whole"
        yield Prompted(config, _Rows([str(path)]), str(path), config, config, note)


def _group(path: Path, config: str, split: str) -> Iterator[Prompted]:
    """The configs of a file whose rows say what they are."""
    rows = read_rows(path)
    groups: dict[str, tuple[str, str, list[int]]] = {}
    with progress(f"prompts in {path.name}", len(rows)) as advance:
        for place, row in enumerate(rows):
            if place % _STEP == 0:
                advance(min(_STEP, len(rows) - place))
            if row.get("split", split) != split:
                continue
            task, template, name = row.get("task", config), row.get("template", ""), config
            if not isinstance(task, str) or not isinstance(template, str):
                raise UserError(f"{path}, row {place}: 'task' and 'template' must be text; mend or remove the row")
            if template:
                name = config_name(task, template)
            groups.setdefault(name, (task, template, []))[2].append(place)
    for name, (task, template, places) in groups.items():
        at = numpy.array(places, numpy.int64)
        yield Prompted(name, _Rows([str(path)], [rows], at), str(path), clean(task) if template else name, template or name)


# --- rows


class _Rows(Sequence[Row]):
    """Rows of files that follow one another, or some of them. The files are opened when the rows are first needed."""

    def __init__(
        self,
        names: Sequence[str],
        opened: Sequence[Sequence[Row]] = (),
        places: NDArray[numpy.int64] | None = None,
        expected: int | None = None,
    ) -> None:
        """`names`: paths, or with `opened` what to call the files; `places`: the rows that are meant, over all files."""
        self.names, self._opened, self._within, self._expected = tuple(names), opened, places, expected

    @cached_property
    def _files(self) -> Sequence[Sequence[Row]]:
        files = self._opened or [_open(Path(name)) for name in self.names]
        total = sum(len(file) for file in files)
        if self._expected is not None and total != self._expected:
            raise UserError(f"{self.names[0]}: {total} records, but the stats file beside it says {self._expected}; fetch both again")
        return files

    @cached_property
    def _bounds(self) -> list[int]:
        return list(accumulate((len(file) for file in self._files), initial=0))

    @cached_property
    def _places(self) -> Sequence[int] | NDArray[numpy.int64]:
        within = range(self._bounds[-1]) if self._within is None else self._within
        if not len(within) or "is_correct" not in self._at(int(within[0])):
            return within
        places = []
        with progress(f"correct choices in {self.names[0]}", len(within)) as advance:
            for number, place in enumerate(within):
                if number % _STEP == 0:
                    advance(min(_STEP, len(within) - number))
                correct = self._at(int(place)).get("is_correct")
                if correct not in (0, 1):
                    raise UserError(f"{self._say(int(place))}: 'is_correct' is {correct!r}; true or false is needed")
                if correct:
                    places.append(place)
        return numpy.array(places, numpy.int64)

    def _locate(self, place: int) -> tuple[int, int]:
        number = bisect_right(self._bounds, place) - 1
        return number, place - self._bounds[number]

    def _at(self, place: int) -> Row:
        number, row = self._locate(place)
        return self._files[number][row]

    def _say(self, place: int) -> str:
        number, row = self._locate(place)
        return f"{self.names[number]}, row {row}"

    def where(self, index: int) -> str:
        """File and row, for messages."""
        return self._say(int(self._places[index]))

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._at(int(place)) for place in self._places[index]]
        return self._at(int(self._places[operator.index(index)]))


_STEP = 1024
"""Rows between two signs of progress."""


def _open(path: Path) -> Sequence[Row]:
    raw = path.name.endswith(".parquet") and "inputs_pretokenized" not in columns(path)
    return read_rows(path, (*_TEXTS, *_NEEDED) if raw else _NEEDED)
