"""Answers in OpenAI's form: how completions and chats are asked for, and how they are told, whole and in pieces."""

import time
import uuid
from collections.abc import Iterable
from typing import Any

from mtllama import api
from mtllama.errors import UserError
from mtllama.model.engine import Branches, Engine, Scored
from mtllama.model.generation import Settings, TokenLogprob
from mtllama.serve.requests import ChatRequest, CompletionRequest
from mtllama.serve.scheduler import Update
from mtllama.serve.token_text import Offsets, TokenBytes

CHAT_TOKENS = 512
"""New tokens at most where a chat does not say how many; fewer where the context ends."""

MAX_TOLD = 2**19
"""Log-probabilities that one answer may hold: some 30 MB of JSON."""


class Answer:
    """An answer of several continuations: how it is asked for, and how it is told whole and in pieces."""

    request: CompletionRequest | ChatRequest
    chunk_head: dict[str, Any]
    """What every piece of a stream begins with."""
    prompts: list[list[int]]
    settings: list[Settings]
    """One for each continuation; `per_prompt` of them for each prompt."""
    per_prompt: int
    top = 0
    """Likeliest tokens that are told of each place of a prompt."""
    echo: "list[list[Scored]] | None" = None
    """Log-probabilities of the prompts' own tokens, where they are told."""

    def scored(self) -> list[Branches]:
        """What has to be scored before anything is told."""
        return []

    def body(self, texts: list[str], updates: list[list[Update]], usage: dict[str, int]) -> dict[str, Any]:
        """The whole answer."""
        raise NotImplementedError

    def first_chunks(self) -> Iterable[dict[str, Any]]:
        """What a stream begins with."""
        return ()

    def chunk(self, update: Update) -> dict[str, Any]:
        """A piece of a stream."""
        raise NotImplementedError

    def usage_chunk(self, usage: dict[str, int]) -> dict[str, Any] | None:
        """The last piece of a stream, where usage is asked for."""
        options = self.request.stream_options
        return {**self.chunk_head, "choices": [], "usage": usage} if options and options.include_usage else None


