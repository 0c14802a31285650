"""The only code that turns text into token ids and a loss mask: training, evaluation, chat and serving all come here.

Prompt and answer are tokenised apart and joined as ids, so the boundary is never searched for again. The end marker
is appended as an id. Text of users and data sets can never become a special token.
"""

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from mtllama.data.words import word_table
from mtllama.errors import UserError

DEFAULT_FORMAT = "mtllama"
_ANCHOR = "\n"
"""A byte of its own to SentencePiece: it merges with nothing."""
_FENCE = "\ufdd0"
"""Stands around the text of a special token that a user wrote: a code point that Unicode keeps for such internal use."""


@dataclass(frozen=True)
class Format:
    """How one exchange is written. `{inputs}` is what the user says; the answer follows after one blank."""

    name: str
    turn: str
    """The prompt of one turn, ending where the answer begins."""
    system: str = ""
    """Stands before the first turn where the user gives no system text of their own."""
    after_system: str = "\n\n"
    end: str | None = None
    """Text that ends an answer; None means the tokenizer's EOS id."""
    between: str = "\n"
    """Text between an ended answer and the next turn."""

    @property
    def native(self) -> bool:
        """Whether the checkpoint's own chat template is used instead of ours."""
        return not self.turn

    def prompt_text(self, inputs: str) -> str:
        """The text of a first prompt, up to where the answer begins (without BOS)."""
        return (self.system + self.after_system if self.system else "") + self.turn.replace("{inputs}", inputs)

    def chat_template(self, *, bos: bool) -> str:
        """The same format as a Jinja chat template for `tokenizer.apply_chat_template`, vLLM and llama.cpp.

        `bos`: whether prompts begin with the BOS token.
        """
        before, after = self.turn.split("{inputs}")
        end = "eos_token" if self.end is None else _quote(self.end)
        return (
            ("{{- bos_token -}}" if bos else "") + "{%- if messages[0]['role'] == 'system' -%}"
            "{{- messages[0]['content'] + (" + _quote(self.after_system) + " if messages[0]['content'] else '') -}}"
            "{%- set turns = messages[1:] -%}"
            "{%- else -%}"
            "{{- " + _quote(self.system + (self.after_system if self.system else "")) + " -}}{%- set turns = messages -%}"
            "{%- endif -%}"
            "{%- for message in turns -%}"
            "{%- if message['role'] == 'user' -%}"
            "{{- (" + _quote(self.between) + " if not loop.first else '') + " + _quote(before) + " + message['content'] -}}"
            "{%- if not loop.last or add_generation_prompt -%}{{- " + _quote(after) + " -}}{%- endif -%}"
            "{%- else -%}{{- ' ' + message['content'] + " + end + " -}}{%- endif -%}"
            "{%- endfor -%}"
        )


