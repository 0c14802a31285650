"""A model behind a real server on a loopback port."""

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import openai

from mtllama.model.engine import Engine
from mtllama.serve.server import bind, start

PATIENCE = 60.0
SLOW = """
import time
from mtllama.cli import main
from mtllama.model.engine import Engine
step = Engine.step
Engine.step = lambda *arguments: (time.sleep(0.05), step(*arguments))[1]
main()
"""
"""The command line, with a model that takes its time."""


@dataclass
class Served:
    url: str
    engine: Engine

    def post(self, path: str, **body: Any) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json=body, timeout=PATIENCE)

    def metric(self, name: str) -> float:
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name) and not line.startswith("#"))

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", max_retries=0, timeout=PATIENCE, **{"api_key": "none", **options})


@contextlib.contextmanager
def run_server(engine: Engine, **options: Any) -> Iterator[Served]:
    bound = bind("127.0.0.1", 0)
    server = start(engine, bound, name="pico", **options)
    thread = threading.Thread(target=server.run, args=([bound],), daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{bound.getsockname()[1]}"
    deadline = time.monotonic() + PATIENCE
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.01)
    try:
        yield Served(url, engine)
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
        assert not thread.is_alive()
