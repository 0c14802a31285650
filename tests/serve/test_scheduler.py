"""Requests that run together get what each would get alone; one that goes wrong, is cancelled or late harms no other."""

import math
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from mtllama.model.engine import Branches, BrokenLogitsError, Engine
from mtllama.model.generation import Settings
from mtllama.model.packed import Cache
from mtllama.serve.scheduler import PASSES, WIDTH_STEP, BusyError, ClosedError, Limits, Scheduler, Update

PATIENCE = 60.0


@pytest.fixture
def scheduler(engine: Engine) -> Iterator[Callable[..., Scheduler]]:
    made: list[Scheduler] = []

    def make(**limits: Any) -> Scheduler:
        made.append(Scheduler(engine, Limits(**limits)))
        made[-1].start()
        return made[-1]

    yield make
    for each in made:
        each.close()


class Ear:
    """Listens to a request until all of its continuations have ended."""

    def __init__(self, count: int = 1) -> None:
        self.updates: list[list[Update]] = [[] for _ in range(count)]
        self.open = count
        self.changed = threading.Condition()

    def __call__(self, update: Update) -> None:
        with self.changed:
            self.updates[update.index].append(update)
            self.open -= update.last
            self.changed.notify_all()

    def wait(self, until: Callable[["Ear"], bool] = lambda ear: ear.open == 0) -> "Ear":
        with self.changed:
            assert self.changed.wait_for(lambda: until(self), PATIENCE)
        return self

    def tokens(self, index: int = 0) -> list[int]:
        return [token for update in self.updates[index] for token in update.tokens]

    def text(self, index: int = 0) -> str:
        return "".join(update.text for update in self.updates[index])


def slowed(engine: Engine, monkeypatch: pytest.MonkeyPatch, seconds: float = 0.01) -> None:
    step = engine.step

    def slow(*args: Any) -> Any:
        time.sleep(seconds)
        return step(*args)

    monkeypatch.setattr(engine, "step", slow)


def prompts_of(engine: Engine, count: int, seed: int, longest: int = 60) -> list[list[int]]:
    chance = random.Random(seed)
    return [[chance.randrange(5, len(engine.tokenizer)) for _ in range(chance.randint(1, longest))] for _ in range(count)]


@pytest.mark.parametrize("limits", [{}, {"max_batch": 3}, {"cache_bytes": 1}, {"max_batch": 5, "cache_bytes": 2**20}])
def test_company_changes_no_token(engine: Engine, scheduler: Callable[..., Scheduler], limits: dict[str, int]) -> None:
    running, chance = scheduler(**limits), random.Random(1)
    prompts = prompts_of(engine, 24, seed=2)
    budgets = [chance.choice([1, 7, 30, 300]) for _ in prompts]
    ears = []
    for prompt, budget in zip(prompts, budgets, strict=True):
        ears.append(Ear())
        running.generate([prompt], [Settings(budget)], ears[-1])
        time.sleep(chance.choice([0.0, 0.0, 0.005]))
    ours = [ear.wait().tokens() for ear in ears]
    theirs = [engine.continue_ids([prompt], max_new_tokens=budget)[0] for prompt, budget in zip(prompts, budgets, strict=True)]
    assert ours == theirs
    assert len({len(each) for each in ours}) > 3
    assert running.load.generated_tokens == sum(map(len, ours)) and running.load.prompt_tokens == sum(map(len, prompts))


def test_a_draw_depends_on_its_seed_alone(engine: Engine, scheduler: Callable[..., Scheduler]) -> None:
    running, settings = scheduler(), Settings(20, temperature=1.0, top_p=0.9, seed=7)
    (prompt, *others) = prompts_of(engine, 6, seed=3)
    alone = Ear()
    running.generate([prompt], [settings], alone)
    crowd = Ear(6)
    running.generate([*others, prompt], [*[Settings(40, temperature=1.0, seed=i) for i in range(5)], settings], crowd)
    other_seed = Ear()
    running.generate([prompt], [Settings(20, temperature=1.0, top_p=0.9, seed=8)], other_seed)
    assert alone.wait().tokens() == crowd.wait().tokens(5) != other_seed.wait().tokens()


