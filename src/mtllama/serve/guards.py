"""What stands before the routes: requests are counted, let in by their key, bounded, and heard out; and how one is refused."""

import asyncio
import contextlib
import hmac
import re
import time
from typing import Any

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mtllama.serve.metrics import Metrics

MAX_BODY = 4 * 2**20
LINGER = 10.0
"""Seconds for which the rest of a body is read behind an answer that did not wait for it."""
RETRY_AFTER = 1
"""Seconds after which a client is told to try again."""
INTERFACE = ("/v1", "/metrics", "/openapi.json")
"""Where a key is asked for although there is a page, which has a log-in of its own."""
FILES = (
    "/gradio_api/upload",
    "/gradio_api/process_recording",
    "/gradio_api/file",
    "/gradio_api/proxy",
    "/gradio_api/stream",
)
"""Where gradio takes files, which it keeps on the disk for as long as it runs, and hands them out, or what another server has; the page has no
use for any."""
BEGAN = "mtllama.began"
"""Where in a request's scope it is kept when it came in (`time.monotonic`)."""


class RefusedError(Exception):
    """A request that is answered with an error in OpenAI's form."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        message = message.encode(errors="backslashreplace").decode()  # half a surrogate pair of a client's would not go into an answer
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param

    @property
    def content(self) -> dict[str, Any]:
        """The body of the answer."""
        kind = "invalid_request_error" if self.status < 500 and self.status != 429 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The answer."""
        headers = {"Retry-After": str(RETRY_AFTER)} if self.status in (429, 503) else None
        return JSONResponse(self.content, self.status, headers)


class Measured:
    """Counts requests and their seconds, by route and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        began, status = time.monotonic(), 499  # nothing was sent: the client has gone
        scope[BEGAN] = began

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


class Guarded:
    """Lets nobody in without the key, but for `/health`."""

    def __init__(self, app: ASGIApp, api_key: str, page: bool) -> None:
        self.app, self.wanted, self.page = app, f"Bearer {api_key}".encode(), page

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] == "http" and self._guards(scope["path"]):
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self.wanted):
                answer = RefusedError(
                    401, "the API key is missing or wrong; send it as: Authorization: Bearer KEY", "invalid_api_key"
                ).response()
                answer.headers["WWW-Authenticate"] = "Bearer"
                return await answer(scope, receive, send)
        await self.app(scope, receive, send)

    def _guards(self, path: str) -> bool:
        return path.startswith(INTERFACE) if self.page else path != "/health"


class Fileless:
    """Takes and gives no files for a page that needs none."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] == "http" and re.sub("/+", "/", scope["path"]).startswith(FILES):
            answer = RefusedError(403, f"{scope['method']} {scope['path']}: this page has no files").response()
            return await answer(scope, receive, send)
        await self.app(scope, receive, send)


class Bounded:
    """Reads a body up to `MAX_BODY` bytes before anything looks at it, and answers 413 beyond."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
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
                answer = RefusedError(413, f"the body is larger than {MAX_BODY} bytes; send less").response()
                return await answer(scope, receive, send)
        body: Message | None = {"type": "http.request", "body": b"".join(parts), "more_body": False}

        async def whole() -> Message:
            nonlocal body
            if body is not None:
                given, body = body, None
                return given
            return await receive()

        await self.app(scope, whole, send)


class HeardOut:
    """Reads what is left of a body behind an answer that did not wait for it, and only then lets the connection close.

    A connection that is closed over bytes which nobody has read is reset, and what the client has not received by then is lost: often the
    whole answer, sometimes only what stands behind its headers. So the answer is sent at once and whole, but its end is told to the server
    after the body's.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        unread = any(name == b"transfer-encoding" or (name == b"content-length" and value != b"0") for name, value in scope["headers"])
        held = False

        async def heard() -> Message:
            nonlocal unread
            message = await receive()
            unread = message.get("more_body", False)  # nothing is left of a client that has gone, either
            return message

        async def answered(message: Message) -> None:
            nonlocal held
            if unread and message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), (b"connection", b"close")]}
            elif unread and message["type"] == "http.response.body" and not message.get("more_body", False):
                message, held = {**message, "more_body": True}, True
            await send(message)

        try:
            await self.app(scope, heard, answered)
        finally:
            if held:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LINGER):
                        while unread:
                            await heard()
                await send({"type": "http.response.body"})
