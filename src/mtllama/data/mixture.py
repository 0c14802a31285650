"""The mixture: a pure function of (settings, seed, index) -> Draw, on Grain.

Data sets are interleaved by exact whole-number rates: in every `sum of rates` draws each stream is drawn exactly as
often as its rate says. A set's rows are shuffled anew in every pass and covered once before any repeats, and its
prompts take turns over them. A prompt that asks only some rows (a `{% if %}` around its target) has a stream of its
own over those rows, so that it keeps its rate.
"""

import hashlib
import sys
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, cached_property
from pathlib import Path
from typing import Literal, TypeAlias

import grain
import numpy as np

from mtllama import folders
from mtllama.data import contamination
from mtllama.data.order import Interleave, Order
from mtllama.errors import MissingDataError, UserError
from mtllama.progress import progress
from mtllama.tasks import p3
from mtllama.tasks.catalog import GROUPS, Rows, Task, catalog, data_folder, find_tasks, load_rows
from mtllama.tasks.promptsource import TRUNCATE, read_templates, templates_folder
from mtllama.tasks.template import Example, Template

T0_CAP = 500_000
"""T0's bound on the size of a data set (Sanh et al. 2022, section 5)."""
PROMPTSOURCE = "promptsource:"
Places: TypeAlias = Sequence[int] | np.ndarray
"""Numbers of rows."""
Rule = Literal["t0-code", "t0-readme", "min-size", "weights"]


@dataclass(frozen=True)
class MixtureConfig:
    """Which data sets, asked how, at which rates."""

    dir: Path | None = None
    """`sampler` for the embedded data, a folder, or none for the hub."""
    tasks: dict[str, float] | tuple[str, ...] | None = None
    """Names of training sets or groups of them (`t0-train`), or a weight for each; none: every training set that is there."""
    templates: str = "own"
    """`own`: the catalogue's prompts; `promptsource:PATH`: those of a promptsource checkout or folder of templates; `p3`: the
    rows are rendered already (bigscience/P3 or a copy of it)."""
    p3: Path | None = None
    """Folder of rows that P3 rendered, drawn beside the rows in `dir`: a set's rate is shared by the numbers of rows of both."""
    truncate: int | None = TRUNCATE
    """Characters at which promptsource's templates cut a variable; none: never."""
    rule: Rule = "t0-code"
    """`t0-code`: each of a set's prompts counts the set's size, or 500,000 // prompts where that is over 500,000; `t0-readme`: the
    same number counts once for the whole set; `min-size`: the set counts min(size, 500,000); `weights`: the given weights."""
    split: str = "train"
    seed: int = 0
    allow_held_out: bool = False
    """Train on evaluation sets all the same."""
    decontaminate: bool = False
    """Drop training rows that share text with the evaluation sets (as `mix check` finds them)."""
    eval_dir: Path | None = None
    """Folder of the evaluation sets to keep apart; none: those in `dir`."""

    def __post_init__(self) -> None:
        if self.rule == "weights" and not isinstance(self.tasks, dict):
            raise ValueError("mixture.rule=weights needs mixture.tasks as a mapping of names to weights")
        if self.rule != "weights" and isinstance(self.tasks, dict):
            raise ValueError(
                f"mixture.tasks gives weights, which mixture.rule={self.rule} does not use; set mixture.rule=weights, or list the names"
            )
        if self.tasks is not None and not self.tasks:
            raise ValueError("mixture.tasks is empty; name at least one data set, or leave the key out to take every one that is there")
        if self.templates not in ("own", "p3") and not self.templates.startswith(PROMPTSOURCE):
            raise ValueError(f"mixture.templates is {self.templates!r}; choose own, p3, or promptsource:PATH")
        if self.p3 is not None and self.templates == "p3":
            raise ValueError(
                "mixture.p3 is a folder of rendered rows beside the rows in dir; with mixture.templates=p3, dir is that folder"
            )
        if self.truncate is not None and self.truncate < 1:
            raise ValueError(f"mixture.truncate is {self.truncate}; 1 or more is needed, or null")
        if self.seed < 0:
            raise ValueError(f"mixture.seed is {self.seed}; 0 or more is needed")
        for name, weight in (self.tasks if isinstance(self.tasks, dict) else {}).items():
            if not 0 < weight < float("inf"):
                raise ValueError(f"mixture.tasks.{name} is {weight}; a positive number is needed")
            if name in GROUPS:
                raise ValueError(f"mixture.tasks.{name} names a group of sets; weights are given set by set")

    def set_rate(self, task: Task, size: int, num_templates: int) -> Fraction:
        """The rate of a whole set of `size` rows that is asked through `num_templates` prompts."""
        if self.rule == "weights":
            assert isinstance(self.tasks, dict)
            return Fraction(str(self.tasks[task.name]))
        capped = size if size <= T0_CAP else T0_CAP // num_templates
        if self.rule == "t0-code":
            return Fraction(capped * num_templates)
        return Fraction(capped if self.rule == "t0-readme" else min(size, T0_CAP))


