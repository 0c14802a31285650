"""Local files of rows, read by index: JSON lines, csv, parquet and TFRecord; all but parquet also gzipped.

Opening a file finds where its rows lie and no more; a row is parsed when it is asked for. So a plain file of any size
costs its offsets (8 bytes a row), and the memory that its pages take belongs to the operating system. A gzipped file is
unpacked into memory once. Gzip is known by its first bytes, whatever the file is called.
"""

import ast
import contextlib
import gzip
import io
import itertools
import json
import mmap
import operator
import re
import struct
import threading
import zlib
from abc import abstractmethod
from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import google_crc32c
import numpy
from numpy.typing import NDArray

from mtllama.errors import UserError

Row = dict[str, Any]

_TFRECORD = re.compile(r".*\.tfrecords?(-\d+-of-\d+)?")
_SCALARS = frozenset({"inputs_pretokenized", "targets_pretokenized", "is_correct", "weight"})
"""Features that hold one value by their meaning; a TFRecord stores every feature as a list."""
_KEPT_BYTES = 1 << 30
"""Decoded row groups of parquet files that a process keeps, over all its files."""

_BATCH = 1024
"""Rows that iteration prepares at a time."""
_CHUNK = 1 << 20
"""Bytes that are searched for line ends at a time: what fits in a cache."""


def read_rows(path: Path, columns: Collection[str] | None = None) -> Sequence[Row]:
    """The rows of a local file, by index and in order; its name says the kind, and any other name is JSON lines.

    `columns`: those that are needed, where leaving out the others saves work (parquet, TFRecord); one that the file lacks is no error.
    What is broken is a `UserError` with the file and the line, record or row group: on opening where the rows cannot be
    told apart (a gzip or record cut off, a parquet footer), else when the row is read. The result can be pickled; it then
    reopens the file, which must not have changed.
    """
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        return _Parquet(path, columns)
    if name.endswith(".csv"):
        return _Csv(path)
    if _TFRECORD.fullmatch(name):
        return _Records(path, columns)
    return _Lines(path)


def columns(path: Path) -> tuple[str, ...]:
    """The names of the columns: a parquet file's, else those of the first row, with no look at the rest of JSON lines."""
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        return _Parquet(path, None).names
    if name.endswith(".csv") or _TFRECORD.fullmatch(name):
        rows = read_rows(path)
        return tuple(rows[0]) if len(rows) else ()
    with _reading(path), _open(path) as lines:
        for number, line in enumerate(lines, start=1):
            text = line.removeprefix(_BOM) if number == 1 else line
            if text.strip(_BLANK):
                break
        else:
            return ()
    return tuple(_parse_line(text, lambda: f"{path}, line {number}"))


# --- bytes of a file

_BOM = b"\xef\xbb\xbf"
_BLANK = b" \t\r\n"
"""What JSON takes for white space."""


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{path} cannot be read ({reason}); mend or replace the file") from error


def _open(path: Path) -> gzip.GzipFile | io.BufferedReader:
    with open(path, "rb") as file:
        head = file.read(64)
    if head.startswith(b"version https://git-lfs.github.com/"):
        raise UserError(f"{path} is a Git LFS pointer, not the data; run `git lfs pull` in its folder")
    return gzip.open(path, "rb") if head.startswith(b"\x1f\x8b") else open(path, "rb")


def _content(path: Path) -> bytes | mmap.mmap:
    with _reading(path), _open(path) as file:
        if isinstance(file, gzip.GzipFile):
            return file.read()
        if not path.stat().st_size:
            return b""  # there is no map of nothing
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


class _Rows(Sequence[Row]):
    """What all kinds of files share: an index from either end, and slices."""

    @abstractmethod
    def _row(self, index: int) -> Row: ...

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._row(each) for each in range(*index.indices(len(self)))]
        number = operator.index(index)
        if number < 0:
            number += len(self)
        if not 0 <= number < len(self):
            raise IndexError(f"there is no row {index} among {len(self)}")
        return self._row(number)


