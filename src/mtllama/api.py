"""A model as Python sees it: text in, text out; choices scored; tasks of the catalogue asked by their fields.

from mtllama import load_model

m = load_model("smollm2-135m")
m.generate("Name a colour.", max_new_tokens=8)
m.score("Is fog wet?", ["Yes", "No"]).best.text
m.run_task("copa", premise="The candle went out.", question="cause", choice1="I blew on it", choice2="I lit it").answer
"""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

from mtllama.data.prompt import PromptEncoder, Turn
from mtllama.errors import UserError
from mtllama.model.engine import Branches, Engine
from mtllama.model.generation import Settings
from mtllama.tasks.catalog import Task, find_tasks
from mtllama.tasks.template import Question, Template

MAX_CHOICES = 512
MAX_CHOICE_TOKENS = 4096
"""Tokens of all choices behind one prompt: the mask of a tree grows with their square."""
TASK_TOKENS = 64
"""New tokens at most for a task's answer, as in evaluation."""


@dataclass(frozen=True)
class ChoiceScore:
    """One choice behind a prompt. Sums are in nat, over the choice's tokens and its end marker."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    """The choice's ids, the end marker's behind them."""
    logprobs: tuple[float, ...]
    """Log-probability of each of them."""

    @property
    def sum(self) -> float:
        """Log-probability of the whole choice: what T0 ranks by."""
        return sum(self.logprobs)

    @property
    def mean(self) -> float:
        """The sum by token, the end marker counted."""
        return self.sum / len(self.logprobs)

    @property
    def per_char(self) -> float:
        """The sum by character of the text."""
        return self.sum / max(1, len(self.text))

    @property
    def per_byte(self) -> float:
        """The sum by byte of the text in UTF-8."""
        return self.sum / max(1, len(self.text.encode()))


@dataclass(frozen=True)
class Scores:
    """The choices behind one prompt, in the order in which they were given."""

    choices: tuple[ChoiceScore, ...]

    @property
    def best(self) -> ChoiceScore:
        """The choice with the largest sum, the first of equals."""
        return max(self.choices, key=lambda choice: choice.sum)

    @property
    def probabilities(self) -> tuple[float, ...]:
        """The choices' probabilities among themselves, by their sums."""
        from scipy.special import softmax

        return tuple(softmax([choice.sum for choice in self.choices]).tolist())


@dataclass(frozen=True)
class TaskAnswer:
    """What a model makes of one instance of a task."""

    task: str
    template: str
    prompt: str
    """The exact text that the model read."""
    answer: str
    scores: Scores | None
    """Of the choices; None where the task has none and the answer was generated."""


class Model:
    """A loaded model. Prompts are put into its own prompt format, unless `raw`; what is too long for it is an error, never cut."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    @property
    def name(self) -> str:
        """Name, folder or hub id that it was loaded by."""
        return self.engine.loaded.source.name

    @overload
    def generate(
        self, prompt: str, *, max_new_tokens: int = ..., temperature: float = ..., top_p: float = ..., seed: int = ...,
        stop: str | Sequence[str] = ..., raw: bool = ...,
    ) -> str: ...  # fmt: skip
    @overload
    def generate(
        self, prompt: list[str], *, max_new_tokens: int = ..., temperature: float = ..., top_p: float = ..., seed: int = ...,
        stop: str | Sequence[str] = ..., raw: bool = ...,
    ) -> list[str]: ...  # fmt: skip
    def generate(
        self,
        prompt: str | list[str],
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        raw: bool = False,
    ) -> str | list[str]:
        """The answer to a prompt, or to each of several, which are computed together where that is greedy.

        It ends at its end marker, before `stop` or one of its strings, or after `max_new_tokens`. `temperature` 0 is greedy; else tokens
        are drawn by `seed`, those of prompt i by `seed + i`. Blanks around an answer are left out, unless `raw`.
        """
        if isinstance(prompt, str):
            pieces = self.stream(prompt, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed, stop=stop, raw=raw)
            return "".join(pieces) if raw else "".join(pieces).rstrip()
        if raw or temperature:
            how = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "stop": stop, "raw": raw}
            return [self.generate(each, seed=seed + i, **how) for i, each in enumerate(prompt)]  # type: ignore[call-overload]
        settings = answer_settings(self.engine, max_new_tokens, stop=stop)
        ids = [prompt_ids(self.engine, each, room=max_new_tokens) for each in prompt]
        return self.engine.generate(ids, max_new_tokens=max_new_tokens, stop=settings.stop)

    def stream(
        self,
        prompt: str,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        raw: bool = False,
    ) -> Iterator[str]:
        """The answer in pieces, as it comes; as `generate` has it."""
        settings = answer_settings(self.engine, max_new_tokens, temperature=temperature, top_p=top_p, seed=seed, stop=stop, raw=raw)
        return self.engine.stream(prompt_ids(self.engine, prompt, room=max_new_tokens, raw=raw), settings)

    def score(self, prompt: str, choices: Sequence[str], *, raw: bool = False) -> Scores:
        """How likely each of `choices` is as the answer to `prompt`, exactly; the prompt is computed once.

        `raw`: prompt and choices are joined as they stand, with no blank between them and no end marker behind them.
        """
        (scored,) = self.engine.judge([item := branches(self.engine, prompt, choices, raw=raw)])
        return scores(choices, item, [each.log_probs for each in scored])

    def run_task(self, name: str, *, template: str | None = None, **fields: Any) -> TaskAnswer:
        """Ask one instance of a task of the catalogue: its fields by their names (`mtllama tasks show NAME`), through its first prompt
        or the one called `template`. Choices are ranked by their sums; where there are none, the answer is generated.
        """
        task, chosen = find_question(name, template)
        question = ask(task, chosen, fields)
        prompt = self.engine.encoder.prompt_text(question.inputs)
        if question.choices is None:
            return TaskAnswer(
                task.name, chosen.name, prompt, self.generate(question.inputs, max_new_tokens=TASK_TOKENS, stop=("\n",)), None
            )
        found = self.score(question.inputs, question.choices)
        return TaskAnswer(task.name, chosen.name, prompt, found.best.text, found)


def answer_settings(
    engine: Engine,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: str | Sequence[str] = (),
    top_logprobs: int | None = None,
    raw: bool = False,
) -> Settings:
    """Settings of an answer in the model's own format: its end marker is a stop string too, where that is text."""
    end, stops = engine.encoder.format.end, (stop,) if isinstance(stop, str) else tuple(stop)  # a text is a sequence of its letters, too
    strings = (*stops, end) if end and not raw else stops
    return Settings(max_new_tokens, temperature, top_p, seed, tuple(dict.fromkeys(strings)), top_logprobs, strip=not raw)


