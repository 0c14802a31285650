"""The parts of the benchmarks that judge and start runs, without a run."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return loaded("train")


def loaded(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{name}_benchmark", BENCHMARKS / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def result(tokens_a_step: int) -> dict[str, Any]:
    """Three steps of a second each."""
    lines = [{"tokens": step * tokens_a_step, "targets": step, "loss": 1.0} for step in (1, 2, 3)]
    facts = {"peak_mb": 1, "peak_mb_with_saving": 1, "start_to_first_step_seconds": 1.0, "when": "now", "load_before": 0.0}
    return {"run": {"ends": [1.0, 2.0, 3.0], "lines": lines, "cores_used": 2, "threads": 2, **facts}, "about": {}}


@pytest.mark.parametrize(("rates", "median"), [((100, 300), 200), ((100, 300, 200), 200), ((400, 100, 200, 300), 250)])
def test_the_speed_of_several_runs_is_their_median(bench: ModuleType, rates: tuple[int, ...], median: int) -> None:
    found = bench.summary([result(rate) for rate in rates], {"bfloat16": {"tokens_per_second": 1000.0}})
    assert found["tokens_per_second"] == median and found["fraction_of_bf16_floor"] == median / 1000
    assert found["runs"] == list(rates)


def test_every_run_has_the_allocator_and_the_benchmark_has_not(bench: ModuleType, tmp_path: Path) -> None:
    program = "import os, sys, time\nfor step in (1, 2):\n    time.sleep(0.2)\n    print('{\"allocator\": \"%s\"}' % os.environ['MALLOC_CONF'], file=open(sys.argv[1], 'a'))"
    argv, metrics = [sys.executable, "-c", program, tmp_path / "metrics"], tmp_path / "metrics"
    run = bench.watched(argv, metrics, tmp_path / "log", 1, {"MALLOC_CONF": "thp:always"})
    assert [line["allocator"] for line in run["lines"]] == ["thp:always"] * 2
    assert "MALLOC_CONF" not in bench.os.environ


def test_an_allocator_that_cannot_be_loaded_is_refused(bench: ModuleType) -> None:
    assert bench.allocator(None, None) == {}
    for library, settings, message in (
        (None, "thp:always", "for the allocator of --preload"),
        ("libnone.so.7", None, "--preload libnone.so.7: .*libnone"),
    ):
        with pytest.raises(bench.FailedError, match=message):
            bench.allocator(library, settings)


def test_kept_runs_of_another_allocator_are_not_taken(bench: ModuleType, tmp_path: Path) -> None:
    def kept(**environment: str) -> Path:
        return bench.Bench(tmp_path, [], [], tmp_path, str, 2, (), -1, False, environment)._kept(False)

    assert kept() == kept() != kept(LD_PRELOAD="libjemalloc.so.2") != kept(LD_PRELOAD="libtcmalloc.so.4")


@pytest.mark.parametrize(("count", "rank"), [(1, 1), (16, 16), (20, 19), (32, 31), (100, 95)])
def test_the_95th_percentile_of_waiting_is_a_nearest_rank(count: int, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("httpx")
    monkeypatch.syspath_prepend(BENCHMARKS)
    serve = loaded("serve")
    found = [serve.Answered("", float(number), 1.0) for number in reversed(range(1, count + 1))]
    told = serve.summary(found, 1.0, lambda text, add_special_tokens: SimpleNamespace(input_ids=[]))
    assert told["first_token_seconds"]["p95"] == rank