def test_scores_are_those_of_the_engine_while_others_generate(engine: Engine, scheduler: Callable[..., Scheduler]) -> None:
    running = scheduler()
    ear = Ear(4)
    running.generate(prompts_of(engine, 4, seed=4), [Settings(60)] * 4, ear)
    items = [
        Branches(prompt, prompts_of(engine, 3, seed=i, longest=5)) for i, prompt in enumerate(prompts_of(engine, 40, seed=5, longest=90))
    ]
    assert sum(map(len, items)) > 1024  # several passes
    ours = [running.score(items[start : start + 10], top=3)[1] for start in range(0, 40, 10)]
    found = [each for future in ours for each in future.result(PATIENCE)]
    theirs = engine.judge(items, top=3)
    for mine, other in zip(found, theirs, strict=True):
        for a, b in zip(mine, other, strict=True):
            assert a.log_probs == pytest.approx(b.log_probs, abs=1e-4)
            assert [[token for token, _ in top] for top in a.top] == [[token for token, _ in top] for top in b.top]
            assert len(a.top) == len(a.log_probs) and all(len(top) == 3 for top in a.top)
    ear.wait()


def test_top_log_probs_are_the_largest_and_hold_the_greedy_token(engine: Engine) -> None:
    (prompt,) = prompts_of(engine, 1, seed=6)
    greedy = engine.continue_ids([prompt], max_new_tokens=5)[0]
    ((scored,),) = engine.judge([Branches(prompt, [greedy])], top=2)
    assert scored.greedy
    for token, logprob, top in zip(greedy, scored.log_probs, scored.top, strict=True):
        assert top[0] == (token, logprob) and top[1][1] <= logprob


def test_a_cancelled_request_leaves_its_slot_to_the_next(
    engine: Engine, scheduler: Callable[..., Scheduler], monkeypatch: pytest.MonkeyPatch
) -> None:
    running = scheduler(max_batch=1)
    slowed(engine, monkeypatch)
    first, second = Ear(), Ear()
    settings = Settings(400, temperature=1.0, top_logprobs=0)
    ticket = running.generate([[5]], [settings], first)
    running.generate([[6]], [Settings(3)], second)
    first.wait(lambda ear: len(ear.tokens()) >= 2)
    assert not second.updates[0]
    ticket.cancel()
    assert len(second.wait().tokens()) <= 3
    heard = len(first.tokens())
    assert heard < 400 and running.load.cancelled == 1
    time.sleep(0.05)
    assert len(first.tokens()) == heard and not any(update.last for update in first.updates[0])


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_whoever_leaves_the_middle_of_a_batch_changes_nothing_for_the_others(
    engine: Engine, scheduler: Callable[..., Scheduler], monkeypatch: pytest.MonkeyPatch, gone: int
) -> None:
    running, prompts = scheduler(), prompts_of(engine, 3, seed=9)
    theirs = [engine.continue_ids([prompt], max_new_tokens=30)[0] for prompt in prompts]
    slowed(engine, monkeypatch)
    ears = [Ear(), Ear(), Ear()]
    tickets = [
        running.generate([prompt], [Settings(400 if i == gone else 30, temperature=float(i == gone), top_logprobs=0)], ear)
        for i, (prompt, ear) in enumerate(zip(prompts, ears, strict=True))
    ]
    for ear in ears:
        ear.wait(lambda ear: bool(ear.updates[0]))
    tickets[gone].cancel()
    for i, ear in enumerate(ears):
        if i != gone:
            assert ear.wait().tokens() == theirs[i]
    assert running.load.cancelled == 1 and running.alive


def test_a_fault_within_a_round_is_told_and_the_next_request_is_served(
    engine: Engine, scheduler: Callable[..., Scheduler], monkeypatch: pytest.MonkeyPatch
) -> None:
    running, ear, after = scheduler(), Ear(), Ear()
    monkeypatch.setattr(Cache, "leave", no_leave)
    running.generate([[5]], [Settings(3, temperature=1.0)], ear)
    ear.wait()
    monkeypatch.undo()
    running.generate([[5]], [Settings(20)], after)
    assert after.wait().tokens() == engine.continue_ids([[5]], max_new_tokens=20)[0]
    assert [update.last for update in ear.updates[0]].count(True) == 1, "the fault came behind its end, which is told once"