def prompt_ids(engine: Engine, prompt: str, *, room: int, raw: bool = False) -> list[int]:
    """Ids of a prompt behind which `room` more fit; one that is too long is an error."""
    encoder = engine.encoder
    ids = encoder.raw_ids(prompt) if raw else whole_prompt(encoder, prompt)
    require_room(encoder, len(ids), room)
    return ids


def whole_prompt(encoder: PromptEncoder, inputs: str, history: Sequence[Turn] = (), system: str | None = None) -> list[int]:
    """Ids of a prompt in the encoder's format, however long they are; never none."""
    ids = encoder.whole_prompt_ids(inputs, history, system)
    return ids or encoder.raw_ids("")


def require_room(encoder: PromptEncoder, length: int, room: int) -> None:
    """Raise if a prompt of `length` tokens leaves no room for `room` more."""
    if length + room > encoder.max_length:
        raise UserError(
            f"the prompt has {length} tokens and {room} more may follow, but the model reads {encoder.max_length} in all; "
            "shorten the prompt, or ask for fewer"
        )


def branches(engine: Engine, prompt: str, choices: Sequence[str], *, raw: bool = False) -> Branches:
    """A prompt and its choices as ids."""
    if isinstance(choices, str):
        raise UserError(f"the choices are one text, {choices[:40]!r}; give a list of texts")
    if not choices or len(choices) > MAX_CHOICES:
        raise UserError(f"{len(choices)} choices; there must be at least 1 and at most {MAX_CHOICES}")
    encode = engine.encoder.raw_continuation_ids if raw else engine.encoder.answer_ids
    ids = [encode(choice) for choice in choices]
    for number, each in enumerate(ids):
        if not each:
            raise UserError(f"choice {number} is no token: {choices[number]!r}")
    item = Branches(prompt_ids(engine, prompt, room=max(map(len, ids)), raw=raw), ids)
    if (total := sum(map(len, ids))) > MAX_CHOICE_TOKENS:
        raise UserError(f"the choices have {total} tokens together; at most {MAX_CHOICE_TOKENS} are scored at a time")
    return item


def scores(choices: Sequence[str], item: Branches, logprobs: Sequence[Sequence[float]]) -> Scores:
    """What was found for the choices of `branches`."""
    rows = zip(choices, item.answers, logprobs, strict=True)
    return Scores(tuple(ChoiceScore(i, text, tuple(ids), tuple(found)) for i, (text, ids, found) in enumerate(rows)))


def find_question(name: str, template: str | None) -> tuple[Task, Template]:
    """A task of the catalogue and one of its prompts, by name."""
    found = find_tasks([name])
    if len(found) != 1:
        raise UserError(f"{name} is a group of data sets; name one of them (see: mtllama tasks list)")
    return found[0], found[0].template(template)


def ask(task: Task, template: Template, fields: Mapping[str, Any]) -> Question:
    """The question that a template makes of a task's fields."""
    if missing := [field for field in template.fields if field not in fields]:
        raise UserError(f"{task.name}: {', '.join(missing)} missing; template '{template.name}' asks for {', '.join(template.fields)}")
    if unknown := sorted(set(fields) - set(task.columns) - set(template.fields)):
        raise UserError(f"{task.name} has no field {unknown[0]}; template '{template.name}' asks for {', '.join(template.fields)}")
    return template.ask(fields, task=task.name)


def field_value(text: str) -> Any:
    """A field that somebody typed: a list or an object where it is JSON of one, else the text."""
    if text.lstrip()[:1] in ("[", "{"):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(text)
    return text
