"""A run that is cut off, taken up, or shared among ranks has the numbers of one that was not."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from journal_job import BLOCK, CONFIG

from mtllama.errors import UserError
from mtllama.evaluate import runner
from mtllama.evaluate.items import EvalConfig
from mtllama.model.engine import Engine
from mtllama.model.find import find_model
from mtllama.model.load import load_model

JOB = str(Path(__file__).with_name("journal_job.py"))
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
BLOCKS = 3 + 3 + 3 + 3 + 3
"""Of ten rows, four at a time: squad generated, sst2 and copa scored and generated."""


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "BLOCK", BLOCK)


@pytest.fixture(scope="module")
def engine(pico: Path) -> Engine:
    return Engine(load_model(find_model(str(pico)), dtype="float32"))


@pytest.fixture(scope="module")
def whole(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to."""
    out = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "BLOCK", BLOCK)
        runner.evaluate(engine, CONFIG, out)
    return out


class Asked:
    """Counts the items that a model is asked, and interrupts it after some."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch, stop_after: int | None = None) -> None:
        self.calls, self.left = 0, stop_after
        for name in ("score", "answer"):
            monkeypatch.setattr(engine, name, self._counted(getattr(engine, name)))

    def _counted(self, ask: Any) -> Any:
        def counted(*arguments: Any, **options: Any) -> Any:
            if self.left is not None and self.calls == self.left:
                raise KeyboardInterrupt
            self.calls += 1
            return ask(*arguments, **options)

        return counted


def same(left: Path, right: Path) -> bool:
    return all(
        (left / name).read_bytes() == (right / name).read_bytes() for name in ("results.json", "records.jsonl", "results_lm-eval.json")
    )


def test_a_killed_run_is_taken_up_and_gives_the_same_files(
    whole: Path, engine: Engine, pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    killed = subprocess.run([sys.executable, JOB, str(pico), str(out), "6"], capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    assert killed.returncode == -9, killed.stderr
    assert not out.exists()
    lines = (tmp_path / "run.partial" / "records.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    assert len(lines) == 4 + 4 + 2 + 4 + 4 + 2 + 2 and not lines[-1].endswith("\n")
    asked = Asked(engine, monkeypatch)
    runner.evaluate(engine, CONFIG, out)
    assert asked.calls == 9 + 3  # the nine blocks that were left, and three empty prompts of copa's
    assert same(out, whole) and not (tmp_path / "run.partial").exists()


def test_an_interrupt_keeps_what_was_asked(whole: Path, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        Asked(engine, patch, stop_after=3)
        with pytest.raises(KeyboardInterrupt):
            runner.evaluate(engine, CONFIG, out)
    assert not out.exists() and len((tmp_path / "run.partial" / "records.jsonl").read_text().splitlines()) == 10
    runner.evaluate(engine, CONFIG, out)
    assert same(out, whole)


def test_two_ranks_give_the_files_of_one(whole: Path, pico: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = subprocess.run([*TORCHRUN, JOB, str(pico), str(out)], capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    assert done.returncode == 0, done.stderr
    assert same(out, whole) and not (tmp_path / "run.partial").exists()


def test_what_ranks_left_is_taken_up_by_one_process(whole: Path, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, work = tmp_path / "run", tmp_path / "run.partial"
    with monkeypatch.context() as patch:
        Asked(engine, patch, stop_after=0)
        with pytest.raises(KeyboardInterrupt):
            runner.evaluate(engine, CONFIG, out)
    lines = (whole / "records.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (work / "records.jsonl").write_text("".join(lines[:10]), encoding="utf-8")
    (work / "records.1.jsonl").write_text("".join(lines[12:30]) + lines[30][:9], encoding="utf-8")  # two lines of a block are not there
    asked = Asked(engine, monkeypatch)
    runner.evaluate(engine, CONFIG, out)
    assert same(out, whole) and asked.calls == (BLOCKS - 3 - 2 - 3) + 1 + 3  # sst2's first block, and the empty prompts of its and copa's


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"limit": 9}, "limit and another data_sha256"),
        ({"seed": 1}, "seed and another data_sha256"),
        ({"templates": "own"}, "templates and another data_sha256"),
        ({"protocols": ("rank",)}, "protocols"),
    ],
)
def test_other_settings_are_refused_by_name_until_overwrite(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], named: str
) -> None:
    config = {"tasks": ("sst2",), "limit": 8, "protocols": ("rank", "generate")}
    with monkeypatch.context() as patch:
        Asked(engine, patch, stop_after=1)
        with pytest.raises(KeyboardInterrupt):
            runner.evaluate(engine, EvalConfig(**config), tmp_path / "run")
    with pytest.raises(UserError, match=f"unfinished run with another {named} .*pass --overwrite"):
        runner.evaluate(engine, EvalConfig(**{**config, **change}), tmp_path / "run")
    asked = Asked(engine, monkeypatch)
    runner.evaluate(engine, EvalConfig(**{**config, **change}), tmp_path / "run", overwrite=True)
    assert asked.calls >= 2 and (tmp_path / "run" / "results.json").is_file()


def test_another_model_or_format_is_refused(engine: Engine, pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = EvalConfig(tasks=("sst2",), limit=8, protocols=("rank",))
    with monkeypatch.context() as patch:
        Asked(engine, patch, stop_after=1)
        with pytest.raises(KeyboardInterrupt):
            runner.evaluate(engine, config, tmp_path / "run")
    plain = Engine(load_model(find_model(str(pico)), dtype="float32", format="plain"))
    with pytest.raises(UserError, match="another format and another boundary"):
        runner.evaluate(plain, config, tmp_path / "run")
    settings = tmp_path / "run.partial" / "settings.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"model": "another"}))
    with pytest.raises(UserError, match=r'another model \(model: "another", now'):
        runner.evaluate(engine, config, tmp_path / "run")


def test_a_folder_of_other_files_is_not_taken_for_an_unfinished_run(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "run.partial").mkdir()
    (tmp_path / "run.partial" / "thesis.tex").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="holds other files"):
            runner.evaluate(engine, EvalConfig(tasks=("sst2",), limit=1), tmp_path / "run", overwrite=overwrite)
    assert (tmp_path / "run.partial" / "thesis.tex").is_file()


def test_two_processes_do_not_write_into_one_folder(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = EvalConfig(tasks=("sst2",), limit=2, protocols=("rank",))
    met: list[str] = []
    score = engine.score

    def meanwhile(*arguments: Any, **options: Any) -> Any:
        monkeypatch.setattr(engine, "score", score)
        with pytest.raises(UserError) as other:
            runner.evaluate(engine, config, tmp_path / "run")
        met.append(str(other.value))
        return score(*arguments, **options)

    monkeypatch.setattr(engine, "score", meanwhile)
    runner.evaluate(engine, config, tmp_path / "run")
    assert len(met) == 1 and "another process writes" in met[0]
