"""A model -> a server on a port, until it is told to stop."""

import socket
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import uvicorn

from mtllama.errors import UserError
from mtllama.model.engine import Engine
from mtllama.progress import say
from mtllama.serve.app import make_app
from mtllama.serve.scheduler import Limits, Scheduler

GRACE = 10.0
"""Seconds that running requests have to finish when the server is told to stop; then they return what they have."""


class Server(uvicorn.Server):
    """Tells the scheduler at once that the end has come: it takes nothing on any more, and what runs ends in time."""

    def __init__(self, config: uvicorn.Config, name: str, schedulers: tuple[Scheduler, ...], *, page: bool) -> None:
        super().__init__(config)
        self.name, self.schedulers, self.page = name, schedulers, page

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal is how a server ends: unlike uvicorn's own, the process then ends as one that has done its work."""
        for scheduler in self.schedulers:
            scheduler.retire(0.0 if self.should_exit else GRACE)
        self.force_exit, self.should_exit = self.should_exit, True


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


@dataclass(frozen=True)
class PageSettings:
    """What the page shows besides the model."""

    other: Engine | None = None
    """A second model, whose answers stand beside the first one's."""
    report: Path | None = None
    data_dir: Path = Path("sampler")
    """Where random examples come from."""


def start(
    engine: Engine,
    bound: socket.socket,
    *,
    name: str | None = None,
    api_key: str | None = None,
    limits: Limits | None = None,
    page: PageSettings | None = None,
) -> Server:
    """A server on a socket, ready to `run([bound])`; with a page, if settings for it are given."""
    if api_key is not None and not api_key.strip():
        raise UserError("the API key is empty; give one, or none at all to let everybody in")
    scheduler, name = Scheduler(engine, limits), name or engine.loaded.source.name
    other = Scheduler(page.other, limits) if page and page.other else None
    schedulers = (scheduler, other) if other else (scheduler,)
    app = make_app(scheduler, name=name, api_key=api_key, others=schedulers[1:], page=page is not None)
    if page:
        from mtllama.serve.page import Page, Shown, mount

        beside = Shown(other.engine.loaded.source.name, other) if other else None
        mount(app, Page(Shown(name, scheduler), beside, page.report, page.data_dir, engine.loaded.source.delta), password=api_key)
    bound.listen()
    grace = int(GRACE) + 5
    config = uvicorn.Config(app, log_level="warning", access_log=False, lifespan="on", timeout_graceful_shutdown=grace, server_header=False)
    return Server(config, name, schedulers, page=page is not None)


def serve(server: Server, bound: socket.socket) -> None:
    """Run a server until a signal ends it; says first what is served where."""
    host, port = bound.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    say(f"{server.name} is served at {address}/v1{f', its page at {address}' if server.page else ''} (Ctrl-C ends it)")
    server.run([bound])