@dataclass(frozen=True)
class Draw:
    """What stands at one index of a mixture."""

    task: str
    family: str
    template: str
    row: int
    """Number of the row in its file."""
    turn: int
    """How often the stream's rows were covered before."""
    example: Example | None
    """None where the prompt does not apply to the row: such a draw is skipped and counted."""


class _Stream:
    """An endless series of draws; Grain takes it as a random-access source."""

    def __init__(self, task: str, family: str, templates: Sequence[str], rate: Fraction, seed: int) -> None:
        self.task, self.family, self.templates, self.rate = task, family, tuple(templates), rate
        self.seed = seed
        self._key = f"{seed}/{task}/{'|'.join(templates)}"

    @property
    def num_rows(self) -> int:
        """Rows that the stream covers."""
        raise NotImplementedError

    def __len__(self) -> int:
        return sys.maxsize

    @cached_property
    def order(self) -> Order:
        return Order(self.num_rows, self._key)

    def __getitem__(self, position: int) -> Draw:
        turn, place = self.order[int(position)]
        return self.draw(turn, place)

    def draw(self, turn: int, place: int) -> Draw:
        raise NotImplementedError


class _Turns(_Stream):
    """Rows through prompts that take turns, so that a row meets all of them in as many passes."""

    def __init__(self, rows: Rows, places: Places, prompts: Sequence[Template], rate: Fraction, seed: int) -> None:
        super().__init__(rows.task.name, rows.task.family, [prompt.name for prompt in prompts], rate, seed)
        self.rows, self.prompts, self.within = rows, prompts, places

    @cached_property
    def places(self) -> Places:
        """Numbers of the rows that are asked."""
        return self.within

    @property
    def num_rows(self) -> int:
        return len(self.places)

    def draw(self, turn: int, place: int) -> Draw:
        row = int(self.places[place])
        prompt = self.prompts[(row + turn) % len(self.prompts)]
        example = self.rows.render(row, prompt, seed=self.seed)
        return Draw(self.task, self.family, prompt.name, self.rows.number(row), turn, example)


class _Some(_Turns):
    """One prompt over the rows that it applies to. They are looked for when the stream is first drawn from."""

    @cached_property
    def places(self) -> Places:
        found, prompt = [], self.prompts[0]
        with progress(f"rows of {self.task} that {prompt.name!r} asks", len(self.within)) as advance:
            for place in self.within:
                if self.rows.render(place, prompt, seed=self.seed) is not None:
                    found.append(place)
                advance()
        # Where it asks none, its draws keep their places and are skipped, as the plan warns.
        return np.array(found, dtype=np.int64) if found else self.within


class _Rendered(_Stream):
    """Rows that P3 rendered."""

    def __init__(
        self, task: str, family: str, template: str, prompted: p3.Prompted, rate: Fraction, seed: int, dropped: Collection[int] = ()
    ) -> None:
        super().__init__(task, family, [template], rate, seed)
        self.prompted = prompted
        self.places: Places = [row for row in range(len(prompted)) if row not in dropped] if dropped else range(len(prompted))

    @property
    def num_rows(self) -> int:
        return len(self.places)

    def draw(self, turn: int, place: int) -> Draw:
        row = int(self.places[place])
        example = self.prompted.example(row)
        if example is not None:
            example = Example(example.inputs, example.targets, example.choices, self.task, self.templates[0])
        return Draw(self.task, self.family, self.templates[0], row, turn, example)


