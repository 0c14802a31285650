"""Rows of local files come out by index as they went in, and what is broken is named with its place.

TFRecords are written here by an encoder of its own: variable-length integers, messages and a CRC-32C from a table.
"""

import csv
import gzip
import json
import pickle
import random
import struct
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtllama.errors import UserError
from mtllama.tasks import files
from mtllama.tasks.files import Row, columns, read_rows

# --- the encoder

CRC_TABLE = []
for byte in range(256):
    value = byte
    for _ in range(8):
        value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
    CRC_TABLE.append(value)


def crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ CRC_TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def masked(data: bytes) -> bytes:
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15) + ((crc & 0x7FFF) << 17) + 0xA282EAD8) % (1 << 32))


def varint(number: int) -> bytes:
    number %= 1 << 64
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def block(number: int, content: bytes) -> bytes:
    """A field of a message that holds bytes or another message."""
    return varint(number << 3 | 2) + varint(len(content)) + content


def feature(values: Sequence[Any], packed: bool = True) -> bytes:
    if not values:
        return b""
    if isinstance(values[0], str):
        return block(1, b"".join(block(1, each.encode()) for each in values))
    if isinstance(values[0], bytes):
        return block(1, b"".join(block(1, each) for each in values))
    kind, wire, one = (2, 5, lambda x: struct.pack("<f", x)) if isinstance(values[0], float) else (3, 0, varint)
    if packed:
        return block(kind, block(1, b"".join(map(one, values))))
    return block(kind, b"".join(varint(1 << 3 | wire) + one(each) for each in values))


def example(row: Row, packed: bool = True) -> bytes:
    """A row as a tf.train.Example."""
    entries = []
    for name, value in row.items():
        values = value if isinstance(value, list) else [int(value) if isinstance(value, bool) else value]
        entries.append(block(1, block(1, name.encode()) + block(2, feature(values, packed))))
    return block(1, b"".join(entries))


def record(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    return length + masked(length) + data + masked(data)


def write_tfrecord(path: Path, rows: Sequence[Row]) -> Path:
    content = b"".join(record(example(row)) for row in rows)
    path.write_bytes(gzip.compress(content) if path.name.endswith(".gz") else content)
    return path


def test_the_checksum_is_that_of_the_standard() -> None:
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA


# --- what all kinds share

ROWS: list[Row] = [
    {"inputs_pretokenized": 'She said, "no".\n\n– 雨', "n": [1, -2], "targets_pretokenized": ""},
    {"inputs_pretokenized": "b", "n": [1 << 40], "targets_pretokenized": "naïve"},
    {"inputs_pretokenized": "", "n": [0, 0, 3], "targets_pretokenized": "x"},
]


def write_jsonl(path: Path, rows: Sequence[Row]) -> Path:
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.name.endswith(".gz") else content)
    return path


def write_parquet(path: Path, rows: Sequence[Row], row_group_size: int = 2) -> Path:
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(list(rows)), path, row_group_size=row_group_size, write_page_checksum=True, use_dictionary=False
    )
    return path


WRITERS: dict[str, Callable[[Path, Sequence[Row]], Path]] = {
    "rows.jsonl": write_jsonl,
    "rows.jsonl.gz": write_jsonl,
    "rows.json.gz": write_jsonl,
    "rows.parquet": write_parquet,
    "train.tfrecord": write_tfrecord,
    "train.tfrecord-00000-of-00001": write_tfrecord,
    "train.tfrecord-00000-of-00002.gz": write_tfrecord,
}


def refusal(act: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as raised:
        act()
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("name", WRITERS)
def test_the_same_rows_come_out_of_every_kind_by_index_in_order_and_by_slice(tmp_path: Path, name: str) -> None:
    rows = read_rows(WRITERS[name](tmp_path / name, ROWS))
    assert len(rows) == len(ROWS)
    assert list(rows) == ROWS
    assert [rows[i] for i in (2, 0, 1)] == [ROWS[2], ROWS[0], ROWS[1]]
    assert rows[-1] == ROWS[-1] and rows[numpy.int64(1)] == ROWS[1]
    assert rows[1:] == ROWS[1:]
    for index in (3, -4):
        with pytest.raises(IndexError):
            rows[index]


@pytest.mark.parametrize("name", WRITERS)
def test_rows_can_be_handed_to_another_process(tmp_path: Path, name: str) -> None:
    many = ROWS * 200
    path = WRITERS[name](tmp_path / name, many)
    sent = pickle.dumps(read_rows(path))
    assert len(sent) < 8 * len(many) + 1000
    assert list(pickle.loads(sent)) == many


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "train.tfrecord"])
def test_a_file_that_changed_is_not_read_by_the_offsets_of_the_old_one(tmp_path: Path, name: str) -> None:
    path = WRITERS[name](tmp_path / name, ROWS)
    sent = pickle.dumps(read_rows(path))
    WRITERS[name](path, ROWS + ROWS)
    assert refusal(lambda: pickle.loads(sent)).startswith(f"{path} has changed")