class _Spans(_Rows):
    """Rows that stand one behind the other in the bytes of a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._data = _content(path)
        self._bounds = self._find()

    @abstractmethod
    def _find(self) -> NDArray[numpy.int64]:
        """Where each row begins, and behind them the end of the last one."""

    @abstractmethod
    def _parse(self, span: bytes, index: int) -> Row: ...

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def _row(self, index: int) -> Row:
        return self._parse(self._data[self._bounds[index] : self._bounds[index + 1]], index)

    def __iter__(self) -> Iterator[Row]:
        for first in range(0, len(self), _BATCH):  # plain ints are quicker to slice by, and a list of all would be large
            bounds = self._bounds[first : first + _BATCH + 1].tolist()
            for index, (start, end) in enumerate(itertools.pairwise(bounds), start=first):
                yield self._parse(self._data[start:end], index)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_data": len(self._data)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _data=_content(state["_path"]))
        if len(self._data) != state["_data"]:
            raise UserError(f"{self._path} has changed since it was opened; start again")


# --- JSON lines


class _Lines(_Spans):
    def _find(self) -> NDArray[numpy.int64]:
        data = numpy.frombuffer(self._data, numpy.uint8)
        begin = len(_BOM) if self._data[: len(_BOM)] == _BOM else 0
        starts = numpy.concatenate([numpy.array([begin]), *(newlines + 1 for newlines in _newlines(data))])
        starts = starts[starts < len(data)]
        ends = numpy.append(starts[1:], len(data))
        filled = numpy.ones(len(starts), bool)
        for each in numpy.flatnonzero(data[starts] <= ord(" ")):  # only these can be blank: hardly any in a usual file
            filled[each] = bool(self._data[starts[each] : ends[each]].strip(_BLANK))
        # A blank line belongs to the row before it, where it is white space to the parser.
        return numpy.append(starts[filled], len(data))

    def _parse(self, span: bytes, index: int) -> Row:
        return _parse_line(span, lambda: f"{self._path}, line {self._line(index)}")

    def _line(self, index: int) -> int:
        data, start = numpy.frombuffer(self._data, numpy.uint8), self._bounds[index]
        return 1 + sum(int(numpy.count_nonzero(newlines < start)) for newlines in _newlines(data))


def _newlines(data: NDArray[numpy.uint8]) -> Iterator[NDArray[numpy.int64]]:
    for first in range(0, len(data), _CHUNK):
        yield numpy.flatnonzero(data[first : first + _CHUNK] == ord("\n")) + first


def _parse_line(line: bytes, where: Callable[[], str]) -> Row:
    try:
        row = json.loads(str(line, "utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{where()}: not UTF-8 (byte {error.start} of the line); save the file as UTF-8") from error
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", None) or str(error)
        raise UserError(f"{where()}: not valid JSON ({reason}); mend or remove the line") from error
    if not isinstance(row, dict):
        raise UserError(f"{where()}: a JSON object is needed, not {type(row).__name__}")
    if _ESCAPED.search(line) and (half := _half(row)):
        raise UserError(f"{where()}: half of a surrogate pair ({half}), which is no character; mend or remove the line")
    return row


_ESCAPED, _HALF = re.compile(rb"\\u[dD][89a-fA-F]"), re.compile("[\ud800-\udfff]")


def _half(value: Any) -> str | None:
    """The first half of a surrogate pair in a value, as an escape. JSON may hold one; no tokeniser takes it, and no file of text."""
    found = _HALF.search(json.dumps(value, ensure_ascii=False, default=str, skipkeys=True))
    return f"\\u{ord(found[0]):x}" if found else None


# --- TFRecord: length (uint64), its checksum, data, its checksum; the data is a tf.train.Example

_HEAD = struct.Struct("<QI")
_TAIL = 4


def _checksum(data: bytes) -> int:
    """CRC-32C, masked as the format has it (a checksum over data that holds checksums would be weak)."""
    crc: int = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


class _Records(_Spans):
    """Records are counted from 0, as rows are."""

    def __init__(self, path: Path, columns: Collection[str] | None) -> None:
        self._columns = columns
        super().__init__(path)

    def _find(self) -> NDArray[numpy.int64]:
        data, size, at, bounds = self._data, len(self._data), 0, array("q", [0])
        while at < size:
            head = data[at : at + _HEAD.size]
            if len(head) == _HEAD.size:
                length, checksum = _HEAD.unpack(head)
                if _checksum(head[:8]) != checksum:
                    raise self._broken(len(bounds) - 1, at, "the checksum of its length is wrong")
            if len(head) < _HEAD.size or at + _HEAD.size + length + _TAIL > size:
                raise self._broken(len(bounds) - 1, at, f"the file ends inside it, at byte {size}")
            at += _HEAD.size + length + _TAIL
            bounds.append(at)
        return numpy.array(bounds, numpy.int64)

    def _parse(self, span: bytes, index: int) -> Row:
        data = span[_HEAD.size : -_TAIL]
        if _checksum(data) != int.from_bytes(span[-_TAIL:], "little"):
            raise self._broken(index, int(self._bounds[index]), "the checksum of its data is wrong")
        message, errors = _example_message()
        try:
            features = message.FromString(data).features.feature
            # A message's own order differs from process to process.
            names = sorted(features) if self._columns is None else [name for name in self._columns if name in features]
            return {name: _feature_value(name, features[name]) for name in names}
        except errors as error:
            raise self._broken(index, int(self._bounds[index]), f"it is no tf.train.Example ({error})") from error

    def _broken(self, index: int, at: int, reason: str) -> UserError:
        return UserError(f"{self._path}, record {index} at byte {at}: {reason}; fetch or write the file again")


def _feature_value(name: str, feature: Any) -> Any:
    kind = feature.WhichOneof("kind")
    if kind == "bytes_list":
        values = [str(value, "utf-8") for value in feature.bytes_list.value]
    else:
        values = list(getattr(feature, kind).value) if kind else []
    return values[0] if name in _SCALARS and len(values) == 1 else values


@cache
def _example_message() -> tuple[Any, tuple[type[Exception], ...]]:
    """The class of tf.train.Example, and what it raises for bytes that are none. TensorFlow itself is not needed for it."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory

    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="tf", syntax="proto3")

    def define(parent: Any, name: str, **fields: tuple[int, int | str, bool]) -> Any:
        """`fields`: number, type or name of a message, whether it is repeated."""
        made = parent.add(name=name)
        for key, (number, kind, repeated) in fields.items():
            label = field.LABEL_REPEATED if repeated else field.LABEL_OPTIONAL
            if isinstance(kind, str):
                made.field.add(name=key, number=number, label=label, type=field.TYPE_MESSAGE, type_name=f".tf.{kind}")
            else:
                made.field.add(name=key, number=number, label=label, type=kind)
        return made

    messages = file.message_type
    define(messages, "BytesList", value=(1, field.TYPE_BYTES, True))
    define(messages, "FloatList", value=(1, field.TYPE_FLOAT, True))
    define(messages, "Int64List", value=(1, field.TYPE_INT64, True))
    lists = {"bytes_list": (1, "BytesList", False), "float_list": (2, "FloatList", False), "int64_list": (3, "Int64List", False)}
    feature = define(messages, "Feature", **lists)
    feature.oneof_decl.add(name="kind")
    for each in feature.field:
        each.oneof_index = 0
    features = define(messages, "Features", feature=(1, "Features.FeatureEntry", True))
    entry = define(features.nested_type, "FeatureEntry", key=(1, field.TYPE_STRING, False), value=(2, "Feature", False))
    entry.options.map_entry = True
    define(messages, "Example", features=(1, "Features", False))
    pool = descriptor_pool.DescriptorPool()  # its own, so that TensorFlow may be loaded beside it
    pool.Add(file)
    made = message_factory.GetMessageClass(pool.FindMessageTypeByName("tf.Example"))
    return made, (message.DecodeError, UnicodeDecodeError)


