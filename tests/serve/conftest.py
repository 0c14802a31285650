"""A pico model, alone and behind a real server."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from served import Served, run_server

from mtllama.model.engine import Engine
from mtllama.model.find import find_model
from mtllama.model.load import load_model


@pytest.fixture(scope="module")
def engine(pico: Path) -> Engine:
    return Engine(load_model(find_model(str(pico)), dtype="float32"))


@pytest.fixture(scope="module")
def served(engine: Engine) -> Iterator[Served]:
    with run_server(engine) as running:
        yield running
