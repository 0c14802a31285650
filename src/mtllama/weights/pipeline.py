"""Work on slices in threads, its results in order: what runs ahead is bounded, so memory is too."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from mtllama.errors import UserError

AHEAD = 16
"""Calls that may be waiting or done before their turn."""


def threads(workers: int | None) -> ThreadPoolExecutor:
    """`workers` threads; one a core by default."""
    if workers is not None and workers < 1:
        raise UserError(f"--workers is {workers}; at least 1 is needed")
    return ThreadPoolExecutor(workers or os.cpu_count())


T = TypeVar("T")


def in_order(pool: ThreadPoolExecutor, calls: Iterable[Callable[[], T]]) -> Iterator[T]:
    """The results of `calls` in their order, while later ones run."""
    running: deque[Future[T]] = deque()
    try:
        for call in calls:
            running.append(pool.submit(call))
            if len(running) > AHEAD:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    finally:
        for each in running:
            each.cancel()


class Aside:
    """One thread more, for work whose results nobody waits for: calls are made in their order, few are ever waiting."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._waiting: deque[Future[None]] = deque()

    def call(self, function: Callable[..., None], *arguments: object) -> None:
        """Call it by and by. An error of an earlier call is raised here, or by `finish`."""
        self._waiting.append(self._thread.submit(function, *arguments))
        if len(self._waiting) > AHEAD:
            self._waiting.popleft().result()

    def finish(self) -> None:
        """Wait until all calls are done."""
        while self._waiting:
            self._waiting.popleft().result()

    def __enter__(self) -> "Aside":
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown(cancel_futures=True)
