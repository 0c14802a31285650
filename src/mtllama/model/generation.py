"""One continuation in the making: the choice of each token, when it ends, and the text that may be shown of it so far."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from mtllama.errors import UserError

Reason = Literal["stop", "length"]
"""Why a continuation ended: its end marker or a stop string; or a limit."""
BROKEN = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer makes of bytes that are no whole character (yet)."""
LONGEST_PART = 3
"""Bytes of a character in UTF-8 before its last one, so tokens that wait for those which are still to come."""
CONTEXT = 8
"""Tokens of a prompt that its continuation is decoded with: more than a character takes."""


@dataclass(frozen=True)
class Settings:
    """How a continuation is made."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    """Tokens are drawn among the likeliest that have this probability together (Holtzman et al. 2020)."""
    seed: int = 0
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None
    """How many of the likeliest tokens are told for every place; None: no log-probabilities at all."""
    strip: bool = False
    """Leave out blanks and line breaks before the first word; they do not count as a stop string either."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}; at least 1 is needed")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"temperature is {self.temperature}; it is a number from 0 (greedy)")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; it is above 0 and at most 1")
        if not all(self.stop):
            raise UserError("a stop string is empty; leave it out")


@dataclass(frozen=True)
class TokenLogprob:
    """A token in its place: its log-probability (nat), and the likeliest tokens there with theirs."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class TextStream:
    """Tokens one by one -> pieces of text: a character is never split, and nothing of a stop string is shown.

    Only the last few tokens are decoded anew at each step, together with those before them, since a tokenizer may treat
    the first token of a text differently: SentencePiece's drop its blank. So the end of the prompt is `context`.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), *, strip: bool = False, context: Sequence[int] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.stopped = False
        self._ids = list(context[-CONTEXT:])
        self._context, self._decoded = 0, len(self._ids)  # tokens [context:decoded] are text already, and are decoded with the next ones
        self._held = ""  # text that may be the beginning of a stop string
        self._special = frozenset(id for id, added in tokenizer.added_tokens_decoder.items() if added.special)
        self._blank = strip  # whether nothing but blanks has come so far

    def push(self, token: int) -> str:
        """What may be shown behind one more token; `stopped` is set once a stop string is whole."""
        if token in self._special:
            return ""
        self._ids.append(token)
        before, text = self._decode(self._ids[self._context : self._decoded]), self._decode(self._ids[self._context :])
        settled = len(self._ids)
        if text.endswith(BROKEN):  # what stands before the last few is no part of a character that is still to come
            whole, settled = text, max(self._decoded, settled - LONGEST_PART)
            text = self._decode(self._ids[self._context : settled])
            if not whole.startswith(text):  # a token may end one character and begin another
                return ""
        if len(text) <= len(before):
            return ""
        self._context, self._decoded = self._decoded, settled
        return self._show(text[len(before) :])

    def finish(self) -> str:
        """What was held back and may be shown now that nothing comes any more; bytes of an unfinished character are not."""
        if self.stopped:
            return ""
        before, text = self._decode(self._ids[self._context : self._decoded]), self._decode(self._ids[self._context :])
        shown = self._show(text[len(before) :].rstrip(BROKEN))
        if not self.stopped:
            shown, self._held = shown + self._held, ""
        return shown

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)) if ids else ""

    def _show(self, text: str) -> str:
        text = self._held + text
        if self._blank:
            text = text.lstrip()
            self._blank = not text
        if ends := [text.index(each) for each in self.stop if each in text]:
            self.stopped, self._held = True, ""
            return text[: min(ends)]
        held = max((n for each in self.stop for n in range(1, min(len(each), len(text) + 1)) if text.endswith(each[:n])), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


@dataclass
class Generation:
    """A continuation of a prompt: give it the logits of each place, and take the text as it comes."""

    tokenizer: Any
    settings: Settings
    ends: frozenset[int]
    """Ids of which each ends it."""
    prompt: Sequence[int] = ()
    """Ids that it continues."""
    ids: list[int] = field(default_factory=list)
    """Tokens so far, the end marker among them where it came."""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    reason: Reason | None = None
    """Why it ended; None: it goes on."""

    def __post_init__(self) -> None:
        self.text = TextStream(self.tokenizer, self.settings.stop, strip=self.settings.strip, context=self.prompt)
        self._random: torch.Generator | None = None

    def take(self, logits: torch.Tensor, likeliest: int) -> str:
        """Choose the next token by its logits [vocab], the likeliest of which is given; returns the text that may be shown."""
        token = self._draw(logits) if self.settings.temperature > 0 else likeliest
        self.ids.append(token)
        if self.settings.top_logprobs is not None:
            self.logprobs.append(token_logprob(logits, token, self.settings.top_logprobs))
        if token in self.ends:
            return self.end("stop")
        shown = self.text.push(token)
        if self.text.stopped:
            self.reason = "stop"
        elif len(self.ids) >= self.settings.max_new_tokens:
            shown += self.end("length")
        return shown

    def end(self, reason: Reason) -> str:
        """End it here; returns the text that was held back."""
        shown = self.text.finish()
        self.reason = "stop" if self.text.stopped else reason
        return shown

    def _draw(self, logits: torch.Tensor) -> int:
        if self._random is None:  # on the CPU wherever the model is: the same seed draws the same everywhere
            self._random = torch.Generator().manual_seed(self.settings.seed % 2**63)
        # Less than the largest: a temperature near zero would overflow.
        temperature = max(self.settings.temperature, torch.finfo(torch.float32).tiny)  # smaller ones are zero in float32
        chances = ((logits.float() - logits.max().float()) / temperature).softmax(0).cpu()  # [vocab]
        if self.settings.top_p < 1:
            ordered, order = chances.sort(descending=True)
            outside = ordered.cumsum(0) - ordered >= self.settings.top_p
            outside[0] = False  # the likeliest one never is, however small top_p: 1e-46 is zero in float32
            chances[order[outside]] = 0.0
        return int(torch.multinomial(chances, 1, generator=self._random))


def token_logprob(logits: torch.Tensor, token: int, top: int) -> TokenLogprob:
    """The log-probability of `token` by the logits of its place [vocab], and the `top` likeliest tokens."""
    logprobs = logits.float().log_softmax(0)
    values, tokens = logprobs.topk(min(top, len(logprobs)))
    return TokenLogprob(token, float(logprobs[token]), tuple(zip(tokens.tolist(), values.tolist(), strict=True)))
