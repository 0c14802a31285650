"""P3's rendered rows are found in every layout, give the same examples, and nothing is taken for what it is not."""

import csv
import json
import pickle
import socket
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from test_files import refusal, write_jsonl, write_parquet, write_tfrecord

from mtllama.errors import UserError
from mtllama.tasks import p3
from mtllama.tasks.files import Row
from mtllama.tasks.p3 import Prompted, config_name, find
from mtllama.tasks.template import Example

CONFIG = "glue_mrpc_same_thing"
ROWS: list[Row] = [
    {"inputs": "Do these say the same?\n A\n B", "targets": "\nyes", "answer_choices": ["no", "yes"]},
    {"inputs": "Nothing applies here", "targets": " \n", "answer_choices": ["no", "yes"]},
    {"inputs": " naïve – 雨 ", "targets": "no ", "answer_choices": ["no", "yes"]},
    {"inputs": "Which review is this?", "targets": "no review.", "answer_choices": ["no", "yes"]},
]


def own(rows: Sequence[Row]) -> list[Row]:
    """Rows with the columns of P3's own files, where `inputs` and `targets` are token ids."""
    texts = ("inputs", "targets")
    return [
        {**{f"{name}_pretokenized": row[name] for name in texts}, **{k: v for k, v in row.items() if k not in texts}}
        | {name: [len(row[name]), 1] for name in texts}
        for row in rows
    ]


def put(path: Path, rows: Sequence[Row]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if ".jsonl" in path.name:
        return write_jsonl(path, rows)
    return (write_parquet if path.name.endswith(".parquet") else write_tfrecord)(path, own(rows))


def examples(prompted: Prompted) -> list[Example | None]:
    return [prompted.example(index) for index in range(len(prompted))]


FILES = [
    f"{CONFIG}/train.jsonl",
    f"{CONFIG}.train.jsonl",
    f"{CONFIG}.jsonl",
    f"deep/er/{CONFIG}.jsonl.gz",
    f"p3_{CONFIG}_train.jsonl",
    f"{CONFIG}/train/0000.parquet",
    f"{CONFIG}/train-00000-of-00001.parquet",
    f"{CONFIG}/train.parquet",
    f"data/{CONFIG}/train.tfrecord-00000-of-00001",
    f"{CONFIG}/train.tfrecord-00000-of-00001.gz",
]


@pytest.mark.parametrize("file", FILES)
def test_every_layout_gives_the_same_examples_with_texts_as_they_are(tmp_path: Path, file: str) -> None:
    path = put(tmp_path / file, ROWS)
    found = find(tmp_path)
    assert list(found) == [CONFIG]
    prompted = found[CONFIG]
    assert (prompted.config, prompted.origin, len(prompted)) == (CONFIG, str(path), 4)
    assert examples(prompted) == [
        Example("Do these say the same?\n A\n B", "\nyes", ("no", "yes"), CONFIG, CONFIG),
        None,
        Example(" naïve – 雨 ", "no ", ("no", "yes"), CONFIG, CONFIG),
        Example("Which review is this?", "no review.", None, CONFIG, CONFIG),
    ]
    assert prompted.example(-1) == prompted.example(3)
    assert find(tmp_path, "validation") == {}
    assert examples(pickle.loads(pickle.dumps(prompted))) == examples(prompted)


@pytest.mark.parametrize(
    ("file", "config", "split"),
    [
        ("a.validation.jsonl", "a", "validation"),
        ("a/test.jsonl.gz", "a", "test"),
        ("super_glue_wsc.fixed_GPT_3_Style.train.jsonl", "super_glue_wsc.fixed_GPT_3_Style", "train"),
        ("super_glue_wsc.fixed_GPT_3_Style.jsonl", "super_glue_wsc.fixed_GPT_3_Style", "train"),
        ("cos_e_v1.11_i_think.jsonl", "cos_e_v1.11_i_think", "train"),
        ("quarel_logic_test.jsonl", "quarel_logic_test", "train"),
        ("p3_quarel_logic_test_validation.jsonl", "quarel_logic_test", "validation"),
        ("p31t0_train.jsonl", "p31t0_train", "train"),
        ("p31t0_validation.jsonl", "p31t0_validation", "validation"),
        ("a/train_r1.jsonl", "a", "train_r1"),
        ("a/subset/0000.parquet", "a", "subset"),
        ("a/validation.tfrecord-00000-of-00001", "a", "validation"),
    ],
)
def test_config_and_split_are_what_the_name_says(tmp_path: Path, file: str, config: str, split: str) -> None:
    put(tmp_path / file, ROWS)
    for asked in ("train", "validation", "test", "train_r1", "subset"):
        assert list(find(tmp_path, asked)) == ([config] if asked == split else []), asked


def test_a_folder_of_one_config_can_be_named_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / CONFIG / "train.jsonl", ROWS)
    monkeypatch.chdir(tmp_path / CONFIG)
    assert list(find(Path("."))) == [CONFIG] == list(find(tmp_path / CONFIG))