def no_leave(cache: Cache, slot: int) -> int:
    raise ValueError("a fault of ours")


def narrow_slots(engine: Engine, count: int) -> dict[str, int]:
    """Limits under which so many narrow requests run together, and half as many where one of them is wide."""
    return {"max_batch": count, "max_queue": 1000, "cache_bytes": engine.bytes_per_place() * WIDTH_STEP * count}


def test_a_wide_request_narrows_the_batch_no_longer_than_it_runs(
    engine: Engine, scheduler: Callable[..., Scheduler], monkeypatch: pytest.MonkeyPatch
) -> None:
    running, seen, all_wait = scheduler(**narrow_slots(engine, 16)), list[tuple[int, int]](), threading.Event()
    prompts = prompts_of(engine, 60, seed=10, longest=20)
    theirs = [engine.continue_ids([prompt], max_new_tokens=40)[0] for prompt in prompts]
    step, wide, ears = engine.step, Ear(), [Ear() for _ in prompts]

    def noted(tokens: list[int], cache: Cache) -> torch.Tensor:
        assert all_wait.wait(PATIENCE)
        seen.append((len(tokens), cache.width))
        if not ears[8].open:  # the batch was full, and is filled again
            ticket.cancel()
        return step(tokens, cache)

    monkeypatch.setattr(engine, "step", noted)
    ticket = running.generate([[6]], [Settings(500, temperature=2.0, seed=3, top_logprobs=0)], wide)
    wide.wait(lambda ear: bool(ear.updates[0]))
    for prompt, ear in zip(prompts, ears, strict=True):
        running.generate([prompt], [Settings(40)], ear)
    all_wait.set()
    assert [ear.wait().tokens() for ear in ears] == theirs
    assert running.load.cancelled == 1
    assert max(count for count, width in seen if width > WIDTH_STEP) == 8
    assert max(count for count, width in seen if width == WIDTH_STEP) == 16


def test_narrow_requests_pass_a_wide_one_that_has_no_room_but_not_for_ever(
    engine: Engine, scheduler: Callable[..., Scheduler], monkeypatch: pytest.MonkeyPatch
) -> None:
    running, begun, all_wait = scheduler(**narrow_slots(engine, 16)), list[int](), threading.Event()
    begin, step = engine.begin, engine.step
    monkeypatch.setattr(engine, "step", lambda *given: all_wait.wait(PATIENCE) and step(*given))

    def noted(prompts: list[list[int]], cache: Cache) -> torch.Tensor:
        begun.extend(prompt[0] for prompt in prompts)
        return begin(prompts, cache)

    monkeypatch.setattr(engine, "begin", noted)
    first, wide, later = Ear(16), Ear(), [Ear() for _ in range(40)]
    running.generate([[10 + i] for i in range(16)], [Settings(20 + i, temperature=1.0, seed=i, top_logprobs=0) for i in range(16)], first)
    first.wait(lambda ear: all(ear.updates))
    running.generate([[9]], [Settings(400)], wide)
    for i, ear in enumerate(later):
        running.generate([[100 + i]], [Settings(30)], ear)
    all_wait.set()
    ours = [ear.wait().tokens() for ear in (wide, *later)]
    prompts, budgets = [[9], *([100 + i] for i in range(40))], [400, *[30] * 40]
    assert ours == [engine.continue_ids([prompt], max_new_tokens=budget)[0] for prompt, budget in zip(prompts, budgets, strict=True)]
    before = [prompt for prompt in begun[: begun.index(9)] if prompt >= 100]
    assert before == list(range(100, 100 + PASSES))  # in the order of their arrival