@dataclass(frozen=True)
class Part:
    """One data set of a mixture."""

    task: str
    family: str
    num_rows: int
    """Rows at hand, those that were dropped not counted."""
    rate: Fraction
    templates: tuple[str, ...]
    sources: tuple[str, ...]
    """Files, or hub ids, of its rows."""
    marks: str
    """A hash of what else decides which text is drawn: the prompts to the letter, the rows that are left out."""
    dropped: int = 0
    """Rows left out because they share text with an evaluation set."""
    rendered: bool = False
    """Its rows are P3's, beside those of the data set itself."""

    @property
    def name(self) -> str:
        """What to call it: a set has up to two parts."""
        return f"{self.task} (P3)" if self.rendered else self.task


class Mixture:
    """Random access to the endless stream of examples: `mixture.draw(index)`, or its example alone: `mixture[index]`."""

    def __init__(self, config: MixtureConfig) -> None:
        self.config = config
        self.missing: dict[str, str] = {}
        """What cannot be had of what was asked for (sets of a group, prompts of a set, prompts of rendered rows), and why."""
        self.streams: list[_Stream] = []
        self.parts: list[Part] = []
        if config.templates == "p3":
            self._read_p3()
        else:
            self._read_rows()
        self.interleave = Interleave([stream.rate for stream in self.streams])
        self.total_rate = sum((part.rate for part in self.parts), Fraction(0))
        self._mixed = grain.MapDataset.select_from_datasets([grain.MapDataset.source(stream) for stream in self.streams], self.interleave)

    def remarks(self) -> list[str]:
        """What whoever trains on the mixture should know: what is missing, left out, or held out and trained on all the same."""
        found = list(self.missing.values())
        for part in self.parts:
            task = catalog().get(part.task)
            if task is not None and task.role != "train":
                found.append(f"{part.task} is held out for evaluation ({task.role}), and is trained on")
            if part.dropped:
                found.append(f"{part.name}: {part.dropped} rows share text with an evaluation set and are left out")
        return found

    def data(self) -> dict[str, str]:
        """The number of rows of each set, and a hash of what is drawn of it and how often: whether two mixtures draw the same texts.

        Files count with their content, whatever their dates and folders are; what is from the hub with its id and number of rows.
        """
        hashes = dict.fromkeys((source for part in self.parts for source in part.sources), "")
        with progress("looking at the data", len(hashes)) as advance:
            for source in hashes:
                if (path := Path(source)).is_file():
                    status = path.stat()
                    hashes[source] = f"{path.name} {_hash(path, status.st_size, status.st_mtime_ns)}"
                advance()
        return {
            part.name: f"{part.num_rows} rows, {_digest(part.marks, str(part.rate), *(hashes[each] or each for each in part.sources))}"
            for part in self.parts
        }

    @property
    def num_rows(self) -> int:
        """Rows of all sets."""
        return sum(part.num_rows for part in self.parts)

    def draw(self, index: int) -> Draw:
        """What stands at `index`."""
        draw: Draw = self._mixed[index]
        return draw

    def __getitem__(self, index: int) -> Example | None:
        return self.draw(index).example

    def _read_rows(self) -> None:
        config = self.config
        rendered = load_rendered(config)
        loaded, self.missing = load_sets(config, elsewhere=rendered)
        dropped = _contaminated(config)
        for rows in loaded:
            prompts = self._prompts(rows)
            if prompts:
                beside = self._left(rows.task.name, rendered.pop(rows.task.name, {}), dropped)
                num_beside = sum(map(len, beside.values()))
                share = Fraction(len(rows.rows), len(rows.rows) + num_beside)
                self._add(rows, prompts, dropped.get(rows.task.name, frozenset()), share)
                self._add_rendered(rows.task, beside, dropped, 1 - share)
        for name, beside in rendered.items():
            self._add_rendered(catalog()[name], self._left(name, beside, dropped), dropped, Fraction(1))
        if not self.streams:
            raise UserError(f"{config.templates}: no template fits any of the data sets; {next(iter(self.missing.values()), '')}")

    def _left(self, name: str, beside: dict[str, p3.Prompted], dropped: dict[str, frozenset[int]]) -> dict[str, p3.Prompted]:
        """`beside` less the prompts whose rows are all left out: what was their share of the rate goes to the set's other rows."""
        left = {}
        for template, prompted in beside.items():
            if len(dropped.get(task_name(name, template), ())) < len(prompted):
                left[template] = prompted
            else:
                self.missing[task_name(name, template)] = f"{name} (P3), {template}: every row shares text with an evaluation set"
        return left

    def _prompts(self, rows: Rows) -> tuple[Template, ...]:
        """The prompts that a set is asked through."""
        config, task = self.config, rows.task
        if not config.templates.startswith(PROMPTSOURCE):
            return task.prompts
        path = Path(config.templates.removeprefix(PROMPTSOURCE)).expanduser()
        templates_folder(path)
        found = read_templates(path, task.promptsource, config.truncate) if task.promptsource else ()
        if not found:
            self.missing[task.name] = f"{task.name}: {path} has no templates for it"
        return found

    def _add(self, rows: Rows, prompts: Sequence[Template], dropped: Collection[int], share: Fraction) -> None:
        """`share` of a set's rate for its rows."""
        config, task = self.config, rows.task
        size = task.splits.get(config.split, len(rows.rows)) if config.split == "train" else len(rows.rows)
        rate = config.set_rate(task, size, len(prompts)) * share
        columns, fits = rows.rows[0].keys(), []
        for prompt in _sound(prompts, f"{config.templates}, {task.name}"):
            if absent := sorted(prompt.variables - columns):
                self.missing[f"{task.name}/{prompt.name}"] = f"{rows.origin}: template {prompt.name!r} needs the column {absent[0]!r}"
            else:
                fits.append(prompt)
        if not fits:
            return
        if isinstance(config.tasks, dict):  # a given weight is the set's, however many of its prompts can be used
            rate = rate * len(prompts) / len(fits)
        places: Places = range(len(rows.rows))
        if dropped:
            places = np.array([place for place in places if rows.number(place) not in dropped], dtype=np.int64)
            if not len(places):
                raise UserError(f"{rows.origin}: every row shares text with an evaluation set; take {task.name} out of mixture.tasks")
        one = rate / len(prompts)
        always = [prompt for prompt in fits if not prompt.conditional]
        if always:
            self.streams.append(_Turns(rows, places, always, one * len(always), config.seed))
        self.streams += [_Some(rows, places, [prompt], one, config.seed) for prompt in fits if prompt.conditional]
        names = tuple(prompt.name for prompt in fits)
        sources = (rows.origin, *rows.sources)
        asked = [(each.name, each.jinja, each.answer_choices, each.truncate, each.lenient) for each in fits]
        marks = _digest(repr(asked), repr(sorted(dropped)))
        self.parts.append(Part(task.name, task.family, len(places), one * len(fits), names, sources, marks, len(dropped)))

    def _add_rendered(self, task: Task, beside: dict[str, p3.Prompted], dropped: dict[str, frozenset[int]], share: Fraction) -> None:
        """`share` of a set's rate for rows of it that P3 rendered, each row alike."""
        num_rows = sum(map(len, beside.values()))
        if not num_rows:
            return
        rate = self.config.set_rate(task, task.splits.get(self.config.split, num_rows), len(task.p3_templates)) * share
        streams = [
            _Rendered(
                task.name,
                task.family,
                template,
                prompted,
                rate * len(prompted) / num_rows,
                self.config.seed,
                dropped.get(task_name(task.name, template), ()),
            )
            for template, prompted in beside.items()
        ]
        self.streams += streams
        left, names = sum(stream.num_rows for stream in streams), tuple(stream.templates[0] for stream in streams)
        rate, sources = sum((stream.rate for stream in streams), Fraction(0)), _sources(beside.values())
        marks = _digest(*(repr((template, sorted(dropped.get(task_name(task.name, template), ())))) for template in beside))
        self.parts.append(Part(task.name, task.family, left, rate, names, sources, marks, num_rows - left, rendered=True))

    def _read_p3(self) -> None:
        config = self.config
        folder, wanted = data_folder(config.dir), _wanted(config)
        configs = {p3.config_name(task.name, template): (task, template) for task in wanted for template in task.p3_templates}
        if config.decontaminate:
            raise UserError("mixture.decontaminate works on rows, and P3's are rendered; use mixture.templates=promptsource:PATH")
        if folder is None:
            found = {name: p3.from_hub(name, config.split) for name in configs}
        else:
            found = p3.find(folder, config.split)
            if not found:
                raise UserError(f"{folder} holds no P3 rows of the split {config.split}, such as glue_qqp_meaning/{config.split}.jsonl")
        by_task: dict[str, list[tuple[str, p3.Prompted]]] = {}
        known = {task.name: task for task in wanted}
        everywhere = {p3.config_name(task.name, template) for task in catalog().values() for template in task.p3_templates}
        for name, prompted in sorted(found.items()):
            if not len(prompted):
                continue
            if name in configs:
                task, template = configs[name]
                by_task.setdefault(task.name, []).append((template, prompted))
            elif config.tasks is None and name not in everywhere and not _is_held_out(name):
                by_task.setdefault(name, []).append((name, prompted))  # rows of nothing that the catalogue knows: a set of their own
                if prompted.note:
                    self.missing[name] = prompted.note
        for set_name, entries in by_task.items():
            rows = [prompted for _, prompted in entries]
            if set_name in known:
                task = known[set_name]
                total, family = len(task.p3_templates), task.family
                rate = config.set_rate(task, task.splits.get(config.split, sum(map(len, rows))), total)
                if config.rule == "weights":
                    total = len(entries)
            else:
                total, family, rate = 1, "Other", Fraction(min(len(rows[0]), T0_CAP))
            self.streams += [_Rendered(set_name, family, template, each, rate / total, config.seed) for template, each in entries]
            names = tuple(template for template, _ in entries)
            all_of_it = rate / total * len(entries)
            self.parts.append(Part(set_name, family, sum(map(len, rows)), all_of_it, names, _sources(rows), _digest(*names)))
        for name in () if config.tasks is None else [name for name in known if name not in by_task]:
            self.missing[name] = f"{name}: no P3 rows in {folder}"
            if name in _named(config):
                raise UserError(self.missing[name])
        if not self.streams:
            raise UserError(f"{folder}: no P3 rows of any data set that was asked for")