# --- Arrow: csv and parquet


class _Tables(_Rows):
    """Rows in Arrow tables that follow one another."""

    _path: Path
    _bounds: list[int]
    """The number of the first row of each table, and behind them the number of rows."""

    @abstractmethod
    def _table(self, number: int) -> Any: ...

    def __len__(self) -> int:
        return self._bounds[-1]

    def _row(self, index: int) -> Row:
        number = bisect_right(self._bounds, index) - 1
        table, at = self._table(number), index - self._bounds[number]
        try:
            return {name: column[at].as_py() for name, column in zip(table.column_names, table.columns, strict=True)}
        except ValueError as error:  # text that is not UTF-8, a date out of range
            raise UserError(f"{self._path}, row {index}: {_one_line(error)}; write the file again") from error

    def __iter__(self) -> Iterator[Row]:
        for number, first in enumerate(self._bounds[:-1]):
            table = self._table(number)
            for at in range(0, table.num_rows, _BATCH):
                try:
                    rows = table.slice(at, _BATCH).to_pylist()
                except ValueError:  # by way of _row, which names the row
                    rows = [self._row(first + each) for each in range(at, min(at + _BATCH, table.num_rows))]
                yield from rows


class _Csv(_Tables):
    """Columns get the types that their values show (a label `1` is a number)."""

    def __init__(self, path: Path) -> None:
        import pyarrow
        import pyarrow.csv

        self._path = path
        content = _content(path)
        try:
            options = pyarrow.csv.ParseOptions(newlines_in_values=True)
            self._only = _with_lists(pyarrow.csv.read_csv(pyarrow.BufferReader(content), parse_options=options), path)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{path} cannot be read ({_one_line(error)}); mend it or fetch it again") from error
        self._bounds = [0, self._only.num_rows]

    def __reduce__(self) -> Any:
        return _Csv, (self._path,)

    def _table(self, number: int) -> Any:
        return self._only


