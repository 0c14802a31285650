"""The HTTP server's routes: OpenAI's completions and chat, scoring, tasks, health and counters."""

import asyncio
import contextlib
import functools
import hmac
import json
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mtllama import __version__, api
from mtllama.data.prompt import Turn
from mtllama.errors import UserError
from mtllama.model.engine import Branches, Engine, Scored
from mtllama.model.generation import Settings, TokenLogprob
from mtllama.serve.metrics import Metrics
from mtllama.serve.requests import ChatRequest, CompletionRequest, ScoreRequest, TaskRequest
from mtllama.serve.scheduler import BusyError, ClosedError, Scheduler, Update
from mtllama.tasks.catalog import catalog

T = TypeVar("T")
MAX_BODY = 4 * 2**20
RETRY_AFTER = 1
"""Seconds after which a client is told to try again."""
CHAT_TOKENS = 512
"""New tokens at most where a chat does not say how many; fewer where the context ends."""
INTERFACE = ("/v1", "/metrics", "/openapi.json")
DONE = "data: [DONE]\n\n"


@dataclass(frozen=True)
class Serving:
    """What the routes need."""

    scheduler: Scheduler
    name: str
    metrics: Metrics
    created: int

    @property
    def engine(self) -> Engine:
        """The engine of the scheduler."""
        return self.scheduler.engine


