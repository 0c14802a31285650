"""A model -> a server on a port, until it is told to stop."""

import socket
from types import FrameType

import uvicorn

from mtllama.errors import UserError
from mtllama.model.engine import Engine
from mtllama.progress import say
from mtllama.serve.app import make_app
from mtllama.serve.scheduler import Limits, Scheduler

GRACE = 10.0
"""Seconds that running requests have to finish when the server is told to stop; then they return what they have."""


class _Server(uvicorn.Server):
    """Tells the scheduler at once that the end has come: it takes nothing on any more, and what runs ends in time."""

    def __init__(self, config: uvicorn.Config, scheduler: Scheduler) -> None:
        super().__init__(config)
        self.scheduler = scheduler

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.scheduler.retire(0.0 if self.should_exit else GRACE)
        super().handle_exit(sig, frame)


def bind(host: str, port: int) -> socket.socket:
    """A socket to serve on; `port` 0 takes a free one. Bound before a model is loaded: a port that is taken is told at once."""
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except (OSError, OverflowError) as error:
        bound.close()
        why = getattr(error, "strerror", None) or error
        raise UserError(f"cannot listen on {host}:{port} ({why}); choose another --port or --host") from error
    return bound


def start(
    engine: Engine, bound: socket.socket, *, name: str | None = None, api_key: str | None = None, limits: Limits | None = None
) -> uvicorn.Server:
    """A server on a socket, ready to `run([bound])`."""
    scheduler = Scheduler(engine, limits)
    app = make_app(scheduler, name=name or engine.loaded.source.name, api_key=api_key)
    bound.listen()
    return _Server(
        uvicorn.Config(
            app, log_level="warning", access_log=False, lifespan="on", timeout_graceful_shutdown=int(GRACE) + 5, server_header=False
        ),
        scheduler,
    )


def serve(
    engine: Engine, bound: socket.socket, *, name: str | None = None, api_key: str | None = None, limits: Limits | None = None
) -> None:
    """Serve on a socket until a signal ends it; says where, once requests can come."""
    host, port = bound.getsockname()[:2]
    server = start(engine, bound, name=name, api_key=api_key, limits=limits)
    say(f"{name or engine.loaded.source.name} is served at http://{f'[{host}]' if ':' in host else host}:{port}/v1 (Ctrl-C ends it)")
    server.run([bound])