def _with_lists(table: Any, path: Path) -> Any:
    """The table, its columns of lists and mappings read as such: csv has them as text, in JSON or as Python writes them."""
    import pyarrow

    for number, name in enumerate(table.column_names):
        values = table.column(number).to_pylist()
        if not values or not all(isinstance(value, str) and value.lstrip().startswith(("[", "{")) for value in values):
            continue
        try:
            parsed = [_parsed(value) for value in values]
        except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
            if all(value.rstrip().endswith(("]", "}")) for value in values):
                raise UserError(
                    f"{path}: the column {name!r} looks like lists or mappings, but is neither JSON nor Python's ({_one_line(error)}); "
                    "write the rows as JSON lines"
                ) from error
            continue  # texts that happen to begin so
        table = table.set_column(number, name, pyarrow.array(parsed))
    return table


def _parsed(text: str) -> Any:
    try:
        value = json.loads(text)
    except ValueError:
        value = ast.literal_eval(text)
    if _ESCAPED.search(text.encode()) and (half := _half(value)):
        raise ValueError(f"half of a surrogate pair ({half}), which is no character")
    return value


class _Parquet(_Tables):
    """Row groups are decoded when a row of theirs is asked for, and kept while there is room (see `_KEPT_BYTES`)."""

    def __init__(self, path: Path, columns: Collection[str] | None) -> None:
        import pyarrow.parquet

        self._path, self._columns = path, columns
        with self._decoding("its footer"), pyarrow.parquet.ParquetFile(path, memory_map=True) as file:
            self._metadata = file.metadata
            self.names = tuple(name for name in file.schema_arrow.names if columns is None or name in columns)
        sizes = (self._metadata.row_group(number).num_rows for number in range(self._metadata.num_row_groups))
        self._bounds = list(itertools.accumulate(sizes, initial=0))
        with _reading(path):
            status = path.stat()
        self._key = (path, status.st_size, status.st_mtime_ns, self.names)

    def __reduce__(self) -> Any:
        return _Parquet, (self._path, self._columns)

    def _table(self, number: int) -> Any:
        return _keep((*self._key, number), lambda: self._decode(number))

    def _decode(self, number: int) -> Any:
        import pyarrow.parquet

        # Opened anew each time, by the footer that is known: threads can then read at once, and no file stays open.
        with (
            self._decoding(f"row group {number}, rows {self._bounds[number]} to {self._bounds[number + 1] - 1}"),
            pyarrow.parquet.ParquetFile(self._path, metadata=self._metadata, memory_map=True, page_checksum_verification=True) as file,
        ):
            return file.read_row_group(number, columns=list(self.names))

    @contextlib.contextmanager
    def _decoding(self, what: str) -> Iterator[None]:
        import pyarrow

        try:
            yield
        except (pyarrow.ArrowException, OSError) as error:
            with _reading(self._path), _open(self._path):  # a file that is not there or a pointer has its own message
                pass
            raise UserError(f"{self._path}: {what} cannot be read ({_one_line(error)}); fetch the file again") from error


_kept: OrderedDict[Any, tuple[Any, int]] = OrderedDict()
_kept_lock = threading.Lock()


def _keep(key: Any, decode: Callable[[], Any]) -> Any:
    """The decoded table of `key`, kept until others that were used later fill the room."""
    with _kept_lock:
        if key in _kept:
            _kept.move_to_end(key)
            return _kept[key][0]
    table = decode()
    with _kept_lock:
        _kept[key] = table, table.nbytes
        _kept.move_to_end(key)
        while len(_kept) > 1 and sum(size for _, size in _kept.values()) > _KEPT_BYTES:
            _kept.popitem(last=False)
    return table


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