def test_a_file_can_hold_several_prompts_and_splits(tmp_path: Path) -> None:
    rows = []
    for number in range(12):
        template, split = ("same thing", "Is it, really?")[number % 2], ("train", "validation", "train")[number % 3]
        rows.append({"inputs": f"in {number}", "targets": str(number), "task": "glue-mrpc", "template": template, "split": split})
    put(tmp_path / "glue-mrpc.jsonl", rows)
    found = find(tmp_path)
    assert list(found) == ["glue_mrpc_Is_it_really_", "glue_mrpc_same_thing"]
    same = found["glue_mrpc_same_thing"]
    assert [example and example.targets for example in examples(same)] == ["0", "2", "6", "8"]
    assert same.example(1) == Example("in 2", "2", None, "glue_mrpc", "same thing")
    assert [row["targets"] for row in same.rows] == ["0", "2", "6", "8"] and same.rows[1:3] == [rows[2], rows[6]]
    assert [len(each) for each in find(tmp_path, "validation").values()] == [2, 2]
    assert find(tmp_path, "test") == {}
    assert examples(pickle.loads(pickle.dumps(same))) == examples(same)


def test_rows_that_name_no_task_belong_to_the_set_that_the_file_names(tmp_path: Path) -> None:
    put(tmp_path / "ag_news.jsonl", [{"inputs": "a", "targets": "b", "template": "recommend"}])
    put(tmp_path / "dream.jsonl", [{"inputs": "a", "targets": "b", "split": "train"}, {"inputs": "a", "targets": "c", "split": "test"}])
    found = find(tmp_path)
    assert {name: (each.task, each.template, len(each)) for name, each in found.items()} == {
        "ag_news_recommend": ("ag_news", "recommend", 1),
        "dream": ("dream", "dream", 1),
    }


def test_a_file_that_does_not_say_its_prompts_is_one_set_and_says_so(tmp_path: Path) -> None:
    path = put(tmp_path / "p31t0_train.jsonl", ROWS)
    note = find(tmp_path)["p31t0_train"].note
    assert note == f"{path} does not say which prompts made its rows: it is one set, p31t0_train, and has one weight as a whole"
    put(tmp_path / "ag_news.jsonl", [{"inputs": "a", "targets": "b", "template": "recommend"}])
    assert not find(tmp_path)["ag_news_recommend"].note


@pytest.mark.parametrize(
    "names",
    [
        ["train-00000-of-00003.parquet", "train-00001-of-00003.parquet", "train-00002-of-00003.parquet"],
        ["train/0000.parquet", "train/0001.parquet", "train/0002.parquet"],
        ["train.tfrecord-00000-of-00003", "train.tfrecord-00001-of-00003", "train.tfrecord-00002-of-00003.gz"],
    ],
)
def test_shards_are_one_sequence_and_none_may_be_missing(tmp_path: Path, names: list[str]) -> None:
    parts = [ROWS[:1], [], ROWS[1:]] if "tfrecord" in names[0] else [ROWS[:1], ROWS[1:2], ROWS[2:]]
    paths = [put(tmp_path / CONFIG / name, rows) for name, rows in zip(names, parts, strict=True)]
    prompted = find(tmp_path)[CONFIG]
    assert [each and each.inputs for each in examples(prompted)] == [ROWS[0]["inputs"], None, ROWS[2]["inputs"], ROWS[3]["inputs"]]
    assert prompted.origin == f"{paths[0].parent}/train (3 shards)"
    assert prompted.rows.where(3) == f"{paths[2]}, row {2 if 'tfrecord' in names[0] else 1}"  # type: ignore[attr-defined]
    paths[1].unlink()
    assert refusal(lambda: find(tmp_path)) == (
        f"{paths[0].parent}: the split train has {3 if 'of' in names[0] else 2} shards, counted from 0; there are 0, 2; fetch them again"
    )