def _sources(rendered: Iterable[p3.Prompted]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(source for prompted in rendered for source in prompted.sources))


@cache
def _hash(path: Path, size: int, changed: int) -> str:
    """SHA-256 of a file; worked out again where size or time of change say that it is another."""
    return folders.sha256_file(path)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _sound(prompts: Sequence[Template], where: str) -> Sequence[Template]:
    """The prompts, after looking at the syntax of each; `where` names their source in an error."""
    try:
        for prompt in prompts:
            _ = prompt.conditional, prompt.variables
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return prompts


def load_sets(config: MixtureConfig, elsewhere: Collection[str] = ()) -> tuple[list[Rows], dict[str, str]]:
    """The rows of every set, and for those that are not there why not.

    A set that was named must be there; one that was asked for as part of a group may be missing, or one that has rows `elsewhere`.
    """
    folder, named = data_folder(config.dir), _named(config)
    loaded, missing = [], {}
    for task in _wanted(config):
        try:
            loaded.append(load_rows(task, folder, config.split))
        except UserError as error:
            if not isinstance(error, MissingDataError) or (task.name in named and task.name not in elsewhere):
                raise
            if config.tasks is not None and task.name not in elsewhere:
                missing[task.name] = str(error)
    if not loaded:
        raise UserError(f"no training set with a split {config.split} in {folder}; see: mtllama tasks list")
    return loaded, missing