@pytest.mark.parametrize("name", ["train.jsonl", "train.jsonl.gz", "train.tfrecord", "train.tfrecord-00000-of-00001.gz"])
def test_an_empty_file_has_no_rows(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(b"") if name.endswith(".gz") else b"")
    rows = read_rows(path)
    assert len(rows) == 0 and list(rows) == [] and columns(path) == ()


@pytest.mark.parametrize("name", [*WRITERS, "rows.csv"])
def test_a_file_that_is_not_there_and_a_pointer_to_one_are_errors_that_name_it(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    for act in (read_rows, columns):
        assert refusal(lambda act=act: act(path)) == f"{path} cannot be read (No such file or directory); mend or replace the file"  # type: ignore[misc]
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    for act in (read_rows, columns):
        assert refusal(lambda act=act: act(path)) == f"{path} is a Git LFS pointer, not the data; run `git lfs pull` in its folder"  # type: ignore[misc]


def test_gzip_is_known_by_its_content_and_not_by_its_name(tmp_path: Path) -> None:
    zipped = write_jsonl(tmp_path / "a.jsonl.gz", ROWS).rename(tmp_path / "a.jsonl")
    plain = write_jsonl(tmp_path / "b.jsonl", ROWS).rename(tmp_path / "b.jsonl.gz")
    assert list(read_rows(zipped)) == ROWS == list(read_rows(plain))


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "train.tfrecord.gz"])
def test_a_gzip_cut_anywhere_is_an_error_that_names_it(tmp_path: Path, name: str) -> None:
    whole = WRITERS.get(name, write_tfrecord)(tmp_path / name, ROWS).read_bytes()
    for length in range(20, len(whole)):
        (tmp_path / name).write_bytes(whole[:length])
        assert refusal(lambda: read_rows(tmp_path / name)).startswith(f"{tmp_path / name} cannot be read (")


@pytest.mark.parametrize("name", WRITERS)
def test_columns_are_named_without_the_rest_of_the_file(tmp_path: Path, name: str) -> None:
    assert columns(WRITERS[name](tmp_path / name, ROWS)) == tuple(ROWS[0])


# --- JSON lines

TEXTS = st.text(max_size=20)
OBJECTS = st.dictionaries(TEXTS, st.one_of(TEXTS, st.integers(), st.booleans(), st.none(), st.lists(TEXTS, max_size=3)), max_size=3)
BLANKS = st.lists(st.sampled_from([b"", b" ", b"\t", b"  \t ", b"\r"]), max_size=3)