def test_one_shard_under_two_names_is_an_error_that_names_both(tmp_path: Path) -> None:
    first = put(tmp_path / CONFIG / "train.tfrecord-00000-of-00001", ROWS)
    second = put(tmp_path / CONFIG / "train.tfrecord-00000-of-00001.gz", ROWS)
    message = refusal(lambda: find(tmp_path))
    assert message.startswith(f"P3 config {CONFIG}: ") and str(first) in message and str(second) in message


def test_one_config_in_two_places_is_an_error_that_names_both(tmp_path: Path) -> None:
    for first, second in pairwise(FILES):
        folder = tmp_path / first.replace("/", "-")
        paths = put(folder / first, ROWS), put(folder / "other" / second, ROWS)
        message = refusal(lambda folder=folder: find(folder))  # type: ignore[misc]
        assert message.startswith(f"P3 config {CONFIG} stands in two places: ")
        assert all(str(path) in message for path in paths)


def test_a_folder_that_is_reached_twice_is_read_once(tmp_path: Path) -> None:
    put(tmp_path / CONFIG / "train.jsonl", ROWS)
    put(tmp_path / "other.jsonl", ROWS[:2])
    (tmp_path / CONFIG / "loop").symlink_to(tmp_path)
    put(tmp_path / ".cache" / CONFIG / "train.jsonl", ROWS)
    assert {name: len(each) for name, each in find(tmp_path).items()} == {CONFIG: 4, "other": 2}


def test_a_folder_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    assert refusal(lambda: find(tmp_path / "nowhere")) == f"P3 folder {tmp_path / 'nowhere'} does not exist; check the path"


# --- numbers beside TFRecords


def test_as_many_records_as_the_stats_say_are_needed(tmp_path: Path) -> None:
    path = put(tmp_path / CONFIG / "train.tfrecord-00000-of-00001", ROWS)
    (path.parent / "info.train.json").write_text(json.dumps({"num_shards": 1, "features": {}, "seqio_version": "0.0.6"}))
    (path.parent / "stats.validation.json").write_text(json.dumps({"examples": 9}))
    stats = path.parent / "stats.train.json"
    stats.write_text(json.dumps({"examples": 4, "inputs_tokens": 99}))
    assert len(find(tmp_path)[CONFIG]) == 4
    for number in (3, 5):
        stats.write_text(json.dumps({"examples": number}))
        prompted = find(tmp_path)[CONFIG]
        for act in (prompted.__len__, lambda prompted=prompted: prompted.example(0)):
            assert refusal(act) == f"{path}: 4 records, but the stats file beside it says {number}; fetch both again"
    stats.write_text("{")
    assert refusal(lambda: find(tmp_path)).startswith(f"{stats} cannot be read (")


def test_as_many_shards_as_the_info_says_are_needed(tmp_path: Path) -> None:
    path = put(tmp_path / CONFIG / "train.tfrecord-00000-of-00001", ROWS)
    (path.parent / "info.train.json").write_text(json.dumps({"num_shards": 2}))
    assert refusal(lambda: find(tmp_path)).startswith(f"{path.parent}: the split train has 2 shards, counted from 0; there are 0;")


# --- which rows count


CHOICES: list[Row] = [
    {"inputs": f"question {number}", "targets": choice, "idx": [number, place], "is_correct": place == number % 2, "weight": 1.0}
    for number in range(3)
    for place, choice in enumerate(("left", "right"))
]


@pytest.mark.parametrize("file", FILES)
def test_of_a_row_for_each_choice_only_the_correct_one_counts(tmp_path: Path, file: str) -> None:
    path = put(tmp_path / file, CHOICES)
    prompted = find(tmp_path)[CONFIG]
    assert len(prompted) == 3
    assert [(each.inputs, each.targets, each.choices) for each in examples(prompted) if each] == [
        ("question 0", "left", None),
        ("question 1", "right", None),
        ("question 2", "left", None),
    ]
    assert prompted.rows.where(1) == f"{path}, row 3"  # type: ignore[attr-defined]