def test_a_full_queue_refuses_and_takes_nothing_on(
    engine: Engine, scheduler: Callable[..., Scheduler], monkeypatch: pytest.MonkeyPatch
) -> None:
    running = scheduler(max_batch=1, max_queue=2)
    slowed(engine, monkeypatch)
    ears = [Ear(), Ear(), Ear()]
    running.generate([[5]], [Settings(30, temperature=1.0)], ears[0])
    ears[0].wait(lambda ear: bool(ear.updates[0]))
    for ear in ears[1:]:
        running.generate([[6]], [Settings(2)], ear)
    with pytest.raises(BusyError, match="2 prompts wait already"):
        running.generate([[7]], [Settings(2)], Ear())
    with pytest.raises(BusyError):
        running.score([Branches([5], [[6]])])
    for ear in ears:
        ear.wait()
    running.score([Branches([5], [[6]])])[1].result(PATIENCE)


def test_a_request_out_of_time_ends_with_what_it_has(
    engine: Engine, scheduler: Callable[..., Scheduler], monkeypatch: pytest.MonkeyPatch
) -> None:
    running = scheduler(max_batch=1, max_seconds=0.3)
    slowed(engine, monkeypatch, 0.02)
    first, second = Ear(), Ear()
    running.generate([[5]], [Settings(400, temperature=1.0, top_logprobs=0)], first)
    running.generate([[6]], [Settings(400)], second)
    assert first.wait().updates[0][-1].reason == "length" and 0 < len(first.tokens()) < 400
    error = second.wait().updates[0][-1].error
    assert isinstance(error, ClosedError) or second.updates[0][-1].reason  # it waited for all of its time, or got the last of it


def test_a_request_that_fails_fails_alone(engine: Engine, scheduler: Callable[..., Scheduler], capsys: pytest.CaptureFixture[str]) -> None:
    running = scheduler()
    good, bad = prompts_of(engine, 3, seed=8), [10**6]
    together = Ear(4)
    running.generate([good[0], bad, good[1], good[2]], [Settings(20)] * 4, together)
    together.wait()
    assert together.updates[1][-1].error is not None and len(together.updates[1]) == 1
    for index, prompt in ((0, good[0]), (2, good[1]), (3, good[2])):
        assert together.tokens(index) == engine.continue_ids([prompt], max_new_tokens=20)[0]
    items = [Branches([5], [[6]]), Branches([5], [[10**6]]), Branches([7], [[8]])]
    futures = [running.score([item])[1] for item in items]
    with pytest.raises(IndexError):
        futures[1].result(PATIENCE)
    assert futures[0].result(PATIENCE) and futures[2].result(PATIENCE)
    assert "generation failed" in capsys.readouterr().err


def test_a_step_that_fails_is_told_to_all_that_ran_and_the_next_one_is_served(
    engine: Engine, scheduler: Callable[..., Scheduler], monkeypatch: pytest.MonkeyPatch
) -> None:
    running, step = scheduler(), engine.step

    def broken(*args: Any) -> Any:
        monkeypatch.setattr(engine, "step", step)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engine, "step", broken)
    ear = Ear(3)
    running.generate([[5], [6], [7]], [Settings(20)] * 3, ear)
    assert all(isinstance(updates[-1].error, RuntimeError) for updates in ear.wait().updates)
    after = Ear()
    running.generate([[5]], [Settings(20)], after)
    assert after.wait().tokens() == engine.continue_ids([[5]], max_new_tokens=20)[0]


def test_the_end_lets_what_runs_finish_and_takes_nothing_on(
    engine: Engine, scheduler: Callable[..., Scheduler], monkeypatch: pytest.MonkeyPatch
) -> None:
    running = scheduler()
    slowed(engine, monkeypatch)
    short, long = Ear(), Ear()
    running.generate([[5]], [Settings(5, temperature=1.0, top_logprobs=0)], short)
    running.generate([[6]], [Settings(450, temperature=1.0, top_logprobs=0)], long)
    long.wait(lambda ear: bool(ear.updates[0]))
    running.retire(0.3)
    assert not running.alive
    with pytest.raises(ClosedError, match="going down"):
        running.generate([[7]], [Settings(2)], Ear())
    running.close()
    assert short.wait().updates[0][-1].reason and len(short.tokens()) <= 5
    assert long.wait().updates[0][-1].reason == "length" and 0 < len(long.tokens()) < 450