@given(
    lines=st.lists(st.tuples(BLANKS, OBJECTS, st.sampled_from([b"", b" ", b"\r"])), max_size=12),
    last=BLANKS,
    ended=st.booleans(),
    marked=st.booleans(),
    zipped=st.booleans(),
    chunk=st.integers(1, 64),
)
def test_every_line_that_is_not_blank_is_a_row(
    tmp_path_factory: pytest.TempPathFactory, lines: Any, last: Any, ended: bool, marked: bool, zipped: bool, chunk: int
) -> None:
    path = tmp_path_factory.mktemp("jsonl") / "train.jsonl"
    made: list[bytes] = []
    numbers = []
    for before, row, behind in lines:
        made += [*before, json.dumps(row, ensure_ascii=False).encode() + behind]
        numbers.append(len(made))
    content = (b"\xef\xbb\xbf" if marked else b"") + b"\n".join([*made, *last]) + (b"\n" if ended else b"")
    path.write_bytes(gzip.compress(content, 1) if zipped else content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_CHUNK", chunk)
        patch.setattr(files, "_BATCH", chunk % 5 + 1)
        rows = read_rows(path)
        expected = [row for _, row, _ in lines]
        assert list(rows) == expected
        assert [rows[i] for i in range(len(rows))] == expected
        assert columns(path) == (tuple(expected[0]) if expected else ())
        assert [rows._line(i) for i in range(len(rows))] == numbers  # type: ignore[attr-defined]


def test_line_separators_inside_strings_and_numbers_beyond_json_are_read_as_python_reads_them(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"a": "x\u2028y\u0085z", "b": NaN, "c": 123456789012345678901234567890}\n', encoding="utf-8")
    (row,) = read_rows(path)
    assert row["a"] == "x\u2028y\u0085z" and row["b"] != row["b"] and row["c"] == 123456789012345678901234567890


@pytest.mark.parametrize("name", ["train.jsonl", "train.jsonl.gz"])
@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"a": 1', "not valid JSON"),
        (b"{'a': 1}", "not valid JSON"),
        (b'{"a": 1} {"a": 2}', "not valid JSON (Extra data)"),
        (b'{"a": ' + b"[" * 100_000, "not valid JSON"),
        (b'{"a": ' + b"1" * 5000 + b"}", "not valid JSON"),
        (b"\x0c", "not valid JSON"),
        (b"[1, 2]", "a JSON object is needed, not list"),
        (b'"text"', "a JSON object is needed, not str"),
        (b"null", "a JSON object is needed, not NoneType"),
        (b'{"a": "\xff\xfe"}', "not UTF-8 (byte 7 of the line)"),
        (b'{"a": {"b": ["good \\ud83d film"]}}', "half of a surrogate pair (\\ud83d), which is no character"),
        (b'{"\\uDE00": 1}', "half of a surrogate pair (\\ude00), which is no character"),
    ],
)
def test_a_broken_line_is_named_with_its_number_when_it_is_read(tmp_path: Path, name: str, line: bytes, reason: str) -> None:
    path = tmp_path / name
    content = b'{"a": 0}\n\n  \n' + line + b'\n\n{"a": 2}\n'
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    rows = read_rows(path)
    assert len(rows) == 3 and rows[0] == {"a": 0} and rows[2] == {"a": 2}
    for act in (lambda: rows[1], lambda: list(rows)):
        message = refusal(act)
        assert message.startswith(f"{path}, line 4: ") and reason in message
    path.write_bytes(b"\n" + line + b"\n")
    assert refusal(lambda: columns(path)).startswith(f"{path}, line 2: ")


def test_whole_surrogate_pairs_and_their_escapes_as_text_are_read(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text('{"a": "\\ud83d\\ude00", "b": "\\\\ud83d"}\n', encoding="utf-8")
    assert list(read_rows(path)) == [{"a": "😀", "b": "\\ud83d"}]


def test_half_of_a_surrogate_pair_in_a_csv_list_is_named(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_text('a\n"[""\\ud83d""]"\n', encoding="utf-8")
    assert "train.csv: the column 'a' looks like lists" in refusal(lambda: read_rows(path))
    assert "half of a surrogate pair (\\ud83d)" in refusal(lambda: read_rows(path))


# --- TFRecord

INT64 = st.integers(-(1 << 63), (1 << 63) - 1)
FEATURES = st.one_of(st.lists(TEXTS), st.lists(INT64), st.lists(st.floats(width=32, allow_nan=False)))


@given(rows=st.lists(st.dictionaries(TEXTS, FEATURES, max_size=4), max_size=5), packed=st.booleans(), zipped=st.booleans())
def test_every_record_that_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Row], packed: bool, zipped: bool
) -> None:
    path = tmp_path_factory.mktemp("tfrecord") / "train.tfrecord-00000-of-00001"
    content = b"".join(record(example(row, packed)) for row in rows)
    path.write_bytes(gzip.compress(content, 1) if zipped else content)
    assert list(read_rows(path)) == rows


def test_features_with_one_meaning_are_values_and_all_others_lists(tmp_path: Path) -> None:
    row = {"inputs_pretokenized": "a", "is_correct": 1, "weight": 1.0, "answer_choices": ["a"], "targets": [7], "idx": []}
    rows = read_rows(write_tfrecord(tmp_path / "train.tfrecord", [row]))
    assert rows[0] == row
    two = {"inputs_pretokenized": ["a", "b"]}
    assert read_rows(write_tfrecord(tmp_path / "two.tfrecord", [two]))[0] == two


def test_features_come_in_one_order_in_every_process(tmp_path: Path) -> None:
    names = [f"{each:02}" for each in range(40)]
    rows = read_rows(write_tfrecord(tmp_path / "train.tfrecord", [{name: [1] for name in names[::-1]}]))
    assert list(rows[0]) == names


