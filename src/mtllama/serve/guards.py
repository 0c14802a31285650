"""What stands before the routes: requests are counted, let in by their key, and bounded; and how one is refused."""

import hmac
import time
from typing import Any

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mtllama.serve.metrics import Metrics

MAX_BODY = 4 * 2**20
RETRY_AFTER = 1
"""Seconds after which a client is told to try again."""
INTERFACE = ("/v1", "/metrics", "/openapi.json")
"""Where a key is asked for although there is a page, which has a log-in of its own."""


class RefusedError(Exception):
    """A request that is answered with an error in OpenAI's form."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
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