def _quote(text: str) -> str:
    """`text` as a Jinja string literal."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"


_TRAIN_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_CHAT_SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
FORMATS = {
    format.name: format
    for format in (
        Format("mtllama", "Input: {inputs}\nOutput:"),
        Format("plain", "{inputs}"),
        Format("native", ""),
        # The two formats of MT-LLaMA: of its training, and of its classification evaluation and chat.
        Format("mt-llama-train", "### USER: {inputs}\n### ASSISTANT:", system=_TRAIN_SYSTEM, end="\n", between=""),
        Format("mt-llama-chat", "### Human: {inputs}### Assistant:", system=_CHAT_SYSTEM, after_system="", between=""),
    )
}


def find_format(name: str) -> Format:
    """A format by name."""
    if name not in FORMATS:
        raise UserError(f"unknown format {name!r}; choose one of {', '.join(FORMATS)}")
    return FORMATS[name]


@dataclass(frozen=True)
class Turn:
    """One past exchange of a dialogue."""

    inputs: str
    answer: str


@dataclass(frozen=True)
class Encoded:
    """One example as the model sees it: ids, and how many of them at the end are the answer (the loss mask)."""

    ids: list[int]
    num_target: int
    cut: bool
    """Whether the prompt was shortened to fit."""


class PromptEncoder:
    """A format bound to a tokenizer.

    Raises `UserError` where the tokenizer has no EOS to end an answer with.
    """

    def __init__(self, tokenizer: Any, format: Format, max_length: int) -> None:
        self.tokenizer, self.format, self.max_length = tokenizer, format, max_length
        if tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no EOS token, so an answer could not end; set eos_token in its config")
        if format.native and not tokenizer.chat_template:
            raise UserError("format native: the model folder has no chat template; choose another --format")
        self._backend = _own_backend(tokenizer)
        self._words = word_table(self._backend) if self._backend is not None else None
        with_special, bare = tokenizer("a").input_ids, self._ids("a")
        # BOS as the checkpoint's own tokenizer puts it; an EOS that it appends is not part of a prompt.
        self.bos_ids: list[int] = with_special[: _index(with_special, bare)]
        # SentencePiece tokenizers put a blank before every text of their own accord: it is the blank.
        self.dummy_prefix = tokenizer.convert_ids_to_tokens(bare)[0].startswith("▁")
        # Some of them put it behind a special token as well, some do not.
        behind_eos = tokenizer(tokenizer.eos_token + "a", add_special_tokens=False).input_ids
        self._blank_behind_special = behind_eos[1:] == bare
        self._behind_special = self._ids if self._blank_behind_special else self._tail_ids
        self._anchor_ids = self._ids(_ANCHOR)
        self.end_ids: list[int] = [tokenizer.eos_token_id] if format.end is None else self._tail_ids(format.end)

    def _ids(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of text as it stands; `special`: whether special tokens in it become special ids."""
        if special or self._backend is None:
            with _characters([text]):
                return list(self.tokenizer(text, add_special_tokens=False, split_special_tokens=not special).input_ids)
        return self._ids_batch([text])[0]

    def _ids_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of many texts at once, without the offsets and masks that the tokenizer's own call makes."""
        if self._backend is None:
            return [self._ids(text) for text in texts]
        found = [None] * len(texts) if self._words is None else [self._words.ids(text) for text in texts]
        left = [text for text, ids in zip(texts, found, strict=True) if ids is None]
        with _characters(left):
            encodings = iter(self._backend.encode_batch_fast(left, add_special_tokens=False) if left else ())
        return [next(encodings).ids if ids is None else ids for ids in found]

    def _tail_ids(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of text that stands behind other text, without the blank that SentencePiece would add."""
        if not self.dummy_prefix:
            return self._ids(text, special=special)
        return self._behind_anchor(self._ids(_ANCHOR + text, special=special)) or self._ids(text, special=special)

    def _behind_anchor(self, joint: list[int]) -> list[int] | None:
        """What stands behind the anchor in the ids of anchor + text; None if the anchor merged with the text."""
        anchor = self._anchor_ids
        return joint[len(anchor) :] if joint[: len(anchor)] == anchor else None

    def prompt_text(self, inputs: str, history: Sequence[Turn] = (), system: str | None = None) -> str:
        """The exact text before the answer (past answers with their end marker as text)."""
        if self.format.native:
            return self._native_text(inputs, history, system)
        end = self.tokenizer.eos_token if self.format.end is None else self.format.end
        if not history and system is None:
            return self.format.prompt_text(inputs)
        head = self.format.system if system is None else system
        turns = [self.format.turn.replace("{inputs}", turn.inputs) + " " + turn.answer + end for turn in history]
        turns.append(self.format.turn.replace("{inputs}", inputs))
        return (head + self.format.after_system if head else "") + self.format.between.join(turns)

    def prompt_ids(self, inputs: str, history: Sequence[Turn] = (), system: str | None = None, *, room: int = 0) -> tuple[list[int], bool]:
        """Ids of the prompt, and whether it was cut so that `room` more ids fit into the maximum length.

        A prompt that is too long loses its middle: its head (what is asked) and its last quarter (where the answer
        is expected) stay.
        """
        return self._cut(self.whole_prompt_ids(inputs, history, system), room)

    def raw_ids(self, text: str) -> list[int]:
        """Ids of text that is put into no format: BOS as the checkpoint has it, then the text; never empty."""
        return self._begun([*self.bos_ids, *((self._behind_special if self.bos_ids else self._ids)(text) if text else ())])

    def _begun(self, ids: list[int]) -> list[int]:
        """Ids from which a first one can be predicted: where there is nothing before it, BOS, or EOS if the tokenizer has none."""
        bos = self.tokenizer.bos_token_id
        return ids or [self.tokenizer.eos_token_id if bos is None else bos]

    def raw_continuation_ids(self, text: str) -> list[int]:
        """Ids of text that goes on behind other text, as it stands: no blank before it, no end marker behind it."""
        return self._tail_ids(text)

    def whole_prompt_ids(self, inputs: str, history: Sequence[Turn] = (), system: str | None = None) -> list[int]:
        """Ids of the prompt, however long it is."""
        if self.format.native:
            return self._native_ids(inputs, history, system)
        head = self.format.system if system is None else system
        text, ids = (head + self.format.after_system if head else ""), list(self.bos_ids)
        encode = self._behind_special if self.bos_ids else self._ids
        for turn in history:
            text += self.format.turn.replace("{inputs}", turn.inputs)
            ids += encode(text) + self._answer_text_ids(turn.answer) + self.end_ids
            text, encode = self.format.between, self._behind_special if self.format.end is None else self._tail_ids
        return self._begun(ids + encode(text + self.format.turn.replace("{inputs}", inputs)))

    def _cut(self, ids: list[int], room: int) -> tuple[list[int], bool]:
        limit = max(self.max_length - room, 8)
        if len(ids) <= limit:
            return ids, False
        tail = limit // 4
        return ids[: limit - tail] + ids[len(ids) - tail :], True

    def _native_ids(self, inputs: str, history: Sequence[Turn], system: str | None) -> list[int]:
        """Ids of the native prompt: its template's special tokens become special ids, those in the users' text do not."""
        tokens = {self.tokenizer.eos_token} | {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        special = re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))))

        def fenced(text: str) -> str:
            return special.sub(lambda match: _FENCE + match[0] + _FENCE, text.replace(_FENCE, ""))

        turns = [Turn(fenced(turn.inputs), fenced(turn.answer)) for turn in history]
        parts = self._native_text(fenced(inputs), turns, fenced(system) if system else system).split(_FENCE)
        ids = self._ids(parts[0], special=True)
        for number, part in enumerate(parts[1:], start=1):
            ids += self._tail_ids(part, special=number % 2 == 0)
        return ids

    def _native_text(self, inputs: str, history: Sequence[Turn], system: str | None) -> str:
        messages = [{"role": "system", "content": system}] if system else []
        for turn in history:
            messages += [{"role": "user", "content": turn.inputs}, {"role": "assistant", "content": turn.answer}]
        messages.append({"role": "user", "content": inputs})
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except TemplateError as error:  # some refuse a system text, or roles that do not take turns
            raise UserError(f"the model's chat template refuses this: {' '.join(str(error).split())[:300]}") from error

    def _answer_text(self, answer: str) -> str:
        # Chat templates end in a line break, behind which an answer starts without a blank.
        return answer if self.dummy_prefix or self.format.native else " " + answer

    def _answer_text_ids(self, answer: str) -> list[int]:
        return self._ids(self._answer_text(answer))

    def answer_ids(self, answer: str) -> list[int]:
        """Ids of an answer with its end marker."""
        return self._answer_text_ids(answer) + self.end_ids

    def encode(self, inputs: str, answer: str) -> Encoded | None:
        """A training example; None if the answer alone is longer than the model reads."""
        return self._join(self.whole_prompt_ids(inputs), self.answer_ids(answer))

    def encode_batch(self, pairs: Sequence[tuple[str, str]]) -> list[Encoded | None]:
        """What `encode` gives for each (inputs, answer), tokenised together."""
        if self.format.native:
            return [self.encode(inputs, answer) for inputs, answer in pairs]
        anchored = self.dummy_prefix and bool(self.bos_ids) and not self._blank_behind_special
        texts = [self.format.prompt_text(inputs) for inputs, _ in pairs]
        answers = [self._answer_text(answer) for _, answer in pairs]
        ids = self._ids_batch([*(_ANCHOR + text if anchored else text for text in texts), *answers])
        prompts: list[list[int]] = ids[: len(pairs)]
        if anchored:
            prompts = [self._behind_anchor(joint) or self._ids(text) for joint, text in zip(prompts, texts, strict=True)]
        prompts = [self._begun(self.bos_ids + prompt) for prompt in prompts]
        return [self._join(prompt, answer + self.end_ids) for prompt, answer in zip(prompts, ids[len(pairs) :], strict=True)]

    def _join(self, prompt_ids: list[int], answer_ids: list[int]) -> Encoded | None:
        if len(answer_ids) + 8 > self.max_length:
            return None
        prompt_ids, cut = self._cut(prompt_ids, len(answer_ids))
        return Encoded(prompt_ids + answer_ids, len(answer_ids), cut)


def _own_backend(tokenizer: Any) -> Any:
    """A copy of the tokenizer's engine to which special tokens in a text are text; None where it has no such engine."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    own = type(backend).from_str(backend.to_str())
    own.encode_special_tokens = True
    own.no_truncation()
    own.no_padding()
    return own


_HALF = re.compile("[\ud800-\udfff]")


@contextlib.contextmanager
def _characters(texts: Sequence[str]) -> Iterator[None]:
    """Tokenisers fail at half of a surrogate pair, and do not say so."""
    try:
        yield
    except (TypeError, UnicodeError) as error:
        if not any(map(_HALF.search, texts)):
            raise
        raise UserError("a text holds half of a surrogate pair (U+D800 to U+DFFF), which is no character; leave it out") from error


def _index(ids: list[int], part: list[int]) -> int:
    """Where `part` begins in `ids` (0 if it does not stand there)."""
    return next((i for i in range(len(ids)) if ids[i : i + len(part)] == part), 0)