def test_only_the_columns_that_are_needed_are_decoded(tmp_path: Path) -> None:
    for name, write in (("train.tfrecord", write_tfrecord), ("rows.parquet", write_parquet)):
        rows = read_rows(write(tmp_path / name, ROWS), ("n", "no such column"))
        expected = [{"n": row["n"]} for row in ROWS]
        assert list(rows) == expected == [rows[i] for i in range(3)]
        assert list(pickle.loads(pickle.dumps(rows))) == expected


def test_a_flipped_bit_anywhere_is_an_error_that_names_record_and_place(tmp_path: Path) -> None:
    path = write_tfrecord(tmp_path / "train.tfrecord", ROWS)
    whole = path.read_bytes()
    starts = [0]
    for row in ROWS:
        starts.append(starts[-1] + 16 + len(example(row)))
    assert starts[-1] == len(whole)
    on_opening = 0
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        index = next(i for i in range(3) if at < starts[i + 1])
        message = refusal(lambda: list(read_rows(path)))
        assert message.startswith(f"{path}, record {index} at byte {starts[index]}: the checksum of its "), at
        if "length" in message:
            on_opening += 1
            refusal(lambda: read_rows(path))
        else:  # only the record itself cannot be read
            rows = read_rows(path)
            assert [rows[i] for i in range(3) if i != index] == [row for i, row in enumerate(ROWS) if i != index]
    assert on_opening == 3 * 12


def test_a_file_cut_inside_a_record_is_an_error_on_opening(tmp_path: Path) -> None:
    path = write_tfrecord(tmp_path / "train.tfrecord", ROWS)
    whole, first = path.read_bytes(), 16 + len(example(ROWS[0]))
    for length in range(1, first + 30):
        path.write_bytes(whole[:length])
        if length == first:
            assert list(read_rows(path)) == ROWS[:1]
            continue
        index, start = (0, 0) if length < first else (1, first)
        assert refusal(lambda: read_rows(path)) == (
            f"{path}, record {index} at byte {start}: the file ends inside it, at byte {length}; fetch or write the file again"
        )


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"no such thing", "it is no tf.train.Example"),
        (example({"a": ["x"]})[:-1], "it is no tf.train.Example"),
        (example({"a": [b"\xff"]}), "it is no tf.train.Example ('utf-8' codec"),
    ],
)
def test_a_record_that_is_no_example_is_named(tmp_path: Path, data: bytes, reason: str) -> None:
    path = tmp_path / "train.tfrecord"
    path.write_bytes(record(example(ROWS[0])) + record(data))
    rows = read_rows(path)
    assert rows[0] == ROWS[0]
    message = refusal(lambda: rows[1])
    assert message.startswith(f"{path}, record 1 at byte {16 + len(example(ROWS[0]))}: ") and reason in message


def test_a_file_of_another_kind_is_no_tfrecord(tmp_path: Path) -> None:
    path = tmp_path / "train.tfrecord"
    path.write_text('{"a": 1}\n' * 9)
    assert refusal(lambda: read_rows(path)).startswith(f"{path}, record 0 at byte 0: the checksum of its length is wrong")


# --- parquet and csv


def test_row_groups_are_dropped_and_decoded_again_when_there_is_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = [{"n": i, "text": f"row {i}" * 50} for i in range(100)]
    path, other = write_parquet(tmp_path / "a.parquet", table, 7), write_parquet(tmp_path / "b.parquet", table[::-1], 7)
    monkeypatch.setattr(files, "_KEPT_BYTES", 10_000)
    files._kept.clear()
    rows, others = read_rows(path), read_rows(other)
    assert len(rows) == 100
    order = list(range(100))
    random.Random(0).shuffle(order)
    for i in order:
        assert rows[i] == table[i] and others[i] == table[99 - i]
        assert sum(size for _, size in files._kept.values()) <= 10_000
    assert 1 < len(files._kept) < 30
    rows[0]
    first, (kept, _) = next(reversed(files._kept.items()))
    for i in range(7, 100, 7):
        rows[i], rows[0]
        assert files._kept[first][0] is kept  # used all the time, so others go
    monkeypatch.setattr(files, "_KEPT_BYTES", 1)
    assert list(rows) == table
    assert len(files._kept) == 1


def test_a_file_that_was_replaced_is_not_mixed_up_with_what_was_kept_of_it(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [{"n": 1}])
    assert read_rows(path)[0] == {"n": 1}
    path.unlink()
    write_parquet(path, [{"n": 22}])
    assert read_rows(path)[0] == {"n": 22}


