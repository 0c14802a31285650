"""Continuous batching: requests join and leave the running batch of one model, which one thread computes.

Every round reads what is to be scored (up to a pass), then the prompts of new requests, as many as there is room for,
and then goes on by one token in all that run. A request that is done, cancelled or out of time leaves its slot at once.
"""

import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch

from mtllama.model.engine import TOKENS_PER_PASS, Branches, BrokenLogitsError, Engine, Scored
from mtllama.model.generation import Generation, Reason, Settings, TokenLogprob
from mtllama.model.packed import Cache
from mtllama.progress import say

WIDTH_STEP = 256
"""Places by which a cache is made wider."""
PASSES = 16
"""How often a request that needs more room than there is lets others go before it; then all wait until it has its room."""


@dataclass(frozen=True)
class Limits:
    """What a server takes on."""

    max_batch: int = 16
    """Continuations that run together."""
    max_queue: int = 128
    """Prompts that wait, to be continued or scored."""
    max_seconds: float = 120.0
    """From arrival on; a continuation then ends with what it has."""
    cache_bytes: int = 2**30
    """Memory for the keys and values of what runs; one request may take more."""


class BusyError(Exception):
    """The queue is full."""


class ClosedError(Exception):
    """The server is going down, or the request waited for longer than its time."""


@dataclass(frozen=True)
class Update:
    """What one round brought to a continuation."""

    index: int
    """Which of the request's continuations it is."""
    text: str
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    reason: Reason | None = None
    error: Exception | None = None

    @property
    def last(self) -> bool:
        """Whether nothing more comes of this continuation."""
        return self.reason is not None or self.error is not None


@dataclass(eq=False)
class Ticket:
    """A request that was taken on; whoever holds it may cancel it."""

    deadline: float
    cancelled: bool = False

    def cancel(self) -> None:
        """Nobody waits for it any more: it leaves before the next round, and is told nothing."""
        self.cancelled = True


@dataclass(eq=False)
class _Sequence:
    """One continuation of a request."""

    ticket: Ticket
    index: int
    prompt: list[int]
    generation: Generation
    tell: Callable[[Update], None]
    told: int = 0  # tokens that it was told of
    passed: int = 0  # how many went before it that came later
    ended: bool = False  # whether it was told its end, behind which it hears nothing, not even of a fault

    @property
    def width(self) -> int:
        return len(self.prompt) + self.generation.settings.max_new_tokens

    def say(self, text: str, error: Exception | None = None) -> None:
        generation, new = self.generation, slice(self.told, None)
        reason = generation.reason
        if self.ended or not (text or reason or error or generation.settings.top_logprobs is not None):
            return
        update = Update(self.index, text, tuple(generation.ids[new]), tuple(generation.logprobs[new]), None if error else reason, error)
        self.told, self.ended = len(generation.ids), update.last
        if not self.ticket.cancelled:
            self.tell(update)


@dataclass(eq=False)
class _Scoring:
    """Prompts and answers of one request that are to be scored."""

    ticket: Ticket
    items: list[Branches]
    top: int
    future: "Future[list[list[Scored]]]"
    next: int = 0  # the first item that was not taken into a pass
    found: dict[int, list[Scored]] = field(default_factory=dict)


@dataclass
class Load:
    """What a scheduler did so far."""

    prompt_tokens: int = 0
    generated_tokens: int = 0
    scored_tokens: int = 0
    cancelled: int = 0