class _Refused(Exception):
    """A request that is answered with an error in OpenAI's form."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param

    @property
    def content(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 and self.status != 429 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        headers = {"Retry-After": str(RETRY_AFTER)} if self.status in (429, 503) else None
        return JSONResponse(self.content, self.status, headers)


def make_app(
    scheduler: Scheduler, *, name: str, api_key: str | None = None, others: Sequence[Scheduler] = (), page: bool = False
) -> FastAPI:
    """The application around a scheduler, which (with `others`) it starts and closes. With a `page` the key guards the interface alone:
    the page has a log-in of its own.
    """
    serving = Serving(scheduler, name, Metrics(scheduler), int(time.time()))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        for each in (scheduler, *others):
            each.start()
        yield
        for each in (scheduler, *others):
            await run_in_threadpool(each.close)

    app = FastAPI(title="mtllama", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.serving = serving
    _add_errors(app)
    _add_openai(app, serving)
    _add_tasks(app, serving)
    _add_state(app, serving)
    # The last one added is the first that a request meets.
    app.add_middleware(_Bounded)
    if api_key:
        app.add_middleware(_Guarded, api_key=api_key, page=page)
    app.add_middleware(_Measured, metrics=serving.metrics)
    return app


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(_Refused)
    async def refused(request: Request, error: _Refused) -> Response:
        return error.response()

    @app.exception_handler(UserError)
    async def wrong(request: Request, error: UserError) -> Response:
        return _Refused(400, str(error)).response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part != "body")
        return _Refused(400, f"{place or 'body'}: {first['msg']}", param=place or None).response()

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        answer = _Refused(error.status_code, f"{request.method} {request.url.path}: {error.detail}").response()
        answer.headers.update(error.headers or {})
        return answer

    @app.exception_handler(ClientGoneError)
    async def gone(request: Request, error: ClientGoneError) -> Response:
        return Response(status_code=499)  # nobody reads it

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return _Refused(500, "the server failed at this request; its log says why").response()


def _add_openai(app: FastAPI, serving: Serving) -> None:
    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The served model."""
        return {"object": "list", "data": [_model(serving)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """The served model by its name."""
        _require_model(serving, name)
        return _model(serving)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Go on behind prompts, as they stand."""
        _require_model(serving, body.model)
        prompts = await run_in_threadpool(_completion_prompts, serving, body)
        answer = _Completion(serving, body, prompts)
        return await _answered(serving, request, answer, stream=bool(body.stream))

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answer the last message, in the model's own prompt format."""
        _require_model(serving, body.model)
        prompt = await run_in_threadpool(_chat_prompt, serving, body)
        return await _answered(serving, request, _Chat(serving, body, prompt), stream=bool(body.stream))


def _model(serving: Serving) -> dict[str, Any]:
    length = serving.engine.encoder.max_length
    return {"id": serving.name, "object": "model", "created": serving.created, "owned_by": "mtllama", "max_model_len": length}


def _require_model(serving: Serving, name: str | None) -> None:
    if name is not None and name != serving.name:
        raise _Refused(404, f"the model {name!r} is not served here; {serving.name!r} is", "model_not_found", "model")


def _completion_prompts(serving: Serving, body: CompletionRequest) -> list[list[int]]:
    encoder, rows = serving.engine.encoder, serving.engine.model.get_input_embeddings().weight.shape[0]
    prompts = []
    for prompt in body.prompts:
        ids = encoder.raw_ids(prompt) if isinstance(prompt, str) else prompt
        if max(ids) >= rows:
            raise _Refused(400, f"token id {max(ids)} is not of this model, which has {rows}", param="prompt")
        api.require_room(encoder, len(ids), body.max_tokens or 0)
        prompts.append(ids)
    return prompts


def _chat_prompt(serving: Serving, body: ChatRequest) -> list[int]:
    messages = [message.text for message in body.messages]
    system = messages.pop(0) if body.messages[0].role in ("system", "developer") else None
    history = [Turn(user, assistant) for user, assistant in zip(messages[:-1:2], messages[1::2], strict=True)]
    return api.whole_prompt(serving.engine.encoder, messages[-1], history, system)


class _Answer:
    """An answer of several continuations: how it is asked for, and how it is told whole and in pieces."""

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
        return None


class _Completion(_Answer):
    def __init__(self, serving: Serving, body: CompletionRequest, prompts: list[list[int]]) -> None:
        self.request, self.prompts, self.per_prompt = body, prompts, body.n or 1
        self.tokenizer, self.limit = serving.engine.tokenizer, body.max_tokens
        limits = [serving.engine.encoder.max_length - len(prompt) if body.max_tokens is None else body.max_tokens for prompt in prompts]
        limits = [limit for limit in limits for _ in range(self.per_prompt)]
        self.top = body.logprobs or 0
        self.silent = body.max_tokens == 0
        self.settings = [] if self.silent else [_settings(body, limit, i, body.logprobs) for i, limit in enumerate(limits)]
        self.head = _head("cmpl", "text_completion", serving)

    def scored(self) -> list[Branches]:
        if not self.request.echo or self.request.logprobs is None:
            return []
        return [Branches(prompt[:1], [prompt[1:]]) for prompt in self.prompts if len(prompt) > 1]

    def _echoed(self, index: int) -> str:
        prompt = self.request.prompts[index // self.per_prompt]
        return prompt if isinstance(prompt, str) else str(self.tokenizer.decode(prompt))

    def _choice(self, index: int, text: str, tokens: list[TokenLogprob], reason: str | None, *, echo: bool) -> dict[str, Any]:
        logprobs = None
        if self.request.logprobs is not None:
            told: list[tuple[int, TokenLogprob | None]] = [(each.token, each) for each in tokens]
            if echo:
                told = self._prompt_logprobs(index // self.per_prompt) + told
            logprobs = self._logprobs(told)
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

    def _logprobs(self, told: list[tuple[int, TokenLogprob | None]]) -> dict[str, Any]:
        tokens = [self.tokenizer.decode([token]) for token, _ in told]
        offsets, offset = [], 0
        for token in tokens:
            offsets.append(offset)
            offset += len(token)
        tops: list[dict[str, float] | None] = []
        for _, each in told:
            if each is None:
                tops.append(None)
                continue
            top: dict[str, float] = {}
            for token, logprob in (*each.top, (each.token, each.logprob)):  # tokens that read the same: the likelier one
                text = self.tokenizer.decode([token])
                top[text] = max(logprob, top.get(text, logprob))
            tops.append(top)
        return {
            "tokens": tokens,
            "token_logprobs": [each.logprob if each else None for _, each in told],
            "top_logprobs": tops,
            "text_offset": offsets,
        }

    def body(self, texts: list[str], updates: list[list[Update]], usage: dict[str, int]) -> dict[str, Any]:
        choices = []
        for index in range(len(self.prompts) * self.per_prompt):
            found = updates[index] if updates else []
            tokens = [each for update in found for each in update.logprobs]
            reason = found[-1].reason if found else "length"
            choices.append(self._choice(index, texts[index] if texts else "", tokens, reason, echo=bool(self.request.echo)))
        return {**self.head, "choices": choices, "usage": usage}

    def first_chunks(self) -> Iterable[dict[str, Any]]:
        if self.request.echo:
            for index in range(len(self.prompts) * self.per_prompt):
                yield {**self.head, "choices": [self._choice(index, "", [], "length" if self.silent else None, echo=True)]}

    def chunk(self, update: Update) -> dict[str, Any]:
        return {**self.head, "choices": [self._choice(update.index, update.text, list(update.logprobs), update.reason, echo=False)]}

    def usage_chunk(self, usage: dict[str, int]) -> dict[str, Any] | None:
        options = self.request.stream_options
        return {**self.head, "choices": [], "usage": usage} if options and options.include_usage else None


class _Chat(_Answer):
    def __init__(self, serving: Serving, body: ChatRequest, prompt: list[int]) -> None:
        self.request, self.per_prompt = body, body.n or 1
        self.tokenizer = serving.engine.tokenizer
        wanted = body.max_completion_tokens or body.max_tokens
        encoder = serving.engine.encoder
        api.require_room(encoder, len(prompt), wanted or 1)
        limit = wanted or min(CHAT_TOKENS, encoder.max_length - len(prompt))
        self.prompts = [prompt]
        top = (body.top_logprobs or 0) if body.logprobs else None
        end = encoder.format.end
        self.settings = [_settings(body, limit, i, top, end=end, strip=True) for i in range(self.per_prompt)]
        self.head = _head("chatcmpl", "chat.completion", serving)
        self.chunk_head = {**self.head, "object": "chat.completion.chunk"}

    def _logprobs(self, tokens: Iterable[TokenLogprob]) -> dict[str, Any] | None:
        if not self.request.logprobs:
            return None

        def told(token: int, logprob: float) -> dict[str, Any]:
            text = self.tokenizer.decode([token])
            return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

        return {"content": [told(each.token, each.logprob) | {"top_logprobs": [told(*pair) for pair in each.top]} for each in tokens]}

    def body(self, texts: list[str], updates: list[list[Update]], usage: dict[str, int]) -> dict[str, Any]:
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
        for index in range(self.per_prompt):
            delta = {"role": "assistant", "content": ""}
            yield {**self.chunk_head, "choices": [{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}]}

    def chunk(self, update: Update) -> dict[str, Any]:
        delta = {"content": update.text} if update.text else {}
        logprobs = self._logprobs(update.logprobs)
        return {
            **self.chunk_head,
            "choices": [{"index": update.index, "delta": delta, "logprobs": logprobs, "finish_reason": update.reason}],
        }

    def usage_chunk(self, usage: dict[str, int]) -> dict[str, Any] | None:
        options = self.request.stream_options
        return {**self.chunk_head, "choices": [], "usage": usage} if options and options.include_usage else None


def _head(prefix: str, kind: str, serving: Serving) -> dict[str, Any]:
    return {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": serving.name}


def _settings(
    body: CompletionRequest | ChatRequest, limit: int, index: int, top: int | None, *, end: str | None = None, strip: bool = False
) -> Settings:
    """Settings of the continuation number `index`; without a seed each draws its own."""
    temperature = 1.0 if body.temperature is None else body.temperature
    seed = uuid.uuid4().int if body.seed is None else body.seed + index
    stop = tuple(dict.fromkeys((*body.stops, end) if end else body.stops))
    return Settings(limit, temperature, body.top_p or 1.0, seed, stop, top, strip=strip)


async def _answered(serving: Serving, request: Request, answer: _Answer, *, stream: bool) -> Response:
    """Have an answer computed, and tell it whole or as it comes; a client that goes away frees what it held."""
    if scored := answer.scored():
        answer.echo = await _scored(serving, request, scored, top=answer.top)
    prompts = [prompt for prompt in answer.prompts for _ in range(answer.per_prompt)] if answer.settings else []
    running = _Running(serving, prompts, answer.settings)
    usage = _Usage(serving.metrics, sum(map(len, answer.prompts)))
    if stream:
        events = _events(answer, running, usage)
        return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
    found: list[list[Update]] = [[] for _ in prompts]

    async def collect() -> None:
        async for update in running.updates():
            usage.saw(update)
            found[update.index].append(update)

    try:
        await _unless_gone(request, collect())
    finally:
        running.ticket.cancel()
    return JSONResponse(answer.body(["".join(update.text for update in each) for each in found], found, usage.told()))


class _Running:
    """Continuations that the scheduler works on, as the event loop sees them."""

    def __init__(self, serving: Serving, prompts: list[list[int]], settings: list[Settings]) -> None:
        self._queue: asyncio.Queue[Update] = asyncio.Queue()
        self._open, self._loop = len(prompts), asyncio.get_running_loop()
        self.ticket = _taken(lambda: serving.scheduler.generate(prompts, settings, self._tell))

    def _tell(self, update: Update) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended: nobody listens any more
            self._loop.call_soon_threadsafe(self._queue.put_nowait, update)

    async def updates(self) -> AsyncIterator[Update]:
        """What comes, until all have ended."""
        while self._open:
            update = await self._queue.get()
            if update.error:
                raise _unfit(update.error)
            self._open -= update.last
            yield update


async def _events(answer: _Answer, running: _Running, usage: "_Usage") -> AsyncIterator[str]:
    """Server-sent events; they end early, and the slots are freed, where the client goes away."""
    try:
        for chunk in answer.first_chunks():
            yield _event(chunk)
        async for update in running.updates():
            usage.saw(update)
            yield _event(answer.chunk(update))
        if last := answer.usage_chunk(usage.told()):
            yield _event(last)
        yield DONE
    except _Refused as error:
        yield _event(error.content)
    finally:
        running.ticket.cancel()


def _event(chunk: dict[str, Any]) -> str:
    return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"


class _Usage:
    """Tokens of an answer, counted as they come."""

    def __init__(self, metrics: Metrics, prompt_tokens: int) -> None:
        self.metrics, self.prompt_tokens, self.began = metrics, prompt_tokens, time.monotonic()
        self.new_tokens = 0

    def saw(self, update: Update) -> None:
        if not self.new_tokens:
            self.metrics.first_token(time.monotonic() - self.began)
        self.new_tokens += len(update.tokens)

    def told(self) -> dict[str, int]:
        total = self.prompt_tokens + self.new_tokens
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.new_tokens, "total_tokens": total}


async def _scored(serving: Serving, request: Request, items: list[Branches], *, top: int = 0) -> list[list[Scored]]:
    ticket, future = _taken(lambda: serving.scheduler.score(items, top=top))
    try:
        return await _unless_gone(request, asyncio.wrap_future(future))
    except (_Refused, ClientGoneError):
        raise
    except Exception as error:
        raise _unfit(error) from error
    finally:
        ticket.cancel()


def _taken(take: Callable[[], T]) -> T:
    try:
        return take()
    except BusyError as error:
        raise _Refused(429, str(error), "queue_full") from error
    except ClosedError as error:
        raise _Refused(503, str(error)) from error


def _unfit(error: Exception) -> _Refused:
    if isinstance(error, ClosedError):
        return _Refused(503, str(error))
    return _Refused(500, "the model failed at this request; the server's log says why")


class ClientGoneError(Exception):
    """The client has closed the connection."""


async def _unless_gone(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client closes the connection."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        for each in (task, watch):
            each.cancel()


def _add_tasks(app: FastAPI, serving: Serving) -> None:
    @app.post("/v1/score")
    async def score(body: ScoreRequest, request: Request) -> dict[str, Any]:
        """How likely each choice is as the answer to a prompt."""
        _require_model(serving, body.model)
        item = await run_in_threadpool(api.branches, serving.engine, body.prompt, body.choices, raw=body.raw)
        (scored,) = await _scored(serving, request, [item])
        found = api.scores(body.choices, item, [each.log_probs for each in scored])
        return {"model": serving.name, **_told(found)}

    @app.get("/v1/tasks")
    async def tasks() -> dict[str, Any]:
        """The catalogue's tasks, their prompts, and the fields that each prompt asks for."""
        return {"object": "list", "data": await run_in_threadpool(_tasks)}

    @app.post("/v1/tasks/{name}/run")
    async def run_task(name: str, body: TaskRequest, request: Request) -> dict[str, Any]:
        """Ask one instance of a task: its choices ranked, or its answer generated."""
        _require_model(serving, body.model)
        if name not in catalog():
            raise _Refused(404, f"there is no task {name!r}; GET /v1/tasks lists them", "task_not_found", "name")
        task, template = api.find_question(name, body.template)
        question = await run_in_threadpool(api.ask, task, template, body.fields)
        about = {"model": serving.name, "task": task.name, "template": template.name}
        about["prompt"] = serving.engine.encoder.prompt_text(question.inputs)
        if question.choices is not None:
            item = await run_in_threadpool(api.branches, serving.engine, question.inputs, question.choices)
            (scored,) = await _scored(serving, request, [item])
            found = api.scores(question.choices, item, [each.log_probs for each in scored])
            return {**about, "answer": found.best.text, **_told(found), "probabilities": list(found.probabilities)}
        ids = await run_in_threadpool(api.prompt_ids, serving.engine, question.inputs, room=api.TASK_TOKENS)
        settings = api.answer_settings(serving.engine, api.TASK_TOKENS, stop=("\n",))
        text = await _generated(serving, request, ids, settings)
        return {**about, "answer": text, "choices": None, "best": None, "probabilities": None}


async def _generated(serving: Serving, request: Request, ids: list[int], settings: Settings) -> str:
    """The text of one continuation."""
    running = _Running(serving, [ids], [settings])

    async def collect() -> str:
        return "".join([update.text async for update in running.updates()])

    try:
        return (await _unless_gone(request, collect())).rstrip()
    finally:
        running.ticket.cancel()


def _told(found: api.Scores) -> dict[str, Any]:
    choices = [
        {
            "index": choice.index,
            "text": choice.text,
            "token_ids": list(choice.token_ids),
            "logprobs": list(choice.logprobs),
            "sum": choice.sum,
            "mean": choice.mean,
            "per_char": choice.per_char,
            "per_byte": choice.per_byte,
        }
        for choice in found.choices
    ]
    return {"choices": choices, "best": found.best.index}


@functools.cache
def _tasks() -> list[dict[str, Any]]:
    return [
        {
            "name": task.name,
            "title": task.title,
            "family": task.family,
            "role": task.role,
            "languages": list(task.languages),
            "templates": [
                {"name": each.name, "fields": list(each.fields), "choices": each.answer_choices is not None} for each in task.prompts
            ],
        }
        for task in catalog().values()
    ]


def _add_state(app: FastAPI, serving: Serving) -> None:
    @app.get("/health")
    async def health() -> dict[str, Any]:
        """Whether the server takes requests."""
        if not serving.scheduler.alive:
            raise _Refused(503, "the server is going down")
        return {"status": "ok", "model": serving.name}

    @app.get("/metrics")
    async def metrics() -> Response:
        """Counters, as Prometheus reads them."""
        return Response(serving.metrics.text(), media_type=CONTENT_TYPE_LATEST)


class _Measured:
    """Counts requests and their seconds, by route and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        began, status = time.monotonic(), 499  # nothing was sent: the client has gone

        async def seen(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, seen)
        finally:
            route = scope.get("route")
            self.metrics.request(getattr(route, "path", "other"), status, time.monotonic() - began)


class _Guarded:
    """Lets nobody in without the key, but for `/health`."""

    def __init__(self, app: ASGIApp, api_key: str, page: bool) -> None:
        self.app, self.wanted, self.page = app, f"Bearer {api_key}".encode(), page

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._guards(scope["path"]):
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self.wanted):
                answer = _Refused(
                    401, "the API key is missing or wrong; send it as: Authorization: Bearer KEY", "invalid_api_key"
                ).response()
                answer.headers["WWW-Authenticate"] = "Bearer"
                return await answer(scope, receive, send)
        await self.app(scope, receive, send)

    def _guards(self, path: str) -> bool:
        return path.startswith(INTERFACE) if self.page else path != "/health"


class _Bounded:
    """Reads a body up to `MAX_BODY` bytes before anything looks at it, and answers 413 beyond."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD"):
            return await self.app(scope, receive, send)
        parts, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            parts.append(message.get("body", b""))
            size, more = size + len(parts[-1]), message.get("more_body", False)
            if size > MAX_BODY:
                answer = _Refused(413, f"the body is larger than {MAX_BODY} bytes; send less").response()
                answer.headers["Connection"] = "close"
                return await answer(scope, receive, send)
        body: Message | None = {"type": "http.request", "body": b"".join(parts), "more_body": False}

        async def whole() -> Message:
            nonlocal body
            if body is not None:
                given, body = body, None
                return given
            return await receive()

        await self.app(scope, whole, send)