def test_rows_of_which_none_is_correct_are_no_rows(tmp_path: Path) -> None:
    put(tmp_path / CONFIG / "test.jsonl", [{**row, "is_correct": False} for row in CHOICES])
    assert len(find(tmp_path, "test")[CONFIG]) == 0


def test_a_row_that_does_not_say_whether_it_is_correct_is_an_error(tmp_path: Path) -> None:
    rows = [CHOICES[0], {**CHOICES[1], "is_correct": None}]
    path = put(tmp_path / CONFIG / "train.jsonl", rows)
    assert refusal(lambda: len(find(tmp_path)[CONFIG])) == f"{path}, row 1: 'is_correct' is None; true or false is needed"


# --- what is broken


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"inputs": "a", "label": 1}, "the column 'targets' (or 'targets_pretokenized') is missing; its columns: inputs, label"),
        ({"targets": "a"}, "the column 'inputs' (or 'inputs_pretokenized') is missing; its columns: targets"),
        ({"inputs": "a", "targets": 1}, "'targets' is not text but int; mend or remove the row"),
        ({"inputs": None, "targets": "a"}, "'inputs' is not text but NoneType; mend or remove the row"),
        ({"inputs": "a", "targets": "b", "answer_choices": "b"}, "'answer_choices' is not a list of texts; mend or remove the row"),
        ({"inputs": "a", "targets": "b", "answer_choices": [1]}, "'answer_choices' is not a list of texts; mend or remove the row"),
    ],
)
def test_a_row_that_is_no_example_is_named(tmp_path: Path, row: Row, reason: str) -> None:
    path = write_jsonl(tmp_path / f"{CONFIG}.jsonl", [ROWS[0], row])
    prompted = find(tmp_path)[CONFIG]
    assert prompted.example(0) is not None
    assert refusal(lambda: prompted.example(1)) == f"{path}, row 1: {reason}"


def test_token_ids_are_never_taken_for_text(tmp_path: Path) -> None:
    folder = tmp_path / CONFIG
    folder.mkdir()
    write_parquet(folder / "train.parquet", [{"inputs": [1, 2], "targets": [3]}])
    assert "'inputs' is not text but list" in refusal(lambda: find(tmp_path)[CONFIG].example(0))
    (folder / "train.parquet").unlink()
    write_tfrecord(folder / "train.tfrecord", [{"inputs": [1, 2], "targets": [3]}])
    assert "the column 'inputs' (or 'inputs_pretokenized') is missing" in refusal(lambda: find(tmp_path)[CONFIG].example(0))


def test_parquet_with_plain_columns_is_read_too(tmp_path: Path) -> None:
    (tmp_path / CONFIG).mkdir()
    write_parquet(tmp_path / CONFIG / "train.parquet", ROWS)
    assert find(tmp_path)[CONFIG].example(0) == Example(ROWS[0]["inputs"], "\nyes", ("no", "yes"), CONFIG, CONFIG)


@pytest.mark.parametrize("row", [{"task": 1, "template": "a"}, {"task": "a", "template": ["b"]}])
def test_a_prompt_that_is_no_text_is_named_by_its_row(tmp_path: Path, row: Row) -> None:
    texts = {"inputs": "a", "targets": "b"}
    path = put(tmp_path / "glue.jsonl", [{**texts, "task": "a", "template": "b"}, {**texts, **row}])
    assert refusal(lambda: find(tmp_path)) == f"{path}, row 1: 'task' and 'template' must be text; mend or remove the row"


def test_files_of_rows_that_are_not_rendered_are_passed_over(tmp_path: Path) -> None:
    put(tmp_path / CONFIG / "train.jsonl", ROWS)
    for file in ("ag_news/train.jsonl", "elsewhere/ag_news/train.jsonl", "notes.jsonl"):
        put(tmp_path / file, [{"text": "a", "label": 1, "task": "x", "split": "train"}])
    (tmp_path / "trec").mkdir()
    write_parquet(tmp_path / "trec" / "train-00000-of-00001.parquet", [{"text": "a"}])
    for file in ("README.md", "train.txt", "info.train.json", "dream.csv"):
        (tmp_path / file).write_text("inputs,targets\na,b\n")
    assert list(find(tmp_path)) == [CONFIG]