class Scheduler:
    """The only one who calls the model of a server. Threads and event loops give it requests; it tells them what it finds."""

    def __init__(self, engine: Engine, limits: Limits | None = None) -> None:
        self.engine, self.limits = engine, limits or Limits()
        self.load = Load()
        self._places = self.limits.cache_bytes // engine.bytes_per_place()
        self._changed = threading.Condition()
        self._waiting: deque[_Sequence] = deque()
        self._scorings: deque[_Scoring] = deque()
        self._running: list[_Sequence] = []  # in the order of the cache's slots
        self._cache: Cache | None = None
        self._closing: float | None = None  # until when what runs may go on
        self._thread = threading.Thread(target=self._run, name="mtllama-scheduler", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether it takes requests on."""
        return self._thread.is_alive() and self._closing is None

    @property
    def running(self) -> int:
        """Continuations in the batch."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Prompts that wait, to be continued or scored."""
        with self._changed:
            return len(self._waiting) + sum(len(scoring.items) - scoring.next for scoring in self._scorings)

    def retire(self, grace: float) -> None:
        """Take nothing on any more; what runs may finish within `grace` seconds, and then ends with what it has."""
        with self._changed:
            self._closing = min(self._closing or math.inf, time.monotonic() + grace)  # asked again, it may end sooner
            self._changed.notify()

    def close(self) -> None:
        """Retire without grace, unless it was done before, and wait until nothing runs."""
        if self._closing is None:
            self.retire(0.0)
        if self._thread.is_alive():
            self._thread.join()

    def generate(self, prompts: Sequence[list[int]], settings: Sequence[Settings], tell: Callable[[Update], None]) -> Ticket:
        """Continue prompts, each with settings of its own. `tell` is called from the scheduler's thread; it must not block or fail.

        Raises `BusyError` or `ClosedError`; then nothing of the request was taken on.
        """
        ticket = Ticket(time.monotonic() + self.limits.max_seconds)
        sequences = [
            _Sequence(ticket, index, prompt, self.engine.generation(prompt, each), tell)
            for index, (prompt, each) in enumerate(zip(prompts, settings, strict=True))
        ]
        with self._changed:
            self._require_room(len(sequences))
            self._waiting += sequences
            self._changed.notify()
        return ticket

    def stream(self, prompt: list[int], settings: Settings) -> Iterator[str]:
        """The text of one continuation in pieces, for a thread that waits for it; closing the iterator frees the slot."""
        updates: queue.SimpleQueue[Update] = queue.SimpleQueue()
        ticket = self.generate([prompt], [settings], updates.put)
        try:
            while True:
                update = updates.get()
                if update.error:
                    raise update.error
                if update.text:
                    yield update.text
                if update.last:
                    return
        finally:
            ticket.cancel()

    def score(self, items: Sequence[Branches], *, top: int = 0) -> tuple[Ticket, "Future[list[list[Scored]]]"]:
        """Score answers behind prompts, as `Engine.judge` does. Raises as `generate` does."""
        future: Future[list[list[Scored]]] = Future()
        future.set_running_or_notify_cancel()  # whoever waits may go away at any moment: only the ticket cancels
        ticket = Ticket(time.monotonic() + self.limits.max_seconds)
        with self._changed:
            self._require_room(len(items))
            if items:
                self._scorings.append(_Scoring(ticket, list(items), top, future))
                self._changed.notify()
            else:
                future.set_result([])
        return ticket, future

    def _require_room(self, more: int) -> None:
        if self._closing is not None:
            raise ClosedError("the server is going down")
        waiting = self.waiting
        # A request of many prompts is served where nothing waits.
        if waiting and waiting + more > self.limits.max_queue:
            raise BusyError(f"{waiting} prompts wait already; try again later")

    @torch.inference_mode()
    def _run(self) -> None:
        going = True
        while going:
            try:
                going = self._round()
            except Exception as error:  # a fault of this file: whoever runs is told, and the others are served on
                failed, self._running, self._cache = self._running, [], None
                self._failed(failed, error)

    def _round(self) -> bool:
        """Wait for something to do, and do some of it; False where nothing is left and nothing may come."""
        with self._changed:
            while not (self._waiting or self._scorings or self._running or self._closing is not None):
                self._cache = None  # an idle server holds no keys and values
                self._changed.wait()
            self._drop()
            if self._closing is not None and not (self._waiting or self._scorings or self._running):
                return False
            units, new = self._take_scorings(), self._take_waiting()
        if units:
            self._score(units)
        if new:
            self._begin(new)
        if self._running:
            self._step()
        return True

    def _drop(self) -> None:
        """Let go of what was cancelled, is out of time, or is cut off by the end of the server."""
        now = time.monotonic()
        over = self._closing is not None and now >= self._closing
        for slot in reversed(range(len(self._running))):
            sequence = self._running[slot]
            if sequence.ticket.cancelled:
                self.load.cancelled += 1
                self._leave(slot)
            elif over or now >= sequence.ticket.deadline:
                sequence.say(sequence.generation.end("length"))
                self._leave(slot)
        waiting, scorings = list(self._waiting), list(self._scorings)
        self._waiting.clear()
        self._scorings.clear()
        late = ClosedError("the server is going down" if over else "the server is busy: the request waited for longer than its time")
        for sequence in waiting:
            if sequence.ticket.cancelled:
                self.load.cancelled += 1
            elif over or now >= sequence.ticket.deadline:
                sequence.say("", late)
            else:
                self._waiting.append(sequence)
        for scoring in scorings:
            if scoring.ticket.cancelled:
                self.load.cancelled += 1
            elif over or now >= scoring.ticket.deadline:
                scoring.future.set_exception(late)
            else:
                self._scorings.append(scoring)

    def _leave(self, slot: int) -> None:
        assert self._cache is not None
        self._running[slot] = self._running[self._cache.leave(slot)]
        self._running.pop()

    def _take_scorings(self) -> list[tuple[_Scoring, int]]:
        """What is scored in the next pass: up to a pass of tokens, or one item."""
        units: list[tuple[_Scoring, int]] = []
        tokens = 0
        for scoring in list(self._scorings):
            while scoring.next < len(scoring.items):
                size = len(scoring.items[scoring.next])
                if units and tokens + size > TOKENS_PER_PASS:
                    return units
                units.append((scoring, scoring.next))
                tokens += size
                scoring.next += 1
            self._scorings.popleft()
        return units

    def _take_waiting(self) -> list[_Sequence]:
        """Who joins: in the order of arrival, while there are slots, memory, and tokens left of a pass. One that would make all slots so wide
        that there is none for it lets narrower ones pass, but not for ever.
        """
        new: list[_Sequence] = []
        back: list[_Sequence] = []  # those that let others pass
        tokens, width = 0, self._width_of(self._running)
        while self._waiting:
            sequence = self._waiting[0]
            wider = max(width, self._width(sequence))
            taken = len(self._running) + len(new)
            if taken >= self._slots(max(width, WIDTH_STEP)) or any(each.passed >= PASSES for each in back):
                break
            if taken >= self._slots(wider):
                back.append(self._waiting.popleft())
                continue
            if new and tokens + len(sequence.prompt) > TOKENS_PER_PASS:
                break
            tokens, width = tokens + len(sequence.prompt), wider
            new.append(self._waiting.popleft())
            for each in back:
                each.passed += 1
        self._waiting.extendleft(reversed(back))
        return new

    def _make_room(self, new: list[_Sequence]) -> Cache:
        """A cache that has room for those that run and for `new`; slots are doubled as more join, so that a lone request needs one. It is made
        narrower, once all that needed its width have left, where there would not be room for so many.
        """
        cache, count = self._cache or Cache(0, 0), len(self._running) + len(new)
        needed = self._width_of([*self._running, *new])
        width = needed if count > self._slots(max(cache.width, WIDTH_STEP)) else max(cache.width, needed)
        if width != cache.width or count > cache.slots:
            cache = cache.resized(min(self._slots(width), 1 << (count - 1).bit_length()), width)
        self._cache = cache
        return cache

    def _width_of(self, sequences: Sequence[_Sequence]) -> int:
        """How wide the slots must be that these can run together."""
        return max(map(self._width, sequences), default=0)

    def _width(self, sequence: _Sequence) -> int:
        return -(-sequence.width // WIDTH_STEP) * WIDTH_STEP

    def _slots(self, width: int) -> int:
        return max(1, min(self.limits.max_batch, self._places // width))

    def _score(self, units: list[tuple[_Scoring, int]]) -> None:
        try:
            results = self.engine.judge([scoring.items[i] for scoring, i in units], top=max(scoring.top for scoring, _ in units))
            for number, result in enumerate(results):
                if not all(math.isfinite(value) for answer in result for value in answer.log_probs):
                    raise BrokenLogitsError(self.engine.loaded.source.name, number)
        except Exception as error:
            if len({id(scoring) for scoring, _ in units}) > 1:  # one of them is at fault: each by itself
                for scoring in dict.fromkeys(scoring for scoring, _ in units):
                    self._score([unit for unit in units if unit[0] is scoring])
                return
            scoring = units[0][0]
            if not scoring.future.done():
                say(f"scoring failed: {' '.join(str(error).split())[:300]}")
                scoring.future.set_exception(error)
            scoring.ticket.cancel()  # what is left of it is not looked at
            return
        for (scoring, i), result in zip(units, results, strict=True):
            scoring.found[i] = result
            self.load.scored_tokens += len(scoring.items[i])
            if len(scoring.found) == len(scoring.items) and not scoring.future.done():
                scoring.future.set_result([scoring.found[i] for i in range(len(scoring.items))])

    def _begin(self, new: list[_Sequence]) -> None:
        """Read prompts into the next slots."""
        before = len(self._running)
        try:
            logits = self.engine.begin([sequence.prompt for sequence in new], self._make_room(new))
        except Exception as error:
            if self._cache:
                del self._cache.lengths[before:]
            if len(new) > 1:  # one of them is at fault: each by itself
                for sequence in new:
                    self._begin([sequence])
            else:
                self._failed(new, error)
            return
        self._running += new
        self.load.prompt_tokens += sum(len(sequence.prompt) for sequence in new)
        self._go_on(before, logits)

    def _step(self) -> None:
        """One more token for all that run."""
        assert self._cache is not None
        try:
            logits = self.engine.step([sequence.generation.ids[-1] for sequence in self._running], self._cache)
        except Exception as error:
            failed, self._running, self._cache = self._running, [], None
            self._failed(failed, error)
            return
        self._go_on(0, logits)

    def _go_on(self, first: int, logits: torch.Tensor) -> None:
        """Give the sequences from slot `first` on their next token. logits: [sequences, vocab]"""
        likeliest = self.engine.likeliest(logits)
        for slot in reversed(range(first, len(self._running))):  # from behind: those that move have been looked at
            sequence = self._running[slot]
            token = likeliest[slot - first]
            try:
                if token is None:
                    raise BrokenLogitsError(self.engine.loaded.source.name, sequence.index)
                text = sequence.generation.take(logits[slot - first], token)
            except Exception as error:
                self._failed([sequence], error)
                self._leave(slot)
                continue
            self.load.generated_tokens += 1
            sequence.say(text)
            if sequence.generation.reason is not None:
                self._leave(slot)

    def _failed(self, sequences: list[_Sequence], error: Exception) -> None:
        say(f"generation failed: {' '.join(str(error).split())[:300]}")
        for sequence in sequences:
            sequence.say("", error)
