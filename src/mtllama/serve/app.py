"""The HTTP server's routes: OpenAI's completions and chat, scoring, tasks, health and counters."""

import asyncio
import contextlib
import functools
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.concurrency import iterate_in_threadpool, run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.routing import Match

from mtllama import __version__, api
from mtllama.data.prompt import Turn
from mtllama.errors import UserError
from mtllama.model.engine import Branches, Engine, Scored
from mtllama.model.generation import Settings
from mtllama.serve.answers import Answer, Chat, Completion
from mtllama.serve.guards import BEGAN, Bounded, Fileless, Guarded, HeardOut, Measured, RefusedError
from mtllama.serve.metrics import Metrics
from mtllama.serve.requests import ChatRequest, CompletionRequest, ScoreRequest, TaskRequest
from mtllama.serve.scheduler import BusyError, ClosedError, Scheduler, Update
from mtllama.tasks.catalog import catalog

T = TypeVar("T")
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
    _add_errors(app)
    _add_openai(app, serving)
    _add_tasks(app, serving)
    _add_state(app, serving)
    if page:
        _add_elsewhere(app)
    # The last one added is the first that a request meets.
    app.add_middleware(Bounded)
    if page:
        app.add_middleware(Fileless)
    if api_key is not None:
        app.add_middleware(Guarded, api_key=api_key, page=page)
    app.add_middleware(Measured, metrics=serving.metrics)
    app.add_middleware(HeardOut)
    return app


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(RefusedError)
    async def refused(request: Request, error: RefusedError) -> Response:
        return error.response()

    @app.exception_handler(UserError)
    async def wrong(request: Request, error: UserError) -> Response:
        return RefusedError(400, str(error)).response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part != "body")
        return RefusedError(400, f"{place or 'body'}: {first['msg']}", param=place or None).response()

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        answer = RefusedError(error.status_code, f"{request.method} {request.url.path}: {error.detail}").response()
        answer.headers.update(error.headers or {})
        return answer

    @app.exception_handler(ClientGoneError)
    async def gone(request: Request, error: ClientGoneError) -> Response:
        return Response(status_code=499)  # nobody reads it

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return RefusedError(500, "the server failed at this request; its log says why").response()


def _add_elsewhere(app: FastAPI) -> None:
    """The page is mounted at the root behind the routes, and would answer in its own form for what they do not."""

    @app.api_route("/v1/{path:path}", methods=["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"], include_in_schema=False)
    async def elsewhere(request: Request) -> Response:
        scope = {**request.scope, "route": None}
        known = any(route.matches(scope)[0] is Match.PARTIAL for route in app.routes)
        raise HTTPException(405, "Method Not Allowed") if known else HTTPException(404, "Not Found")


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
        answer = Completion(serving.engine, serving.name, body, prompts)
        return await _answered(serving, request, answer, stream=bool(body.stream))

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answer the last message, in the model's own prompt format."""
        _require_model(serving, body.model)
        prompt = await run_in_threadpool(_chat_prompt, serving, body)
        return await _answered(serving, request, Chat(serving.engine, serving.name, body, prompt), stream=bool(body.stream))


def _model(serving: Serving) -> dict[str, Any]:
    length = serving.engine.encoder.max_length
    return {"id": serving.name, "object": "model", "created": serving.created, "owned_by": "mtllama", "max_model_len": length}


def _require_model(serving: Serving, name: str | None) -> None:
    if name is not None and name != serving.name:
        raise RefusedError(404, f"the model {name!r} is not served here; {serving.name!r} is", "model_not_found", "model")


def _completion_prompts(serving: Serving, body: CompletionRequest) -> list[list[int]]:
    encoder, rows = serving.engine.encoder, serving.engine.model.get_input_embeddings().weight.shape[0]
    prompts = []
    for prompt in body.prompts:
        ids = encoder.raw_ids(prompt) if isinstance(prompt, str) else prompt
        if max(ids) >= rows:
            raise RefusedError(400, f"token id {max(ids)} is not of this model, which has {rows}", param="prompt")
        api.require_room(encoder, len(ids), body.max_tokens or 0)
        prompts.append(ids)
    return prompts


def _chat_prompt(serving: Serving, body: ChatRequest) -> list[int]:
    messages = [message.text for message in body.messages]
    system = messages.pop(0) if body.messages[0].role in ("system", "developer") else None
    history = [Turn(user, assistant) for user, assistant in zip(messages[:-1:2], messages[1::2], strict=True)]
    return api.whole_prompt(serving.engine.encoder, messages[-1], history, system)


async def _answered(serving: Serving, request: Request, answer: Answer, *, stream: bool) -> Response:
    """Have an answer computed, and tell it whole or as it comes; a client that goes away frees what it held."""
    if scored := answer.scored():
        answer.echo = await _scored(serving, request, scored, top=answer.top)
    prompts = [prompt for prompt in answer.prompts for _ in range(answer.per_prompt)] if answer.settings else []
    running = _Running(serving, prompts, answer.settings)
    usage = _Usage(serving.metrics, sum(map(len, answer.prompts)), request.scope[BEGAN])
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
    texts = ["".join(update.text for update in each) for each in found]
    # In a thread: hundreds of thousands of log-probabilities would keep everybody waiting.
    return await run_in_threadpool(lambda: JSONResponse(answer.body(texts, found, usage.told())))


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


async def _events(answer: Answer, running: _Running, usage: "_Usage") -> AsyncIterator[str]:
    """Server-sent events; they end early, and the slots are freed, where the client goes away."""
    try:
        async for event in iterate_in_threadpool(map(_event, answer.first_chunks())):
            yield event
        async for update in running.updates():
            usage.saw(update)
            yield _event(answer.chunk(update))
        if last := answer.usage_chunk(usage.told()):
            yield _event(last)
        yield DONE
    except RefusedError as error:
        yield _event(error.content)
    finally:
        running.ticket.cancel()


def _event(chunk: dict[str, Any]) -> str:
    return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"


class _Usage:
    """Tokens of an answer, counted as they come."""

    def __init__(self, metrics: Metrics, prompt_tokens: int, began: float) -> None:
        self.metrics, self.prompt_tokens, self.began = metrics, prompt_tokens, began
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
    except (RefusedError, ClientGoneError):
        raise
    except Exception as error:
        raise _unfit(error) from error
    finally:
        ticket.cancel()


def _taken(take: Callable[[], T]) -> T:
    try:
        return take()
    except BusyError as error:
        raise RefusedError(429, str(error), "queue_full") from error
    except ClosedError as error:
        raise RefusedError(503, str(error)) from error


def _unfit(error: Exception) -> RefusedError:
    if isinstance(error, ClosedError):
        return RefusedError(503, str(error))
    return RefusedError(500, "the model failed at this request; the server's log says why")


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
            raise RefusedError(404, f"there is no task {name!r}; GET /v1/tasks lists them", "task_not_found", "name")
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
            raise RefusedError(503, "the server is going down")
        return {"status": "ok", "model": serving.name}

    @app.get("/metrics")
    async def metrics() -> Response:
        """Counters, as Prometheus reads them."""
        return Response(serving.metrics.text(), media_type=CONTENT_TYPE_LATEST)