class Completion(Answer):
    """Of `/v1/completions`."""

    request: CompletionRequest

    def __init__(self, engine: Engine, name: str, body: CompletionRequest, prompts: list[list[int]]) -> None:
        self.request, self.prompts, self.per_prompt = body, prompts, body.n or 1
        self.tokenizer, self.tokens = engine.tokenizer, TokenBytes(engine.tokenizer)
        self._offsets: dict[int, Offsets] = {}
        limits = [engine.encoder.max_length - len(prompt) if body.max_tokens is None else body.max_tokens for prompt in prompts]
        limits = [limit for limit in limits for _ in range(self.per_prompt)]
        self.top = body.logprobs or 0
        if body.logprobs is not None:
            echoed = sum(map(len, prompts)) * self.per_prompt if body.echo else 0
            _require_few(echoed + sum(limits), self.top)
        self.silent = body.max_tokens == 0
        self.settings = (
            [] if self.silent else [_settings(engine, body, limit, i, body.logprobs, raw=True) for i, limit in enumerate(limits)]
        )
        self.head = self.chunk_head = _head("cmpl", "text_completion", name)

    def scored(self) -> list[Branches]:
        """The prompts, each token behind those before it, where their log-probabilities are told."""
        if not self.request.echo or self.request.logprobs is None:
            return []
        return [Branches(prompt[:1], [prompt[1:]]) for prompt in self.prompts if len(prompt) > 1]

    def _echoed(self, index: int) -> str:
        prompt = self.request.prompts[index // self.per_prompt]
        return prompt if isinstance(prompt, str) else str(self.tokenizer.decode(prompt))

    def _choice(self, index: int, text: str, tokens: list[TokenLogprob], reason: str | None, *, echo: bool) -> dict[str, Any]:
        logprobs = None
        if self.request.logprobs is not None:
            echoed = self._prompt_logprobs(index // self.per_prompt) if echo else []
            if index not in self._offsets:
                self._offsets[index] = self._first_offsets(index // self.per_prompt, echo)
            logprobs = self._logprobs(echoed, tokens, self._offsets[index])
        shown = self._echoed(index) + text if echo else text
        return {"index": index, "text": shown, "logprobs": logprobs, "finish_reason": reason}

    def _prompt_logprobs(self, number: int) -> list[tuple[int, TokenLogprob | None]]:
        prompt = self.prompts[number]
        if len(prompt) == 1:
            return [(prompt[0], None)]
        assert self.echo is not None
        place = sum(len(each) > 1 for each in self.prompts[:number])
        (found,) = self.echo[place]
        tops = [top[: self.request.logprobs] for top in found.top] or [()] * len(found.log_probs)
        rows = [TokenLogprob(*each) for each in zip(prompt[1:], found.log_probs, tops, strict=True)]
        return [(prompt[0], None), *zip(prompt[1:], rows, strict=True)]

    def _first_offsets(self, number: int, echo: bool) -> Offsets:
        """Places in a text that begins with the prompt, where it is told too."""
        offsets = Offsets(self.tokens)
        if echo:  # what the ids begin with and the text does not
            prompt = self.prompts[number]
            ids = b"".join(map(self.tokens.of, prompt)).decode(errors="replace")
            text = self._echoed(number * self.per_prompt)
            if ids.endswith(text):
                offsets.unwritten(len(ids) - len(text))
        return offsets

    def _logprobs(self, echoed: list[tuple[int, TokenLogprob | None]], tokens: list[TokenLogprob], offsets: Offsets) -> dict[str, Any]:
        told = [*echoed, *((each.token, each) for each in tokens)]
        tops: list[dict[str, float] | None] = []
        for _, each in told:
            if each is None:
                tops.append(None)
                continue
            top: dict[str, float] = {}
            for token, logprob in (*each.top, (each.token, each.logprob)):  # tokens that read the same: the likelier one
                text = self.tokens.text(token)
                top[text] = max(logprob, top.get(text, logprob))
            tops.append(top)
        return {
            "tokens": [self.tokens.text(token) for token, _ in told],
            "token_logprobs": [each.logprob if each else None for _, each in told],
            "top_logprobs": tops,
            "text_offset": offsets.take(token for token, _ in echoed) + offsets.take((each.token for each in tokens), special=False),
        }

    def body(self, texts: list[str], updates: list[list[Update]], usage: dict[str, int]) -> dict[str, Any]:
        """The whole answer."""
        choices = []
        for index in range(len(self.prompts) * self.per_prompt):
            found = updates[index] if updates else []
            tokens = [each for update in found for each in update.logprobs]
            reason = found[-1].reason if found else "length"
            choices.append(self._choice(index, texts[index] if texts else "", tokens, reason, echo=bool(self.request.echo)))
        return {**self.head, "choices": choices, "usage": usage}

    def first_chunks(self) -> Iterable[dict[str, Any]]:
        """What a stream begins with."""
        if self.request.echo:
            for index in range(len(self.prompts) * self.per_prompt):
                yield {**self.head, "choices": [self._choice(index, "", [], "length" if self.silent else None, echo=True)]}

    def chunk(self, update: Update) -> dict[str, Any]:
        """A piece of a stream."""
        return {**self.head, "choices": [self._choice(update.index, update.text, list(update.logprobs), update.reason, echo=False)]}


def _require_few(tokens: int, top: int) -> None:
    if (told := tokens * (top + 1)) > MAX_TOLD:
        raise UserError(
            f"the answer could have {told:,} log-probabilities; at most {MAX_TOLD:,} are told: ask for fewer tokens, answers (n) or logprobs"
        )


class Chat(Answer):
    """Of `/v1/chat/completions`."""

    request: ChatRequest

    def __init__(self, engine: Engine, name: str, body: ChatRequest, prompt: list[int]) -> None:
        self.request, self.per_prompt = body, body.n or 1
        self.tokens = TokenBytes(engine.tokenizer)
        wanted = body.max_completion_tokens or body.max_tokens
        encoder = engine.encoder
        api.require_room(encoder, len(prompt), wanted or 1)
        limit = wanted or min(CHAT_TOKENS, encoder.max_length - len(prompt))
        self.prompts = [prompt]
        top = (body.top_logprobs or 0) if body.logprobs else None
        if top is not None:
            _require_few(limit * self.per_prompt, top)
        self.settings = [_settings(engine, body, limit, i, top, raw=False) for i in range(self.per_prompt)]
        self.head = _head("chatcmpl", "chat.completion", name)
        self.chunk_head = {**self.head, "object": "chat.completion.chunk"}

    def _logprobs(self, tokens: Iterable[TokenLogprob]) -> dict[str, Any] | None:
        if not self.request.logprobs:
            return None

        def told(token: int, logprob: float) -> dict[str, Any]:
            return {"token": self.tokens.text(token), "logprob": logprob, "bytes": list(self.tokens.of(token))}

        return {"content": [told(each.token, each.logprob) | {"top_logprobs": [told(*pair) for pair in each.top]} for each in tokens]}

    def body(self, texts: list[str], updates: list[list[Update]], usage: dict[str, int]) -> dict[str, Any]:
        """The whole answer."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": text, "refusal": None},
                "logprobs": self._logprobs(each for update in found for each in update.logprobs),
                "finish_reason": found[-1].reason,
            }
            for index, (text, found) in enumerate(zip(texts, updates, strict=True))
        ]
        return {**self.head, "choices": choices, "usage": usage}

    def first_chunks(self) -> Iterable[dict[str, Any]]:
        """What a stream begins with."""
        for index in range(self.per_prompt):
            delta = {"role": "assistant", "content": ""}
            yield {**self.chunk_head, "choices": [{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}]}

    def chunk(self, update: Update) -> dict[str, Any]:
        """A piece of a stream."""
        delta = {"content": update.text} if update.text else {}
        logprobs = self._logprobs(update.logprobs)
        return {
            **self.chunk_head,
            "choices": [{"index": update.index, "delta": delta, "logprobs": logprobs, "finish_reason": update.reason}],
        }


def _head(prefix: str, kind: str, name: str) -> dict[str, Any]:
    return {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": name}


def _settings(engine: Engine, body: CompletionRequest | ChatRequest, limit: int, index: int, top: int | None, *, raw: bool) -> Settings:
    """Settings of the continuation number `index`; without a seed each draws its own."""
    return api.answer_settings(
        engine,
        limit,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=body.top_p or 1.0,
        seed=uuid.uuid4().int if body.seed is None else body.seed + index,
        stop=body.stops,
        top_logprobs=top,
        raw=raw,
    )
