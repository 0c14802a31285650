"""A prompt template: row -> Example, through the sandbox.

The form is promptsource's (Bach et al. 2022): the part before `|||` is the input, the part after it the target;
`answer_choices` is itself a template whose rendering is split on `|||`. Only a template's own text separates: `|||` in a
row or in the value of an expression is text (but separates choices, where an expression may join them).
"""

import contextlib
import functools
import operator
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from jinja2 import nodes

from mtllama.errors import UserError
from mtllama.tasks import sandbox
from mtllama.tasks.sandbox import Chance, Program, Refused

SEPARATOR = "|||"
STAND_IN = "3ed2dface8203c4c9dfb1a5dc58e41e0"
"""Stands for `|||` in a row while choices, or promptsource's templates, are rendered. It is promptsource's own, which some
of its templates split documents at."""


@dataclass(frozen=True)
class Example:
    """One prompted example: what the model reads, what it should answer, and where it comes from."""

    inputs: str
    targets: str
    choices: tuple[str, ...] | None
    task: str
    template: str


@dataclass(frozen=True)
class Question:
    """What a model is asked where nobody knows the answer."""

    inputs: str
    choices: tuple[str, ...] | None


@dataclass(frozen=True)
class Metadata:
    """What promptsource records of a prompt."""

    original_task: bool = True
    choices_in_prompt: bool = False
    metrics: tuple[str, ...] = ()
    languages: tuple[str, ...] = ("en",)


