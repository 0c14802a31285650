"""A prompt template: row -> Example. Templates come from strangers, so Jinja runs in its sandbox, with bounds.

The form is promptsource's (Bach et al. 2022): the part before `|||` is the input, the part after it the target;
`answer_choices` is itself a template whose rendering is split on `|||`.
"""

import functools
import hashlib
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mtllama.errors import UserError

SEPARATOR = "|||"
_BAR_IN_DATA = "\ufdd0"  # a code point that Unicode keeps for such internal use
"""Stands for each `|` of a row's text until the template's own separator has been split at."""
MAX_CHARACTERS = 1_000_000
"""A rendering longer than this is refused: no example of the field comes near it."""
MAX_SECONDS = 2.0
"""A rendering that takes longer than this is refused."""


@dataclass(frozen=True)
class Example:
    """One prompted example: what the model reads, what it should answer, and where it comes from."""

    inputs: str
    targets: str
    choices: tuple[str, ...] | None
    task: str
    template: str


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

    def render(self, row: Mapping[str, Any], *, task: str, row_id: str = "", seed: int = 0) -> Example | None:
        """Render one row; None when the template does not apply to it (its target is empty).

        The random `choice` filter depends on (seed, task, template, row_id) alone, so a rendering never changes.
        """
        chooser = _Chooser(f"{seed}/{task}/{self.name}/{row_id}")
        where = f"template '{self.name}' of {task}, row {row_id or '?'}"
        variables = dict(row)
        choices: tuple[str, ...] | None = None
        if self.answer_choices:
            rendered = _render(self.answer_choices, variables, chooser, where, separates=True)
            choices = tuple(choice.strip() for choice in rendered.split(SEPARATOR))
            variables["answer_choices"] = list(choices)
        parts = _render(self.jinja, variables, chooser, where).split(SEPARATOR)
        if len(parts) != 2:
            raise UserError(f"{where}: its rendering has {len(parts) - 1} separators '{SEPARATOR}'; exactly one is needed")
        inputs, targets = (part.replace(_BAR_IN_DATA, "|").strip() for part in parts)
        if not targets:
            return None
        if not inputs:
            raise UserError(f"{where}: the input renders to nothing; check the column names in the template")
        if choices is not None and targets not in choices:
            raise UserError(f"{where}: the target {targets!r} is not among the choices {list(choices)}")
        return Example(inputs, targets, choices, task, self.name)


class _Chooser:
    """The `choice` filter: a random pick that is a pure function of its seed."""

    def __init__(self, seed: str) -> None:
        self.random = random.Random(hashlib.sha256(seed.encode()).digest())

    def __call__(self, options: Sequence[Any]) -> Any:
        return self.random.choice(options)


def _choice(context: jinja2.runtime.Context, options: Sequence[Any]) -> Any:
    return context["__choose__"](options)


@functools.lru_cache(maxsize=2)
def _environment(separates: bool) -> ImmutableSandboxedEnvironment:
    """`separates`: whether `|||` in the value of an expression separates (as between choices) or is text."""
    environment = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, finalize=None if separates else _mark_bars)
    # Jinja's own sources of chance would make a rendering differ from call to call.
    environment.filters["choice"] = environment.filters["random"] = jinja2.pass_context(_choice)
    del environment.globals["lipsum"]
    return environment


def _mark_bars(value: Any) -> str:
    return str(value).replace("|", _BAR_IN_DATA)


@functools.lru_cache(maxsize=4096)
def _compile(source: str, separates: bool) -> jinja2.Template:
    return _environment(separates).from_string(source)


def _render(source: str, variables: dict[str, Any], chooser: _Chooser, where: str, separates: bool = False) -> str:
    """Render with bounded size and time."""
    pieces, size, deadline = [], 0, time.monotonic() + MAX_SECONDS
    try:
        for piece in _compile(source, separates).generate({**variables, "__choose__": chooser}):
            size += len(piece)
            if size > MAX_CHARACTERS:
                raise UserError(f"{where}: the rendering is longer than {MAX_CHARACTERS:,} characters")
            if time.monotonic() > deadline:
                raise UserError(f"{where}: the rendering takes longer than {MAX_SECONDS:g} seconds")
            pieces.append(piece)
    except jinja2.UndefinedError as error:
        known = ", ".join(key for key in variables if key != "answer_choices")
        raise UserError(f"{where}: {error.message}; columns of the row: {known}") from error
    except UserError:
        raise
    except Exception as error:  # a template is a stranger's program: whatever it raises is its own fault
        raise UserError(f"{where}: {' '.join(str(error).split()) or type(error).__name__}") from error
    return "".join(pieces)