def _named(config: MixtureConfig) -> set[str]:
    """Sets that the user asked for by their own names, which must be there."""
    return set(config.tasks or ()) - set(GROUPS)


def _wanted(config: MixtureConfig) -> list[Task]:
    if config.tasks is None and config.dir is None:
        raise UserError("mixture.dir is none: name the data sets to fetch from the hub in mixture.tasks")
    tasks = find_tasks(("train",) if config.tasks is None else config.tasks)
    for task in tasks:
        if task.role != "train" and not config.allow_held_out:
            raise UserError(
                f"{task.name} is held out for evaluation ({task.role}); take it out of mixture.tasks, "
                "or set mixture.allow_held_out=true and do not call it unseen"
            )
    return tasks


def kept_passages(config: MixtureConfig) -> list[contamination.Passages]:
    """`training_passages` less the rows that `decontaminate` drops: what is really trained on."""
    dropped = _contaminated(config)
    return [_without(part, dropped.get(part.name, frozenset())) for part in training_passages(config)]


def _without(part: contamination.Passages, rows: Collection[int]) -> contamination.Passages:
    return contamination.Passages(part.name, (each for each in part.fields if each[0] not in rows))


def training_passages(config: MixtureConfig) -> list[contamination.Passages]:
    """The texts of a mixture's rows, dropped ones too, as far as they are compared with other sets: of rendered rows, their inputs."""
    if config.templates == "p3":
        streams = [stream for stream in Mixture(config).streams if isinstance(stream, _Rendered)]
        return [_inputs(stream.task, stream.templates[0], stream.prompted) for stream in streams]
    rendered = load_rendered(config)
    return [
        *(passages(rows) for rows in load_sets(config, elsewhere=rendered)[0]),
        *(_inputs(task, template, prompted) for task, beside in rendered.items() for template, prompted in beside.items()),
    ]