@dataclass(frozen=True)
class Template:
    """One way to ask for a data set's answer."""

    name: str
    jinja: str
    answer_choices: str | None = None
    metadata: Metadata = Metadata()
    truncate: int | None = None
    """Characters at which the value of an expression is cut (at a blank, with `...`), as promptsource does at 2048."""
    lenient: bool = False
    """Be as promptsource: what a row does not have prints as nothing; a rendering that is not one input and one target means
    that the template does not apply; choices without the target are none. Else each of these is an error."""

    @property
    def variables(self) -> frozenset[str]:
        """Names of the columns that the prompt and its choices need."""
        with self._faults():
            needed = _syntax(self.jinja).variables
            if self.answer_choices:
                needed |= _syntax(self.answer_choices).variables
            return needed - {"answer_choices"}

    @property
    def conditional(self) -> bool:
        """Whether an `if` decides that the prompt has a target, so that it may not apply to every row.

        Told from the syntax: the separator, or everything behind it, stands inside an `if` that has a branch without it.
        """
        with self._faults():
            return _syntax(self.jinja).conditional

    def render(self, row: Mapping[str, Any], *, task: str, row_id: str = "", seed: int = 0) -> Example | None:
        """Render one row; None when the template does not apply to it (its target is empty).

        The random `choice` filter depends on (seed, task, template, row_id) alone, so a rendering never changes.
        """
        try:
            return self._render(row, task, Chance(seed, task, self.name, row_id))
        except Refused as fault:
            raise UserError(f"template '{self.name}' of {task}, row {row_id or '?'}: {fault}") from fault

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the columns that are needed to ask: those of the part before the separator, in order, and of the choices."""
        with self._faults():
            needed = _syntax(self._question).variables
            if self.answer_choices:
                needed |= _syntax(self.answer_choices).variables
        text = f"{self._question} {self.answer_choices}"
        return tuple(sorted(needed - {"answer_choices"}, key=lambda name: (text.find(name), name)))

    def ask(self, row: Mapping[str, Any], *, task: str, seed: int = 0) -> Question:
        """Render the question alone; the columns of the answer need not be there."""
        try:
            chance = Chance(seed, task, self.name, "")
            choices, more = None, None
            if self.answer_choices:
                choices = _render_choices(self.answer_choices, self.lenient, row, chance)
                more = {"answer_choices": list(choices)}
            rendering = _load_prompt(self._question, self.truncate, self.lenient).render(row, chance, more)
        except Refused as fault:
            raise UserError(f"template '{self.name}' of {task}: {fault}") from fault
        inputs = rendering.replace(sandbox.BAR, "|").strip()
        if not inputs:
            raise UserError(f"template '{self.name}' of {task}: the question renders to nothing; fill in {', '.join(self.fields)}")
        if choices is not None and len(set(choices)) < 2:
            raise UserError(f"template '{self.name}' of {task}: there are no two different choices in {list(choices)}")
        return Question(inputs, choices)

    @property
    def _question(self) -> str:
        return _LONE_SEPARATOR.split(self.jinja, maxsplit=1)[0]

    def _render(self, row: Mapping[str, Any], task: str, chance: Chance) -> Example | None:
        choices: tuple[str, ...] | None = None
        more: dict[str, Any] | None = {"answer_choices": None} if self.lenient else None
        if self.answer_choices:
            choices = _render_choices(self.answer_choices, self.lenient, row, chance)
            more = {"answer_choices": list(choices)}
        prompt = _load_prompt(self.jinja, self.truncate, self.lenient)
        given = _with_stand_in(row, _syntax(self.jinja).variables) if self.lenient else row
        rendering = prompt.render(given, chance, more)
        parts = [part.strip() for part in rendering.split(SEPARATOR)]
        if sandbox.BAR in rendering:
            parts = [part.replace(sandbox.BAR, "|") for part in parts]
        if given is not row:
            parts = [part.replace(STAND_IN, SEPARATOR) for part in parts]
        if len(parts) != 2:
            if self.lenient or parts == [""]:
                return None
            raise Refused(f"its rendering has {len(parts) - 1} separators '{SEPARATOR}'; exactly one is needed")
        inputs, targets = parts
        if not targets or (self.lenient and not inputs):
            return None
        if not inputs:
            raise Refused("the input renders to nothing; check the column names in the template")
        if choices is not None and targets not in choices:
            if not self.lenient:
                raise Refused(f"the target {targets!r} is not among the choices {list(choices)}")
            choices = None
        return Example(inputs, targets, choices, task, self.name)

    @contextlib.contextmanager
    def _faults(self) -> Iterator[None]:
        try:
            yield
        except Refused as fault:
            raise UserError(f"template '{self.name}': {fault}") from fault


_LONE_SEPARATOR = re.compile(r"(?<!\|)\|\|\|(?!\|)")
"""The separator, and not part of a longer row of bars (MultiNews parts its documents by five)."""


@functools.lru_cache(maxsize=8192)
def _load_prompt(jinja: str, truncate: int | None, lenient: bool) -> Program:
    """The compiled prompt; promptsource cuts by writing the filter behind every expression, whatever that binds to."""
    source = jinja if truncate is None else jinja.replace("}}", f" | string | truncate({truncate}) }}}}")
    return sandbox.load(source, lenient=lenient, marked=True)


def _render_choices(jinja: str, lenient: bool, row: Mapping[str, Any], chance: Chance) -> tuple[str, ...]:
    fixed = _fixed_choices(jinja, lenient)
    if fixed is not None:
        return fixed
    given = _with_stand_in(row, _syntax(jinja).variables)
    choices = sandbox.load(jinja, lenient=lenient).render(given, chance).split(SEPARATOR)
    return tuple(choice.strip() if given is row else choice.strip().replace(STAND_IN, SEPARATOR) for choice in choices)


@functools.lru_cache(maxsize=8192)
def _fixed_choices(jinja: str, lenient: bool) -> tuple[str, ...] | None:
    """Choices that are the same for every row."""
    constant = sandbox.load(jinja, lenient=lenient).constant
    return None if constant is None else tuple(choice.strip() for choice in constant.split(SEPARATOR))


_NESTED = (list, dict)


def _with_stand_in(row: Mapping[str, Any], columns: Iterable[str]) -> Mapping[str, Any]:
    """The row with `STAND_IN` for each `|||` in `columns`; the row itself where there is none."""
    changed = {}
    for column in columns:
        value = row.get(column)
        if isinstance(value, str):
            if SEPARATOR in value:
                changed[column] = value.replace(SEPARATOR, STAND_IN)
        elif isinstance(value, _NESTED) and (replaced := _replaced(value)) is not value:
            changed[column] = replaced
    return {**row, **changed} if changed else row


def _replaced(value: Any, depth: int = 0) -> Any:
    """`value` with `STAND_IN` for each `|||` in it; `value` itself where there is none."""
    if isinstance(value, str):
        return value.replace(SEPARATOR, STAND_IN) if SEPARATOR in value else value
    if depth == sandbox.MAX_DEPTH and isinstance(value, _NESTED):
        raise Refused(f"a value of the row is nested more than {sandbox.MAX_DEPTH} deep")
    if isinstance(value, list):
        items = [_replaced(item, depth + 1) for item in value]
        return value if all(map(operator.is_, items, value)) else items
    if isinstance(value, dict):
        values = [_replaced(item, depth + 1) for item in value.values()]
        return value if all(map(operator.is_, values, value.values())) else dict(zip(value, values, strict=True))
    return value


_NO_SEPARATOR, _NO_TARGET, _TARGET = 0, 1, 2
"""How far a prompt has been written."""


class _Syntax(NamedTuple):
    """What is told of a template without rendering it."""

    variables: frozenset[str]
    conditional: bool


@functools.lru_cache(maxsize=8192)
def _syntax(jinja: str) -> _Syntax:
    tree = sandbox.parse(jinja, lenient=True)
    ends = _ends(tree.body, {_NO_SEPARATOR})
    return _Syntax(sandbox.variables(tree), _TARGET in ends and len(ends) > 1)


def _ends(body: Iterable[nodes.Node], states: set[int]) -> set[int]:
    """How far a prompt may have been written behind `body`, an expression counting as written and a loop as run once."""
    for node in body:
        if isinstance(node, nodes.If):
            branches = [node.body, *(each.body for each in node.elif_), node.else_]  # without an else, its body is empty
            states = set().union(*(_ends(branch, states) for branch in branches))
        elif isinstance(node, nodes.For | nodes.With | nodes.FilterBlock | nodes.CallBlock):
            states = _ends(node.body, states)
        elif isinstance(node, nodes.Output):
            states = {functools.reduce(_written, node.nodes, state) for state in states}
    return states


def _written(state: int, node: nodes.Node) -> int:
    if not isinstance(node, nodes.TemplateData):
        return _TARGET if state == _NO_TARGET else state
    text = node.data
    if state == _NO_SEPARATOR and SEPARATOR in text:
        state, text = _NO_TARGET, text.partition(SEPARATOR)[2]
    return _TARGET if state == _NO_TARGET and text.strip() else state