def test_threads_can_read_one_file_at_once(tmp_path: Path) -> None:
    table = [{"n": i, "text": f"row {i}" * 20} for i in range(400)]
    rows = read_rows(write_parquet(tmp_path / "a.parquet", table, 9))
    files._kept.clear()
    wrong: list[int] = []

    def read(seed: int) -> None:
        order = list(range(400))
        random.Random(seed).shuffle(order)
        wrong.extend(i for i in order if rows[i] != table[i])

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(files._kept) == 45


def test_a_parquet_file_without_its_footer_is_an_error_on_opening(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "train.parquet", ROWS)
    whole = path.read_bytes()
    for content in (whole[:-20], b"", b"no such thing" * 9, whole[:-8] + b"\xff" * 8):
        path.write_bytes(content)
        assert refusal(lambda: read_rows(path)).startswith(f"{path}: its footer cannot be read (")


def test_a_damaged_page_is_an_error_that_names_its_rows_and_the_others_are_read(tmp_path: Path) -> None:
    table = [{"text": f"row {i} of {i * i}"} for i in range(40)]
    path = write_parquet(tmp_path / "train.parquet", table, 10)
    column = pyarrow.parquet.ParquetFile(path).metadata.row_group(2).column(0)
    content = bytearray(path.read_bytes())
    content[column.data_page_offset + column.total_compressed_size - 5] ^= 1
    path.write_bytes(content)
    rows = read_rows(path)
    assert len(rows) == 40 and rows[19] == table[19] and rows[30] == table[30]
    for act in (lambda: rows[25], lambda: list(rows)):
        assert refusal(act).startswith(f"{path}: row group 2, rows 20 to 29 cannot be read (")


def test_text_in_a_table_that_is_not_utf8_is_named_by_its_row(tmp_path: Path) -> None:
    text = pyarrow.array([b"a", b"\xff", b"c"]).cast("binary").view("string")
    path = tmp_path / "train.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": text}), path)
    rows = read_rows(path)
    assert rows[2] == {"text": "c"}
    for act in (lambda: rows[1], lambda: list(rows)):
        assert refusal(act).startswith(f"{path}, row 1: ")


@pytest.mark.parametrize("name", ["rows.csv", "rows.csv.gz"])
def test_csv_columns_have_the_types_that_their_values_show(tmp_path: Path, name: str) -> None:
    table = [{"text": 'She said, "no".', "n": 1, "x": 0.5}, {"text": "Two lines:\n\nthis, and this", "n": 0, "x": -2.0}]
    with open(tmp_path / "plain", "w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    content = (tmp_path / "plain").read_bytes()
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    rows = read_rows(path)
    assert list(rows) == table == [rows[0], rows[1]] and columns(path) == ("text", "n", "x")
    assert [type(value) for value in rows[0].values()] == [str, int, float]
    assert list(pickle.loads(pickle.dumps(rows))) == table


@pytest.mark.parametrize("content", [b'text,label\n"open quote,1\n', b"a,b\n1,2,3\n", b""])
def test_what_is_no_csv_is_an_error_that_names_it(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "train.csv"
    path.write_bytes(content)
    assert refusal(lambda: read_rows(path)).startswith(f"{path} cannot be read (")


def test_real_files_are_read_as_a_plain_loop_reads_them(shared_data: Path) -> None:
    paths = sorted(shared_data.rglob("*.jsonl"))
    assert len(paths) > 90
    total = 0
    for path in paths:
        with open(path, encoding="utf-8") as handle:
            expected = [json.loads(line) for line in handle if line.strip()]
        rows = read_rows(path)
        assert len(rows) == len(expected) and all(map(dict.__eq__, rows, expected))
        total += len(rows)
        if rows:
            assert rows[len(rows) // 2] == expected[len(rows) // 2]
    assert total > 100_000


@pytest.mark.parametrize("write", [str, json.dumps], ids=["python", "json"])
def test_lists_and_mappings_in_a_csv_are_read_as_such(tmp_path: Path, write: Any) -> None:
    rows = [{"choices": ["it's", "a, b"], "answers": {"text": ["x"], "start": [i]}, "text": "[sic] so", "label": i} for i in range(3)]
    path = tmp_path / "train.csv"
    with open(path, "w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows({key: write(value) if isinstance(value, list | dict) else value for key, value in row.items()} for row in rows)
    assert list(read_rows(path)) == rows


def test_lists_in_a_csv_that_cannot_be_read_are_an_error_that_names_the_column(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_text("choices\n\"['a' 'b']\"\n\"['c' d]\"\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"train.csv: the column 'choices' looks like lists"):
        read_rows(path)
