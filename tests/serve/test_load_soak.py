"""Half an hour of everything at once, clients that vanish among it: nothing fails, and memory stays flat."""

import os
import random
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

MINUTES = float(os.environ.get("MTLLAMA_SOAK_MINUTES", "30"))
CLIENTS = 12


@pytest.mark.soak
def test_memory_stays_flat_under_mixed_load(pico: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mtllama", "serve", str(pico), "--port", str(port), "--max-queue", "16", "--max-seconds", "20"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    url, stop, counts, sizes = f"http://127.0.0.1:{port}", threading.Event(), dict[Any, int](), list[tuple[float, float]]()
    try:
        deadline = time.monotonic() + 60
        while not _healthy(url):
            assert time.monotonic() < deadline and process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.2)
        threads = [threading.Thread(target=_client, args=(url, seed, stop, counts), daemon=True) for seed in range(CLIENTS)]
        for thread in threads:
            thread.start()
        began = time.monotonic()
        while time.monotonic() - began < 60 * MINUTES:
            time.sleep(1)
            assert process.poll() is None, (tmp_path / "log").read_text()
            sizes.append((time.monotonic() - began, psutil.Process(process.pid).memory_info().rss / 1e6))
        stop.set()
        for thread in threads:
            thread.join(60)
        assert _healthy(url)
    finally:
        process.terminate()
        code = process.wait(60)
    early = [size for at, size in sizes if 10 * MINUTES < at < 20 * MINUTES]  # the second sixth: the first is warm-up
    late = [size for at, size in sizes if at > 50 * MINUTES]
    print(f"\n{sum(counts.values())} requests: {counts}; MB early {max(early):.0f}, late {max(late):.0f}")
    assert set(counts) <= {200, 400, 404, 429, 503, "gone"} and counts[200] > 100 and counts["gone"] > 5
    assert counts.get(503, 0) < counts[200] / 100
    assert max(late) < 1.05 * max(early) + 10
    assert code == 0


def _healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=10).status_code == 200
    except httpx.HTTPError:
        return False


def _client(url: str, seed: int, stop: threading.Event, counts: dict[Any, int]) -> None:
    chance = random.Random(seed)
    with httpx.Client(timeout=60) as client:
        while not stop.is_set():
            path, body = _request(chance)
            outcome: Any
            if body.get("stream") and chance.random() < 0.3:
                with client.stream("POST", url + path, json=body) as answer:
                    outcome = answer.status_code
                    for line in answer.iter_lines():
                        if '"type": "server_error"' in line:
                            outcome = 500
                        if chance.random() < 0.2:
                            outcome = "gone" if outcome == 200 else outcome
                            break
            else:
                answer = client.post(url + path, json=body)
                outcome = 500 if '"type": "server_error"' in answer.text and answer.status_code == 200 else answer.status_code
            counts[outcome] = counts.get(outcome, 0) + 1


def _request(chance: random.Random) -> tuple[str, dict[str, Any]]:
    words = " ".join(chance.choice(["fog", "wet", "é", "the", "🙂", "Paris"]) for _ in range(chance.randint(1, 120)))
    kind = chance.randrange(6)
    more = {"temperature": chance.choice([0, 1]), "stream": chance.random() < 0.5, "max_tokens": chance.randint(1, 80)}
    if kind == 0:
        return "/v1/completions", {"prompt": words, **more}
    if kind == 1:
        return "/v1/chat/completions", {"messages": [{"role": "user", "content": words}], "stop": "og", **more}
    if kind == 2:
        return "/v1/score", {"prompt": words, "choices": [words[:i] for i in range(1, 6)]}
    if kind == 3:
        fields = {"premise": words, "question": "cause", "choice1": "a", "choice2": "b"}
        return "/v1/tasks/copa/run", {"fields": fields}
    if kind == 4:
        return "/v1/completions", {"prompt": [words] * 3, "echo": True, "logprobs": 2, "n": 2, **more}
    return "/v1/completions", {"prompt": words * 50 if chance.random() < 0.5 else words, "max_tokens": 10**6}
