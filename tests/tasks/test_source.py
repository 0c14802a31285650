"""Rows come from the one file that the file rule names, whole, or an error says which file, which line and why."""

import csv
import gzip
import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from mtllama.errors import UserError
from mtllama.tasks import source
from mtllama.tasks.catalog import catalog, load_rows
from mtllama.tasks.source import DataFile, Location, Row

ROWS: list[Row] = [
    {"text": 'She said, "no".', "label": 1, "score": 0.5},
    {"text": "Two lines:\n\nthis, and this", "label": 0, "score": -2.0},
    {"text": "naïve – 雨", "label": 12, "score": 1e-7},
]


def write_jsonl(path: Path, rows: list[Row]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_gz(path: Path, rows: list[Row]) -> None:
    with gzip.open(path, "wt", encoding="utf-8") as handle:
        handle.write("".join(json.dumps(row) + "\n" for row in rows))


def write_csv(path: Path, rows: list[Row]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path: Path, rows: list[Row]) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


WRITERS: dict[str, Callable[[Path, list[Row]], None]] = {
    ".jsonl": write_jsonl,
    ".jsonl.gz": write_gz,
    ".csv": write_csv,
    ".parquet": write_parquet,
}


def put(path: Path, rows: list[Row] | None = None) -> Path:
    """A small real file of the kind that its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    suffix = next(suffix for suffix in source.SUFFIXES if path.name.endswith(suffix))
    WRITERS[suffix](path, ROWS if rows is None else rows)
    return path


def find(name: str, data_dir: Path, split: str | None = None) -> DataFile | None:
    task = catalog()[name]
    return source.find_file(name, task.location, data_dir, (split,) if split else (task.split, "validation", "test"))


def refusal(act: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as raised:
        act()
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(
    ("name", "file", "split", "note"),
    [
        ("copa", "super_glue/copa.validation.jsonl", "validation", ""),
        ("copa", "super_glue/copa/validation.jsonl", "validation", ""),
        ("copa", "super_glue_copa/validation.parquet", "validation", ""),
        ("copa", "aps/super_glue/copa.validation.csv", "validation", ""),
        ("copa", "aps_super_glue/copa/validation.jsonl.gz", "validation", ""),
        ("copa", "copa/validation.jsonl", "validation", ""),
        ("rte", "super_glue/rte.test.jsonl", "test", ""),
        ("glue_mrpc", "glue_mrpc/validation.jsonl", "validation", ""),
        ("glue_mrpc", "glue/mrpc.validation.jsonl", "validation", ""),
        ("xquad-en", "xquad/xquad.en.jsonl", "validation", ""),
        ("mlqa-en", "mlqa/mlqa.en.en.test.jsonl", "test", ""),
        ("mlqa-en", "mlqa/mlqa.en.en.validation.parquet", "validation", ""),
        ("tydiqa-en", "tydiqa/secondary_task.english.validation.jsonl", "validation", ""),
        ("winogrande", "winogrande/winogrande_xl.validation.jsonl", "validation", ""),
        ("winogrande", "allenai/winogrande/winogrande_xl/validation.jsonl", "validation", ""),
        ("openbookqa", "openbookqa/validation.jsonl", "validation", ""),
        ("openbookqa", "openbookqa/main/validation.jsonl", "validation", ""),
        ("openbookqa", "openbookqa/main.validation.jsonl", "validation", ""),
        ("sst2", "stanfordnlp_sst2/validation.csv", "validation", ""),
        ("squad", "squad/validation.first100.jsonl", "validation", "first100"),
        ("mnli", "mnli/validation_matched.half.v2.jsonl", "validation_matched", "half.v2"),
    ],
)
def test_the_file_rule_finds_a_set_under_each_of_its_names(tmp_path: Path, name: str, file: str, split: str, note: str) -> None:
    path = put(tmp_path / file)
    assert find(name, tmp_path) == DataFile(path, split, note)


def test_a_note_in_the_name_is_no_part_of_the_split(tmp_path: Path) -> None:
    path = put(tmp_path / "hellaswag" / "validation.subset1000.jsonl")
    location = Location("Rowan/hellaswag")
    assert source.find_file("hellaswag", location, tmp_path, ("validation",)) == DataFile(path, "validation", "subset1000")
    assert source.find_file("hellaswag", location, tmp_path, ("test",)) is None


def test_the_mismatched_half_of_mnli_is_never_taken_for_the_matched_one(tmp_path: Path) -> None:
    matched = put(tmp_path / "mnli" / "validation_matched.jsonl")
    mismatched = put(tmp_path / "mnli" / "validation_mismatched.note.jsonl")
    assert find("mnli", tmp_path) == DataFile(matched, "validation_matched", "")
    assert find("mnli", tmp_path, "validation_mismatched") == DataFile(mismatched, "validation_mismatched", "note")
    matched.unlink()
    assert find("mnli", tmp_path) is None


@pytest.mark.parametrize(
    ("name", "others"),
    [
        (
            "copa",
            [
                "super_glue/cb.validation.jsonl",
                "super_glue/validation.jsonl",
                "super_glue/copa2.validation.jsonl",
                "copa/cb.validation.jsonl",
            ],
        ),
        ("copa", ["super_glue/cb/validation.jsonl", "xcopa/validation.jsonl"]),
        ("winogrande", ["winogrande/winogrande_xs.validation.jsonl", "winogrande/winogrande_xs/validation.jsonl"]),
        ("xquad-en", ["xquad/xquad.de.jsonl", "xquad/xquad.enm.jsonl"]),
        ("mlqa-en", ["mlqa/mlqa.en.de.test.jsonl", "mlqa/mlqa.de.en.test.jsonl"]),
        ("tydiqa-en", ["tydiqa/secondary_task.finnish.validation.jsonl"]),
        ("squad", ["squad/validation.txt", "squad/validation.json", "squad/notes.jsonl", "squad_v2/validation.jsonl"]),
    ],
)
def test_the_file_of_another_config_is_never_taken(tmp_path: Path, name: str, others: list[str]) -> None:
    for other in others:
        path = tmp_path / other
        path.parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(path, ROWS)
    assert find(name, tmp_path) is None
    with pytest.raises(UserError, match=f"{name}: no file for the split"):
        load_rows(catalog()[name], tmp_path)


def test_the_split_asked_for_is_the_only_one_taken(tmp_path: Path) -> None:
    for split in ("train", "validation", "test"):
        put(tmp_path / "sst2" / f"{split}.jsonl")
    found = {split: find("sst2", tmp_path, split) for split in ("train", "validation", "test")}
    assert {split: file and file.path.name for split, file in found.items()} == {split: f"{split}.jsonl" for split in found}
    assert find("sst2", tmp_path, "dev") is None


def test_without_a_split_asked_for_the_protocols_own_comes_first_then_validation_then_test(tmp_path: Path) -> None:
    row = {column: "x" for column in catalog()["mnli"].columns}
    order = ("validation_matched", "validation", "test")
    paths = [put(tmp_path / "mnli" / f"{split}.jsonl", [row]) for split in ("train", *order)]
    taken = []
    for path in paths[1:]:
        taken.append(load_rows(catalog()["mnli"], tmp_path).split)
        path.unlink()
    assert tuple(taken) == order
    with pytest.raises(UserError, match=r"mnli: no file for the split validation_matched or validation or test in .*, such as mnli/"):
        load_rows(catalog()["mnli"], tmp_path)


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("openbookqa", "openbookqa/validation.jsonl", "openbookqa/main/validation.jsonl"),
        ("openbookqa", "openbookqa/validation.jsonl", "openbookqa/validation.subset.jsonl"),
        ("copa", "super_glue/copa.validation.jsonl", "copa/validation.jsonl"),
        ("sst2", "sst2/validation.csv", "sst2/validation.parquet"),
    ],
)
def test_two_files_for_one_split_are_an_error_that_names_both(tmp_path: Path, name: str, first: str, second: str) -> None:
    put(tmp_path / first)
    assert find(name, tmp_path) is not None
    put(tmp_path / second)
    message = refusal(lambda: find(name, tmp_path))
    assert str(tmp_path / first) in message and str(tmp_path / second) in message
    assert message.startswith(f"{name}: two files for the split validation")


def test_one_file_under_two_names_is_one_file(tmp_path: Path) -> None:
    path = put(tmp_path / "super_glue" / "copa.validation.jsonl")
    (tmp_path / "aps").mkdir()
    (tmp_path / "aps" / "super_glue").symlink_to(path.parent)
    found = find("copa", tmp_path)
    assert found is not None and found.path.resolve() == path.resolve()


def test_a_data_folder_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    assert refusal(lambda: find("copa", tmp_path / "nowhere")) == f"data folder {tmp_path / 'nowhere'} does not exist; check --data-dir"


def damaged(path: Path) -> list[tuple[str, bytes]]:
    """The bytes of a file, hurt in three ways."""
    whole = path.read_bytes()
    middle = len(whole) // 2
    return [
        ("cut off", whole[:-20]),
        ("overwritten", whole[:middle] + b"\xff" * 40 + whole[middle + 40 :]),
        ("of another kind", b"no such thing" * 9),
    ]


def test_a_missing_column_is_named_with_those_that_are_needed(tmp_path: Path) -> None:
    path = put(tmp_path / "sst2" / "validation.jsonl", [{"sentence": "fine", "lable": 1}])
    message = refusal(lambda: load_rows(catalog()["sst2"], tmp_path))
    assert message == f"{path}: the column 'label' is missing; sst2 has the columns sentence, label"


@pytest.mark.parametrize("file", ["validation.jsonl", "validation.jsonl.gz", "validation.parquet", "validation.csv"])
def test_a_file_without_rows_is_an_error_that_names_it(tmp_path: Path, file: str) -> None:
    path = tmp_path / "sst2" / file
    path.parent.mkdir()
    if file.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.table({"sentence": pyarrow.array([], "string"), "label": pyarrow.array([], "int64")}), path)
    else:
        path.write_bytes(
            {"validation.jsonl": b"", "validation.jsonl.gz": gzip.compress(b"\n\n"), "validation.csv": b"sentence,label\n"}[file]
        )
    assert refusal(lambda: load_rows(catalog()["sst2"], tmp_path)) == f"{path} has no rows"


def test_a_csv_serves_as_an_evaluation_set(tmp_path: Path) -> None:
    rows = [{"sentence": "dull, and\nlong", "label": 0}, {"sentence": "7", "label": 1}]
    put(tmp_path / "sst2" / "validation.csv", rows)
    loaded = load_rows(catalog()["sst2"], tmp_path)
    made = [loaded.render(i, loaded.task.template(None)) for i in range(2)]
    assert [example.targets for example in made if example] == ["No", "Yes"]


@pytest.mark.parametrize("value", ["1", "true", "ON"])
def test_the_hub_is_refused_at_once_when_offline(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    monkeypatch.setattr(socket.socket, "connect", lambda *args: pytest.fail("a connection was tried"))
    message = refusal(lambda: load_rows(catalog()["squad"], None))
    assert "HF_HUB_OFFLINE" in message and "rajpurkar/squad" in message and "squad/validation.jsonl" in message
