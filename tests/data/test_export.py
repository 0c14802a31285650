"""An export is a function of the mixture alone: the same bytes for any number of workers, whole or cut off and gone on with."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import datasets
import psutil
import pytest

from mtllama.data import export as export_module
from mtllama.data.export import ExportConfig, export
from mtllama.data.mixture import Mixture, MixtureConfig
from mtllama.data.prompt import FORMATS
from mtllama.errors import UserError
from mtllama.folders import sha256_file

FORMAT = FORMATS["mtllama"]


@pytest.fixture(scope="module")
def mixture() -> Mixture:
    return Mixture(MixtureConfig(dir=Path("sampler"), tasks=("trec", "samsum", "ag_news")))


def files(folder: Path) -> dict[str, str]:
    return {file.name: sha256_file(file) for file in sorted((folder / "data").iterdir())}


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_the_rows_are_the_draws_in_their_order(tmp_path: Path, mixture: Mixture, kind: Any) -> None:
    out = export(mixture, FORMAT, ExportConfig(70, kind, 32), tmp_path / "out")
    loaded = datasets.load_dataset(str(out), split="train", cache_dir=str(tmp_path / "cache"))
    draws = [(index, mixture.draw(index)) for index in range(70)]
    expected = [(index, draw) for index, draw in draws if draw.example]
    assert len(loaded) == len(expected) > 60
    for row, (index, draw) in zip(loaded, expected, strict=True):
        assert draw.example is not None
        assert (row["index"], row["task"], row["template"], row["row"]) == (index, draw.task, draw.template, draw.row)
        assert row["prompt"] == f"Input: {draw.example.inputs}\nOutput:"
        assert row["completion"] == " " + draw.example.targets
        assert row["messages"] == [
            {"role": "user", "content": draw.example.inputs},
            {"role": "assistant", "content": draw.example.targets},
        ]


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_two_workers_write_the_same_bytes_as_one(tmp_path: Path, mixture: Mixture, kind: Any) -> None:
    one = export(mixture, FORMAT, ExportConfig(100, kind, 16), tmp_path / "one", workers=1)
    two = export(mixture, FORMAT, ExportConfig(100, kind, 16), tmp_path / "two", workers=2)
    assert files(one) == files(two)
    assert len(files(one)) == 7


def test_a_cut_off_export_goes_on_with_the_shards_that_are_missing(
    tmp_path: Path, mixture: Mixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = export(mixture, FORMAT, ExportConfig(96, "jsonl", 16), tmp_path / "whole")
    write, written = export_module._write_shard, list[str]()

    def failing(mixture: Mixture, format: Any, work: Path, name: str, *rest: Any) -> None:
        if len(written) == 3:
            (work / f".{name}.partial").write_text("half a line")
            raise KeyboardInterrupt
        written.append(name)
        write(mixture, format, work, name, *rest)

    monkeypatch.setattr(export_module, "_write_shard", failing)
    with pytest.raises(KeyboardInterrupt):
        export(mixture, FORMAT, ExportConfig(96, "jsonl", 16), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(export_module, "_write_shard", lambda *job: (written.append(job[3]), write(*job)))
    out = export(mixture, FORMAT, ExportConfig(96, "jsonl", 16), tmp_path / "out")
    assert len(written) == len(set(written)) == 6, "no shard was written twice"
    assert files(out) == files(whole)
    assert not (tmp_path / "out.partial").exists()


def test_an_unfinished_export_of_another_kind_is_refused(tmp_path: Path, mixture: Mixture) -> None:
    work = tmp_path / "out.partial"
    work.mkdir()
    (work / "export.json").write_text("{}")
    with pytest.raises(UserError, match="holds an unfinished export of another kind"):
        export(mixture, FORMAT, ExportConfig(10), tmp_path / "out")
    assert export(mixture, FORMAT, ExportConfig(10), tmp_path / "out", overwrite=True).is_dir()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_somebody_else_beside_the_output_is_left_alone(tmp_path: Path, mixture: Mixture, overwrite: bool) -> None:
    theirs = tmp_path / "out.partial" / "thesis.txt"
    theirs.parent.mkdir()
    theirs.write_text("three years of work")
    with pytest.raises(UserError, match="holds other files"):
        export(mixture, FORMAT, ExportConfig(10), tmp_path / "out", overwrite=overwrite)
    assert theirs.read_text() == "three years of work" and not (tmp_path / "out").exists()


def test_the_manifest_names_every_file_with_its_hash_and_counts(tmp_path: Path, mixture: Mixture) -> None:
    out = export(mixture, FORMAT, ExportConfig(40, "parquet", 16), tmp_path / "out")
    manifest = json.loads((out / "mtllama.json").read_text())
    assert manifest["stage"] == "export" and manifest["num_examples"] == 40
    assert {entry["file"]: entry["sha256"] for entry in manifest["files"]} == {
        f"data/{name}": digest for name, digest in files(out).items()
    }
    assert manifest["rows"] + manifest["skipped"] == 40 and sum(manifest["tasks"].values()) == manifest["rows"]
    assert "load_dataset" in (out / "README.md").read_text()


@pytest.mark.parametrize("settings", [{"num_examples": 0}, {"num_examples": 5, "shard_size": 0}, {"num_examples": 5, "file_format": "csv"}])
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        ExportConfig(**settings)


def test_the_native_format_and_no_workers_are_refused(tmp_path: Path, mixture: Mixture) -> None:
    with pytest.raises(UserError, match="native belongs to a checkpoint"):
        export(mixture, FORMATS["native"], ExportConfig(5), tmp_path / "out")
    with pytest.raises(UserError, match="--workers is 0"):
        export(mixture, FORMAT, ExportConfig(5), tmp_path / "out", workers=0)


def test_an_unfinished_export_of_other_data_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def mixed(num: int) -> Mixture:
        (tmp_path / "data" / "samsum").mkdir(parents=True, exist_ok=True)
        rows = "".join(json.dumps({"dialogue": f"A: {i}", "summary": "s"}) + "\n" for i in range(num))
        (tmp_path / "data" / "samsum" / "train.jsonl").write_text(rows)
        return Mixture(MixtureConfig(dir=tmp_path / "data"))

    monkeypatch.setattr(export_module, "_finish", lambda *rest: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        export(mixed(5), FORMAT, ExportConfig(10, "jsonl", 5), tmp_path / "out")
    with pytest.raises(UserError, match="of another kind, or of other data"):
        export(mixed(6), FORMAT, ExportConfig(10, "jsonl", 5), tmp_path / "out")


def test_a_completion_holds_the_end_marker_of_a_format_that_has_one(tmp_path: Path, mixture: Mixture) -> None:
    out = export(mixture, FORMATS["mt-llama-train"], ExportConfig(3, "jsonl"), tmp_path / "out")
    rows = [json.loads(line) for line in next((out / "data").iterdir()).read_text().splitlines()]
    assert len(rows) == 3 and all(row["completion"].endswith("\n") and row["prompt"].endswith("### ASSISTANT:") for row in rows)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_export_leaves_no_worker_and_no_result(tmp_path: Path, number: int) -> None:
    command = ["mix", "export", "quickstart", "--out", "out", "--num-examples", "400000", "--shard-size", "500", "--workers", "2"]
    process = subprocess.Popen([sys.executable, "-m", "mtllama", *command], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and len(list((tmp_path / "out.partial").glob("*.parquet.json"))) < 2:
        time.sleep(0.05)
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) >= 2
    process.send_signal(number)
    _, err = process.communicate()
    assert (process.returncode, "interrupted" in err) == ((2, True) if number == signal.SIGINT else (-9, False))
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert not alive
    assert not (tmp_path / "out").exists() and "Traceback" not in err
