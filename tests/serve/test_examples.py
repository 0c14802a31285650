"""The scripts of examples/ run as they stand."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from served import Served

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
OFFLINE = ("generate", "score", "run_task")


def run(name: str, argument: str) -> str:
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), argument]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, timeout=180)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("name", OFFLINE)
def test_an_example_runs(name: str, pico: Path) -> None:
    out = run(name, str(pico))
    assert {"generate": "", "score": "best: ", "run_task": "[ours_bare]"}[name] in out and out.count("\n") >= 3


def test_the_client_talks_to_a_server(served: Served) -> None:
    out = run("client", served.url)
    assert "best: " in out and "->" in out


def test_there_are_no_others() -> None:
    assert {file.stem for file in EXAMPLES.glob("*.py")} == {*OFFLINE, "client"}