def _inputs(task: str, template: str, prompted: p3.Prompted) -> contamination.Passages:
    examples = ((row, prompted.example(row)) for row in range(len(prompted)))
    return contamination.Passages(task_name(task, template), ((row, "inputs", example.inputs) for row, example in examples if example))


def _contaminated(config: MixtureConfig) -> dict[str, frozenset[int]]:
    """Rows to leave out, by set, and by P3's name for rendered rows; none unless that was asked for."""
    if not config.decontaminate:
        return {}
    report = contamination.check(training_passages(config), [passages(rows) for rows in held_out(config)])
    return {name: report.rows(name) for name in report.train_sizes}


def load_rendered(config: MixtureConfig) -> dict[str, dict[str, p3.Prompted]]:
    """Rows in `config.p3`, by set and prompt: those of the wanted sets, where there are any."""
    if config.p3 is None:
        return {}
    found, sets = p3.find(config.p3, config.split), {}
    for task in _wanted(config):
        names = {template: p3.config_name(task.name, template) for template in task.p3_templates}
        beside = {template: found[name] for template, name in names.items() if name in found and len(found[name])}
        if beside:
            sets[task.name] = beside
    if not sets:
        raise UserError(f"{config.p3} holds no P3 rows of the split {config.split} of any data set that was asked for; see mixture.p3")
    return sets


def task_name(task: str, template: str) -> str:
    """P3's name of a data set asked through a template; rendered rows of no known prompt are one task, named as their set."""
    return p3.config_name(task, template) if template != task else task


def _is_held_out(p3_config: str) -> bool:
    """Whether a P3 config is of an evaluation set, under any of the names that it goes by."""
    prefixes = set()
    for task in catalog().values():
        if task.role != "train":
            hub_name, config = task.location.hub_id.split("/")[-1], task.location.config
            names = {task.name, task.promptsource, hub_name, *task.location.local, f"glue_{task.name}", f"super_glue_{task.name}"}
            prefixes |= {p3.config_name(*name.split("/", 1)) if "/" in name else p3.clean(name) for name in names if name}
            prefixes.add(p3.config_name(hub_name, config or ""))
    training = {p3.clean(task.name) for task in catalog().values() if task.role == "train"}
    known = {prefix for prefix in prefixes - {"glue", "super_glue"} if prefix not in training}
    return any(p3_config == prefix or p3_config.startswith(prefix.rstrip("_") + "_") for prefix in known)


def held_out(config: MixtureConfig) -> list[Rows]:
    """The evaluation sets to keep training data apart from: those in `eval_dir`, or in `dir`."""
    folder = data_folder(config.eval_dir if config.eval_dir is not None else config.dir)
    if folder is None:
        raise UserError("mixture.eval_dir is none: give the folder of the evaluation sets to compare with")
    found = []
    for task in catalog().values():
        if task.role != "train" and task.joined is None:  # a set made of two others has no texts of its own
            try:
                found.append(load_rows(task, folder))
            except UserError as error:
                if not isinstance(error, MissingDataError):
                    raise
    if not found:
        raise UserError(f"no evaluation set in {folder}; set mixture.eval_dir to a folder of them")
    return found


def passages(rows: Rows) -> contamination.Passages:
    """The texts of a set that are compared with other sets."""
    texts = contamination.passages(rows.rows, rows.task.passages)
    return contamination.Passages(rows.task.name, ((rows.number(index), column, text) for index, column, text in texts))