@pytest.mark.parametrize("file", FILES)
def test_a_file_that_cannot_be_read_hinders_only_those_who_use_it(tmp_path: Path, file: str) -> None:
    path = put(tmp_path / file, ROWS)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    put(tmp_path / "other.jsonl", ROWS)
    found = find(tmp_path)
    assert list(found) == [CONFIG, "other"] and len(found["other"]) == 4
    for act in (lambda: len(found[CONFIG]), lambda: found[CONFIG].example(0)):
        assert refusal(act) == f"{path} is a Git LFS pointer, not the data; run `git lfs pull` in its folder"


def test_an_empty_file_is_a_config_without_rows(tmp_path: Path) -> None:
    put(tmp_path / CONFIG / "train.jsonl", [])
    put(tmp_path / "other" / "train.tfrecord-00000-of-00001", [])
    assert {name: len(each) for name, each in find(tmp_path).items()} == {CONFIG: 0, "other": 0}


# --- the hub, and real rows


def test_the_hub_gives_the_same_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def read_hub(name: str, location: Any, split: str) -> list[Row]:
        asked.append((name, location.hub_id, location.config, split))
        return own(ROWS) if name == CONFIG else own(CHOICES)

    monkeypatch.setattr(p3, "read_hub", read_hub)
    assert p3.from_hub(CONFIG).example(0) == Example(ROWS[0]["inputs"], "\nyes", ("no", "yes"), CONFIG, CONFIG)
    assert len(p3.from_hub("super_glue_copa_x_score_eval", "validation")) == 3
    assert asked == [
        (CONFIG, "bigscience/P3", CONFIG, "train"),
        ("super_glue_copa_x_score_eval", "bigscience/P3", "super_glue_copa_x_score_eval", "validation"),
    ]


def test_the_hub_is_not_asked_when_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(socket.socket, "connect", lambda *args: pytest.fail("a connection was tried"))
    with pytest.raises(UserError, match="bigscience/P3 cannot be had from the hub"):
        p3.from_hub(CONFIG)


def t0_tasks(shared_data: Path) -> list[dict[str, str]]:
    path = shared_data.parent / "t0" / "t0_tasks.csv"
    if not path.is_file():
        pytest.skip("the list of T0's tasks is not beside this checkout")
    with open(path, encoding="utf-8", newline="") as handle:
        return list(csv.DictReader(handle))


def test_config_names_are_p3s_own(shared_data: Path) -> None:
    tasks = t0_tasks(shared_data)
    assert len(tasks) == 464
    for task in tasks:
        prefix = "_".join(part for part in (task["dataset"], task["subset"]) if part)
        assert config_name(prefix, task["template"]) == task["p3_config"]


def test_real_rows_are_found_under_p3s_own_names(shared_data: Path) -> None:
    known = {task["p3_config"] for task in t0_tasks(shared_data)}
    found = find(shared_data / "p3")
    assert len(found) == 263 and set(found) <= known
    assert len({prompted.origin for prompted in found.values()}) == 33
    assert sum(map(len, found.values())) == 20_540
    assert all(prompted.example(index) for prompted in found.values() for index in range(len(prompted)))
    assert all(config_name(prompted.task, prompted.template) == name for name, prompted in found.items())
    assert find(shared_data / "p3", "validation") == {}
    assert find(shared_data).keys() == found.keys()  # the data sets beside them are not rendered


def test_real_rows_are_the_same_from_every_layout(tmp_path: Path, shared_data: Path) -> None:
    found = find(shared_data / "p3")
    names = sorted(found)[::40]
    assert len(names) == 7
    writers: dict[str, Callable[[Path, Sequence[Row]], Path]] = {
        "train.jsonl": put,
        "train/0000.parquet": put,
        "train.tfrecord-00000-of-00001": put,
    }
    for name in names:
        expected = [each and (each.inputs, each.targets) for each in examples(found[name])]
        assert expected
        for file, write in writers.items():
            folder = tmp_path / file.replace("/", "-")
            write(folder / name / file, [{"inputs": row["inputs"], "targets": row["targets"]} for row in found[name].rows])
            assert [each and (each.inputs, each.targets) for each in examples(find(folder)[name])] == expected