def test_told_a_second_time_it_ends_at_once_with_what_there_is(
    engine: Engine, scheduler: Callable[..., Scheduler], monkeypatch: pytest.MonkeyPatch
) -> None:
    running, ear = scheduler(), Ear()
    slowed(engine, monkeypatch)
    running.generate([[6]], [Settings(450, temperature=1.0, top_logprobs=0)], ear)
    ear.wait(lambda ear: bool(ear.updates[0]))
    running.retire(10 * PATIENCE)
    running.retire(0.0)
    running.retire(10 * PATIENCE)
    assert ear.wait().updates[0][-1].reason == "length" and 0 < len(ear.tokens()) < 450


def test_an_idle_scheduler_holds_no_keys_and_values(engine: Engine, scheduler: Callable[..., Scheduler]) -> None:
    running = scheduler()
    for width in (10, 400, 20):
        ear = Ear()
        running.generate([[5] * width], [Settings(3)], ear)
        ear.wait()
    deadline = time.monotonic() + PATIENCE
    while running._cache is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert running._cache is None and running.load.generated_tokens > 0


def test_whoever_stops_waiting_at_any_moment_does_no_harm(engine: Engine, scheduler: Callable[..., Scheduler]) -> None:
    running = scheduler()
    for _ in range(30):
        ticket, future = running.score([Branches([5, 6], [[7], [8, 9]])] * 3)
        future.cancel()  # as an event loop does it, before the ticket is told
        ticket.cancel()
    assert running.score([Branches([5, 6], [[7]])])[1].result(PATIENCE) and running.alive


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_and_memory_that_is_not_there_fail_alone(
    engine: Engine, scheduler: Callable[..., Scheduler], monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    running, ears = scheduler(), [Ear(2), Ear()]
    begin = engine.begin

    def no_numbers(prompts: list[list[int]], cache: Any) -> torch.Tensor:
        logits = begin(prompts, cache)
        logits[[row for row, prompt in enumerate(prompts) if prompt == [6]]] = torch.nan
        return logits

    monkeypatch.setattr(engine, "begin", no_numbers)
    running.generate([[5], [6]], [Settings(20, temperature=temperature)] * 2, ears[0])
    ears[0].wait()
    assert ears[0].updates[0][-1].reason and isinstance(ears[0].updates[1][-1].error, BrokenLogitsError)
    monkeypatch.setattr(Cache, "resized", no_memory)
    deadline = time.monotonic() + PATIENCE
    while running._cache is not None:  # an idle server gives its cache back, and the next request needs a new one
        assert time.monotonic() < deadline
        time.sleep(0.001)
    running.generate([[5]], [Settings(20)], ears[1])
    assert isinstance(ears[1].wait().updates[0][-1].error, MemoryError)
    monkeypatch.undo()
    after = Ear()
    running.generate([[5]], [Settings(20)], after)
    assert after.wait().tokens() == engine.continue_ids([[5]], max_new_tokens=20)[0]


def test_scores_that_are_no_numbers_fail_alone(
    engine: Engine, scheduler: Callable[..., Scheduler], monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = engine.judge

    def no_numbers(items: list[Branches], **how: Any) -> Any:
        found = judge(items, **how)
        return [
            [replace(answer, log_probs=[math.nan]) if item.prompt == [6] else answer for answer in each]
            for item, each in zip(items, found, strict=True)
        ]

    monkeypatch.setattr(engine, "judge", no_numbers)
    running = scheduler()
    futures = [running.score([Branches([prompt], [[7]])])[1] for prompt in (5, 6, 8)]
    with pytest.raises(BrokenLogitsError, match="no numbers"):
        futures[1].result(PATIENCE)
    assert futures[0].result(PATIENCE) and futures[2].result(PATIENCE)


def no_memory(cache: Cache, slots: int, width: int) -> Cache:
    raise MemoryError("no room")
