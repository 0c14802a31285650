"""Where the tensors of a `.bin` file lie: parity with torch in both layouts, and strangers' files, none of which runs or gets far."""

import io
import math
import os
import pickle
import random
import subprocess
import sys
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtllama.errors import UserError
from mtllama.weights.shards import DTYPES
from mtllama.weights.torch_bin import MOST_BYTES, Stored, layout

both_layouts = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "pre-zip"])
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def save(path: Path, tensors: Any, zipped: bool) -> None:
    torch.save(tensors, path, _use_new_zipfile_serialization=zipped)


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Random bits as a tensor: every NaN and infinity may come up."""
    generator = torch.Generator().manual_seed(seed)
    count = math.prod(shape) * dtype.itemsize
    data = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), dtype=torch.uint8, generator=generator)
    return data.view(dtype).reshape(shape)


def read(path: Path, stored: Stored) -> torch.Tensor:
    """A tensor from its bytes in the file, and no others."""
    if 0 in stored.shape:
        return torch.empty(stored.shape, dtype=stored.dtype)
    span = 1 + sum((length - 1) * step for length, step in zip(stored.shape, stored.stride, strict=True))
    with open(path, "rb") as file:
        data = os.pread(file.fileno(), span * stored.dtype.itemsize, stored.offset)
    return torch.frombuffer(bytearray(data), dtype=stored.dtype).as_strided(stored.shape, stored.stride)


def bits(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor, row by row (NaN equals itself here)."""
    return bytes(tensor.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8).tolist())


def assert_same(path: Path, ours: dict[str, Stored], theirs: dict[str, torch.Tensor]) -> None:
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        assert (ours[name].dtype, ours[name].shape, ours[name].stride) == (tensor.dtype, tensor.shape, tensor.stride()), name
        assert 0 <= ours[name].offset <= path.stat().st_size
        assert bits(read(path, ours[name])) == bits(tensor), name


# Parity


@st.composite
def views(draw: st.DrawFn, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """A tensor of random bits, or some view of one."""
    tensor = random_tensor(dtype, tuple(draw(st.lists(st.integers(0, 4), max_size=3))), seed)
    for step in draw(st.lists(st.sampled_from(["turn", "slice", "skip", "pick", "expand"]), max_size=3)):
        if step == "turn":
            tensor = tensor.permute(tuple(reversed(range(tensor.dim()))))
        elif step == "expand":
            tensor = tensor.unsqueeze(0).expand(draw(st.integers(1, 3)), *tensor.shape)
        elif tensor.dim() and tensor.shape[0]:
            first = draw(st.integers(0, tensor.shape[0] - 1))
            tensor = {"slice": tensor[first:], "skip": tensor[first::2], "pick": tensor[first]}[step]
    return tensor


@st.composite
def checkpoints(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    """Names, and tensors of which some are views of the one before; as a dict or a state dict, parameters among them."""
    names = draw(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), unique=True, max_size=5))
    tensors: dict[str, torch.Tensor] = OrderedDict() if draw(st.booleans()) else {}
    last = None
    for seed, name in enumerate(names):
        if last is not None and draw(st.booleans()):
            tensors[name] = last.unsqueeze(-1) if draw(st.booleans()) else last
        else:
            last = draw(views(draw(st.sampled_from(list(DTYPES.values()))), seed))
            tensors[name] = torch.nn.Parameter(last, last.dtype.is_floating_point) if draw(st.booleans()) else last
    if isinstance(tensors, OrderedDict):
        tensors._metadata = OrderedDict({"": {"version": 1}, "layer": {"version": 2}})  # type: ignore[attr-defined]
    return tensors


@both_layouts
def test_the_bytes_of_any_tensor_are_where_we_say(tmp_path: Path, zipped: bool) -> None:
    path, seen = tmp_path / "pytorch_model.bin", Counter[str]()

    @settings(max_examples=250, deadline=None)
    @given(checkpoints())
    def check(tensors: dict[str, torch.Tensor]) -> None:
        save(path, tensors, zipped)
        ours = layout(path)
        readable = zipped or not any(tensor.dtype in FLOAT8 for tensor in tensors.values())  # torch cannot read its own float8
        theirs = torch.load(path, weights_only=True) if readable else tensors
        assert_same(path, ours, {name: tensor.detach() for name, tensor in theirs.items()})
        for name, tensor in tensors.items():
            others = [other for other in tensors if other != name and tensors[other].data_ptr() == tensor.data_ptr() != 0]
            assert all(ours[other].offset == ours[name].offset for other in others)
            seen[str(tensor.dtype)] += 1
            seen["empty"] += tensor.numel() == 0
            seen["scalar"] += tensor.shape == ()
            seen["shared"] += len(others)
            seen["strided"] += not tensor.is_contiguous()
            seen["expanded"] += 0 in tensor.stride() and tensor.numel() > 1
            seen["further in"] += tensor.storage_offset() > 0
            seen["parameter"] += isinstance(tensor, torch.nn.Parameter)
        seen["state dict"] += hasattr(tensors, "_metadata")

    check()
    features = {"empty", "scalar", "shared", "strided", "expanded", "further in", "parameter", "state dict"}
    assert all(seen[each] >= 10 for each in features | {str(dtype) for dtype in DTYPES.values()}), seen


@both_layouts
def test_tied_weights_are_two_names_for_one_place(tmp_path: Path, zipped: bool) -> None:
    weight = random_tensor(torch.float16, (6, 4))
    save(tmp_path / "a.bin", {"embed": weight, "head": weight, "rows": weight[2:]}, zipped)
    ours = layout(tmp_path / "a.bin")
    assert ours["embed"] == ours["head"] == Stored(torch.float16, (6, 4), (4, 1), ours["embed"].offset)
    assert ours["rows"].offset == ours["embed"].offset + 2 * 4 * 2


def test_a_storage_whose_size_is_no_multiple_of_its_elements_is_read(tmp_path: Path) -> None:
    tensor = random_tensor(torch.uint8, (10,))[:8].view(torch.float32)
    save(tmp_path / "a.bin", {"w": tensor}, True)
    assert_same(tmp_path / "a.bin", layout(tmp_path / "a.bin"), {"w": tensor})


def test_a_zipped_shard_of_more_than_four_gigabytes_is_laid_out_without_reading_it(tmp_path: Path) -> None:
    path, sizes = tmp_path / "a.bin", {"a": 3 << 30, "b": 5 << 30, "c": 1 << 30}
    with torch.serialization.skip_data():  # the file is a hole, which takes no room on the disk
        save(path, {name: torch.empty(size, dtype=torch.uint8) for name, size in sizes.items()}, True)
    assert path.stat().st_size > sum(sizes.values()) == 9 << 30
    ours = layout(path)
    with open(path, "r+b") as file:
        for name, size in sizes.items():
            os.pwrite(file.fileno(), name.encode(), ours[name].offset)
            os.pwrite(file.fileno(), name.upper().encode(), ours[name].offset + size - 1)
    theirs = torch.load(path, weights_only=True, mmap=True)
    for name, size in sizes.items():
        assert ours[name].shape == theirs[name].shape == (size,)
        assert bytes(theirs[name][[0, -1]].tolist()) == (name + name.upper()).encode()


def test_a_pre_zip_shard_of_more_than_four_gigabytes_is_laid_out_without_reading_it(tmp_path: Path) -> None:
    tensors = {"a": Call(REBUILD, Id("0", torch.HalfStorage, 5 << 30), 7, (2, 3), (3, 1), False, OrderedDict())}
    write_legacy(tmp_path / "a.bin", pickled(tensors, legacy=True), (("0", 5 << 30, b""),))
    start = (tmp_path / "a.bin").stat().st_size
    os.truncate(tmp_path / "a.bin", start + (5 << 31))
    assert layout(tmp_path / "a.bin") == {"a": Stored(torch.float16, (2, 3), (3, 1), start + 14)}


# Strangers' files, made by hand


class Id:
    """What torch says of a storage in a pickle."""

    def __init__(self, key: Any, kind: Any = torch.FloatStorage, count: Any = 4, *more: Any, word: Any = "storage") -> None:
        self.fields, self.more = (word, kind, key, "cpu", count), more


class Call:
    """A pickle's call of a function, not done when the pickle is written."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> Any:
        return self._call


REBUILD = torch._utils._rebuild_tensor_v2


def tensor(key: Any = "0", offset: Any = 0, shape: Any = (2, 2), stride: Any = (2, 1), *more: Any, storage: Any = None) -> Call:
    return Call(REBUILD, storage or Id(key), offset, shape, stride, False, OrderedDict(), *more)


def pickled(content: Any, legacy: bool = False, protocol: int = 2) -> bytes:
    class Pickler(pickle.Pickler):
        def persistent_id(self, each: Any) -> Any:
            if isinstance(each, Id):
                return each.fields + (each.more or ((None,) if legacy else ()))
            return None

    buffer = io.BytesIO()
    Pickler(buffer, protocol).dump(content)
    return buffer.getvalue()


DATA = bytes(range(16))


def write_zip(path: Path, data: bytes, storages: dict[str, bytes] | None = None, how: int = zipfile.ZIP_STORED, **more: bytes) -> None:
    """A zipped checkpoint, as torch writes it unless told otherwise."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", data)
        for name, content in ({"byteorder": b"little", "version": b"3\n"} | more).items():
            archive.writestr(f"m/{name}", content)
        for key, content in ({"0": DATA} if storages is None else storages).items():
            archive.writestr(f"m/data/{key}", content, how)


MAGIC, SYSTEM = 0x1950A86A20F9469CFC6C, {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}


def write_legacy(path: Path, data: bytes, storages: tuple[tuple[Any, int, bytes], ...] = (("0", 4, DATA),), **changed: Any) -> None:
    """A pre-zip checkpoint, as torch writes it unless told otherwise: its storages are key, number of elements and data."""
    head = {"magic": MAGIC, "protocol": 1001, "system": SYSTEM} | changed
    keys = [key for key, _, _ in storages]
    before, after = (b"".join(pickle.dumps(each, 2) for each in part) for part in (head.values(), [keys]))
    path.write_bytes(before + data + after + b"".join(count.to_bytes(8, "little", signed=True) + raw for _, count, raw in storages))


def write(path: Path, content: Any, zipped: bool) -> None:
    data = content if isinstance(content, bytes) else pickled(content, not zipped)
    if zipped:
        write_zip(path, data)
    else:
        write_legacy(path, data, (("0", 4, DATA),) if b"cpu" in data else ())  # a file lists the storages that it names


def refusal(path: Path) -> str:
    """How a file is refused: in one clear line that names it."""
    with pytest.raises(UserError) as caught:
        layout(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and message.isprintable() and len(message) < len(str(path)) + 320
    return message.removeprefix(str(path))


@both_layouts
def test_a_file_made_by_hand_is_read_as_torch_reads_it(tmp_path: Path, zipped: bool) -> None:
    write(tmp_path / "a.bin", {"w": tensor(), "v": tensor("0", 1, (2,), (2,))}, zipped)
    assert_same(tmp_path / "a.bin", layout(tmp_path / "a.bin"), torch.load(tmp_path / "a.bin", weights_only=True))


def dict_with(key: Any, value: Any) -> bytes:
    """A pickle of a map with any key, which Python could not hold."""
    return b"\x80\x02}" + pickled(key)[2:-1] + pickled(value)[2:-1] + b"s."


def tower(height: int) -> bytes:
    """Instructions for a tuple of a tuple of a tuple."""
    return b")" + b"\x85" * height


def bush(height: int) -> bytes:
    """Instructions for pairs of the same pair: 2 ** height leaves in a few bytes."""
    return b")" + b"q\x00h\x00\x86" * height


def instructions(body: bytes) -> bytes:
    return b"\x80\x02" + body + b"."


HUGE = 1 << 63
CONTENTS: dict[str, tuple[Any, str]] = {
    # what the map is not
    "a tensor alone": (tensor(), "where names should be mapped"),
    "a list of tensors": ([tensor()], "holds a list"),
    "a number": (3, "holds a int"),
    "nothing": (None, "holds a NoneType"),
    "a map in the map": ({"model": {"w": tensor()}}, "model is not a tensor"),
    "a number in the map": ({"w": tensor(), "epoch": 3}, "epoch is not a tensor"),
    "a storage in the map": ({"w": Id("0")}, "w is not a tensor"),
    "a dtype in the map": (instructions(b"}X\x01\x00\x00\x00wctorch\nfloat8_e5m2\ns"), "w is not a tensor"),
    "a function in the map": (instructions(b"}X\x01\x00\x00\x00wctorch._utils\n_rebuild_parameter\ns"), "w is not a tensor"),
    "a number as name": ({3: tensor()}, "something else than names"),
    "bytes as name": (instructions(b"}U\x01wK\x01s"), "instruction b'U'"),
    "a name twice": (instructions(b"}(X\x01\x00\x00\x00wNX\x01\x00\x00\x00wNu"), "w twice"),
    "a name without value": (instructions(b"}(X\x01\x00\x00\x00wu"), "damaged"),
    "a name that is no text": ({"\ud800": tensor()}, "UnicodeEncodeError"),
    "items of a list": (instructions(b"](X\x01\x00\x00\x00wNu"), "something else than names"),
    "a map in itself": (instructions(b"}q\x00X\x01\x00\x00\x00wh\x00s"), "w is not a tensor"),
    # what would be run
    "open": ({"w": Call(open, "touched", "w")}, "names io.open"),
    "system": ({"w": Call(os.system, "touch touched")}, "names posix.system"),
    "eval": ({"w": Call(eval, "1")}, "names __builtin__.eval"),
    "getattr": ({"w": Call(getattr, "a", "b")}, "names __builtin__.getattr"),
    "torch.load": ({"w": Call(torch.load, "touched")}, "names torch.serialization.load"),
    "a pickle in the pickle": ({"w": Call(torch.storage._load_from_bytes, pickled(3))}, "names torch.storage._load_from_bytes"),
    "a sparse tensor": ({"w": torch.eye(2).to_sparse()}, "names torch._utils._rebuild_sparse_tensor"),
    "a module": ({"w": torch.nn.Linear(1, 1)}, "names torch.nn.modules.linear.Linear"),
    "a class's method": (instructions(b"ccollections\nOrderedDict.fromkeys\n(tR"), "names collections.OrderedDict.fromkeys"),
    "a name with an escape": (instructions(b"cos\x1b[2J\nx\r\n"), r"names os\x1b[2J.x\r,"),
    "a long name": (instructions(b"c" + b"o" * 5000 + b"\nx\n"), "ooooo, which"),
    "a map with arguments": ({"w": Call(OrderedDict, [("a", 1)])}, "TypeError"),
    "a call of a number": (instructions(b"K\x01)R"), "TypeError"),
    "a call of a storage type": (instructions(b"ctorch\nFloatStorage\nK\x01\x85R"), "TypeError"),
    "a wrong number of arguments": (instructions(b"ctorch._utils\n_rebuild_tensor\n)R"), "TypeError"),
    "NEWOBJ": (instructions(b"ctorch\nFloatStorage\n)\x81"), r"instruction b'\x81'"),
    "INST": (instructions(b"(iposix\nsystem\n"), "instruction b'i'"),
    "OBJ": (instructions(b"(cposix\nsystem\no"), "names posix.system"),
    "STACK_GLOBAL": (instructions(b"X\x05\x00\x00\x00posixX\x06\x00\x00\x00system\x93"), r"instruction b'\x93'"),
    "EXT1": (instructions(b"\x82\x01"), r"instruction b'\x82'"),
    "PERSID": (instructions(b"Pstorage\n"), "instruction b'P'"),
    "protocol 4": (pickled({"w": tensor()}, protocol=4), r"instruction b'\x95'"),
    "no pickle": (b"\x00" * 20, r"instruction b'\x00'"),
    "an unfinished pickle": (b"\x80\x02}", ""),
    # storages
    "a word that is not storage": ({"w": tensor(storage=Id("0", word="module"))}, "not a storage"),
    "a number as key": ({"w": tensor(0)}, "not a storage"),
    "a key that is a tensor": ({"w": tensor(tensor())}, "not a storage"),
    "an id that is a word": (instructions(b"X\x01\x00\x00\x000Q"), "not a storage"),
    "a kind that is no type": ({"w": tensor(storage=Id("0", "FloatStorage"))}, "not a storage"),
    "a kind that is not supported": ({"w": tensor(storage=Id("0", torch.ComplexFloatStorage))}, "names torch.ComplexFloatStorage"),
    "a view of a storage": ({"w": tensor(storage=Id("0", torch.FloatStorage, 4, ("1", 0, 4)))}, ""),
    "a negative number of elements": ({"w": tensor(storage=Id("0", torch.FloatStorage, -4))}, "not a storage"),
    "a number of elements too large": ({"w": tensor(storage=Id("0", torch.FloatStorage, HUGE))}, "not a storage"),
    "no number of elements": ({"w": tensor(storage=Id("0", torch.FloatStorage, True))}, "not a storage"),
    "more elements than data": ({"w": tensor(storage=Id("0", torch.FloatStorage, 5))}, "storage 0"),
    "a storage of two sizes": ({"w": tensor(), "v": tensor(storage=Id("0", torch.FloatStorage, 2))}, "two types or sizes"),
    "a storage of two types": ({"w": tensor(), "v": tensor(storage=Id("0", torch.IntStorage))}, "two types or sizes"),
    "a storage that is nowhere": ({"w": tensor("../0")}, ""),
    "a tensor without storage": ({"w": tensor(storage=(1, 2))}, "w is not a tensor"),
    # sizes
    "an offset outside": ({"w": tensor("0", 1)}, "reaches outside"),
    "a shape outside": ({"w": tensor("0", 0, (3, 2))}, "reaches outside"),
    "a stride outside": ({"w": tensor("0", 0, (2, 2), (3, 1))}, "reaches outside"),
    "a far offset": ({"w": tensor("0", HUGE - 1)}, "reaches outside"),
    "a far stride": ({"w": tensor("0", 0, (2, 2), (HUGE - 1, 1))}, "reaches outside"),
    "a scalar outside": ({"w": tensor("0", 4, (), ())}, "reaches outside"),
    "a negative offset": ({"w": tensor("0", -1)}, "impossible"),
    "a negative stride": ({"w": tensor("0", 3, (2, 2), (-2, 1))}, "impossible"),
    "a negative shape": ({"w": tensor("0", 0, (-2, 2))}, "impossible"),
    "two negative shapes": ({"w": tensor("0", 0, (-2, -2))}, "impossible"),
    "a shape too large": ({"w": tensor("0", 0, (HUGE, 2), (0, 1))}, "impossible"),
    "more elements than can be counted": ({"w": tensor("0", 0, (1 << 40, 1 << 40), (0, 0))}, "impossible"),
    "a number of a thousand bytes": ({"w": tensor("0", 1 << 2000)}, "impossible"),
    "more strides than sizes": ({"w": tensor("0", 0, (2,), (2, 1))}, "impossible"),
    "a shape that is a list": ({"w": tensor("0", 0, [2, 2])}, "impossible"),
    "a shape of truths": ({"w": tensor("0", 0, (True, True))}, "impossible"),
    "a shape of fractions": ({"w": tensor("0", 0, (2.0, 2))}, "instruction b'G'"),
    "a shape of words": ({"w": tensor("0", 0, ("2", "2"))}, "impossible"),
    "a shape that is a word": ({"w": tensor("0", 0, "22")}, "impossible"),
    "no shape": ({"w": tensor("0", 0, None, None)}, "impossible"),
    "a thousand dimensions": ({"w": tensor("0", 0, (1,) * 1000, (1,) * 1000)}, "impossible"),
    "a negated view": ({"w": tensor("0", 0, (2, 2), (2, 1), {"neg": True})}, "negated"),
    # bombs
    "pairs of pairs as name": (instructions(b"}" + bush(60) + b"Ns"), "something else than names"),
    "pairs of pairs as value": (instructions(b"}X\x01\x00\x00\x00w" + bush(60) + b"s"), "w is not a tensor"),
    "pairs of pairs as storage": (instructions(bush(60) + b"Q"), "not a storage"),
    "pairs of pairs as shape": ({"w": tensor("0", 0, ((2, 2), 2))}, "impossible"),
    "a tower as name": (instructions(b"}" + tower(100_000) + b"Ns"), "something else than names"),
    "a tower as value": (instructions(b"}X\x01\x00\x00\x00w" + tower(100_000) + b"s"), "w is not a tensor"),
    "a tower alone": (instructions(tower(100_000)), "holds a tuple"),
    "a tower of calls": (
        instructions(b"ctorch._utils\n_rebuild_parameter\nq\x00N" + b"q\x01h\x00h\x01NN\x87R" * 50_000),
        "holds a NoneType",
    ),
    "a tower of marks": (instructions(b"(" * 100_000 + b"t" * 100_000), "holds a tuple"),
    "a memo far away": (instructions(b"}r\xff\xff\xff\xff0"), "instruction b'0'"),
    "a word longer than the file": (instructions(b"X\xff\xff\xff\xff"), ""),
    "bytes longer than the file": (instructions(b"\x8e" + b"\xff" * 7 + b"\x7f"), r"instruction b'\x8e'"),
    "an array longer than the file": (instructions(b"\x96" + b"\xff" * 4 + b"\x00" * 4), r"instruction b'\x96'"),
    "a frame longer than the file": (instructions(b"\x95" + b"\xff" * 4 + b"\x00" * 4), r"instruction b'\x95'"),
    "a number longer than the file": (instructions(b"\x8b\xff\xff\xff\x7f"), r"instruction b'\x8b'"),
}
"""What stands where a map of names to tensors should, and a part of how it is refused."""


@both_layouts
@pytest.mark.parametrize("name", CONTENTS)
def test_other_contents_than_a_map_of_tensors_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, zipped: bool) -> None:
    monkeypatch.chdir(tmp_path)
    content, expected = CONTENTS[name]
    write(Path("a.bin"), content, zipped)
    assert expected in refusal(Path("a.bin"))
    assert os.listdir() == ["a.bin"], "nothing of the file was run"


@both_layouts
def test_the_code_of_a_pickle_is_not_run_where_pickle_would_run_it(tmp_path: Path, zipped: bool) -> None:
    touched = tmp_path / "touched"
    data = pickled({"w": Call(open, str(touched), "w")})
    pickle.loads(data)["w"].close()
    assert touched.exists(), "the pickle is a working one"
    touched.unlink()
    write(tmp_path / "a.bin", data, zipped)
    assert "names io.open" in refusal(tmp_path / "a.bin")
    assert not touched.exists()


@both_layouts
def test_an_attribute_of_the_map_is_not_set(tmp_path: Path, zipped: bool) -> None:
    write(tmp_path / "a.bin", pickled(GOOD, not zipped)[:-1] + pickled({"items": None, "__class__": None})[2:-1] + b"b.", zipped)
    assert list(layout(tmp_path / "a.bin")) == ["w"]


# Damaged frames around a good pickle

GOOD = {"w": tensor()}


def changed(path: Path, old: bytes, new: bytes, count: int = 1) -> None:
    data = path.read_bytes()
    assert old in data and len(old) == len(new)
    path.write_bytes(data.replace(old, new, count) if count > 0 else new.join(data.rsplit(old, -count)))


def entry_with(at: int, value: int) -> Callable[[Path], None]:
    """A file with another byte in its last entry of the table of contents, which is that of the data."""

    def make(path: Path) -> None:
        write_zip(path, pickled(GOOD))
        data = bytearray(path.read_bytes())
        data[data.rindex(b"PK\x01\x02") + at] = value
        path.write_bytes(data)

    return make


def compressed_data(path: Path) -> None:
    write_zip(path, pickled(GOOD), how=zipfile.ZIP_DEFLATED)


def compressed_pickle(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("m/data.pkl", pickled(GOOD))
        archive.writestr("m/data/0", DATA, zipfile.ZIP_STORED)


def same_name_twice(path: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "w") as archive:
        for content in (pickled(GOOD), pickled({})):
            archive.writestr("m/data.pkl", content)
        archive.writestr("m/data/0", DATA)


def same_name_but_for_its_end(path: Path) -> None:
    write_zip(path, pickled(GOOD), {"0": DATA, "0_x": DATA})
    changed(path, b"m/data/0_x", b"m/data/0\0x", 2)


def without_local_header(path: Path) -> None:
    write_zip(path, pickled(GOOD))
    data = path.read_bytes()
    start = data.index(b"m/data/0") - 30
    path.write_bytes(data[:start] + b"PK\x03\x05" + data[start + 4 :])


def without_pickle(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data/0", DATA)


def pickle_in_another_folder(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/version", b"3")
        archive.writestr("n/data.pkl", pickled(GOOD))
        archive.writestr("n/data/0", DATA)


def another_local_name(path: Path) -> None:
    write_zip(path, pickled(GOOD))
    changed(path, b"m/data/0", b"m/data/1", 1)


def member_longer_than_the_file(path: Path) -> None:
    write_zip(path, pickled({"w": tensor(storage=Id("0", torch.FloatStorage, 4096 + 4))}))
    data = bytearray(path.read_bytes())
    entry = data.rindex(b"PK\x01\x02")
    data[entry + 21] = data[entry + 25] = 0x40
    path.write_bytes(data)


def long_table_of_contents(path: Path) -> None:
    """A table that claims the whole of a large file, which is a hole."""
    write_zip(path, pickled(GOOD))
    end = path.read_bytes()[-22:]
    with open(path, "r+b") as file:
        file.seek(3 << 30)
        file.write(end[:12] + (3 << 30).to_bytes(4, "little") + end[16:])


def large_pickle(path: Path) -> None:
    write_zip(path, instructions(b"]" * MOST_BYTES))


def many_members(path: Path) -> None:
    write_zip(path, pickled(GOOD), {"0": DATA} | {f"{i:0>60000}": b"" for i in range(1 + MOST_BYTES // 60000)})


def large_legacy_pickle(path: Path) -> None:
    write_legacy(path, instructions(b"X" + MOST_BYTES.to_bytes(4, "little") + b"w" * MOST_BYTES))


def long_legacy_line(path: Path) -> None:
    write_legacy(path, instructions(b"c" + b"x" * MOST_BYTES + b"\n\n"))


def legacy(content: Any, *storages: tuple[Any, int, bytes], **head: Any) -> Callable[[Path], None]:
    return lambda path: write_legacy(path, pickled(content, legacy=True), storages or (("0", 4, DATA),), **head)


def write_without_end(path: Path) -> None:
    write_legacy(path, pickled({"w": tensor("0", 0, (0,), (1,), storage=Id("0", torch.FloatStorage, 0))}, legacy=True), (("0", 0, b""),))
    assert layout(path)
    os.truncate(path, path.stat().st_size - 8)


TWO = {"w": tensor(), "v": tensor("1")}
OTHER = {"w": tensor(), "v": tensor(storage=Id("1", torch.FloatStorage, 5))}
LARGE = {"w": tensor(storage=Id("0", torch.FloatStorage, 1 << 40))}
FRAMES: dict[str, tuple[Callable[[Path], None], str]] = {
    "compressed data": (compressed_data, "data/0 is compressed"),
    "a compressed pickle": (compressed_pickle, "data.pkl is compressed"),
    "data by another method of the same size": (entry_with(10, zipfile.ZIP_DEFLATED), "data/0 is compressed"),
    "encrypted data": (entry_with(8, 1), "data/0 is compressed or encrypted"),
    "no local header": (without_local_header, "m/data/0 is not where"),
    "a name twice": (same_name_twice, "the same name"),
    "a name twice but for its end": (same_name_but_for_its_end, "the same name"),
    "no pickle": (without_pickle, "lacks data.pkl"),
    "a pickle in another folder": (pickle_in_another_folder, "lacks data.pkl"),
    "no data": (lambda path: write_zip(path, pickled(GOOD), {}), "lacks data/0"),
    "data that is cut off": (lambda path: write_zip(path, pickled(GOOD), {"0": DATA[:-1]}), "storage 0 is cut off"),
    "big-endian": (lambda path: write_zip(path, pickled(GOOD), byteorder=b"big"), "not little-endian"),
    "another byte order": (lambda path: write_zip(path, pickled(GOOD), byteorder=b"\0" * 100_000), "not little-endian"),
    "an id of another layout": (lambda path: write_zip(path, pickled(GOOD, legacy=True)), "not a storage"),
    "another local name": (another_local_name, "m/data/0 is not where"),
    "a member elsewhere": (entry_with(42, 1), "m/data/0 is not where"),
    "a member far away": (entry_with(45, 0x70), "damaged"),
    "a member longer than the file": (member_longer_than_the_file, "storage 0 is cut off"),
    "a table of contents as long as the file": (long_table_of_contents, "larger than"),
    "a large pickle": (large_pickle, "larger than"),
    "many members": (many_members, "larger than"),
    "an empty archive": (lambda path: zipfile.ZipFile(path, "w").close(), "lacks data.pkl"),
    "something behind PK": (lambda path: path.write_bytes(b"PK\x03\x04" + bytes(1000)), "damaged"),
    "an empty file": (lambda path: path.write_bytes(b""), "damaged"),
    "a page of text": (lambda path: path.write_bytes(b"version https://git-lfs"), "begins with b'vers'"),
    "a pickle of something else": (lambda path: path.write_bytes(pickled({"w": [1]})), "not torch's"),
    "another magic number": (legacy(GOOD, magic=MAGIC + 1), "not torch's"),
    "pairs of pairs as magic number": (lambda path: path.write_bytes(instructions(bush(60))), "not torch's"),
    "another protocol": (legacy(GOOD, protocol=1002), "not torch's"),
    "pre-zip big-endian": (legacy(GOOD, system=SYSTEM | {"little_endian": False}), "not little-endian"),
    "pre-zip without byte order": (legacy(GOOD, system={}), "not little-endian"),
    "a system that is a list": (legacy(GOOD, system=[]), "not little-endian"),
    "an id of the zipped layout": (lambda path: write_legacy(path, pickled(GOOD)), "not a storage"),
    "a view of a storage": (legacy({"w": tensor(storage=Id("0", torch.FloatStorage, 4, ("1", 0, 4)))}), "storage 0 is a view of another"),
    "no list of storages": (lambda path: write_legacy(path, pickled(GOOD, legacy=True) + pickled({})), "list of storages"),
    "a list without a storage": (legacy(TWO, ("0", 4, DATA)), "list of storages"),
    "a list of further storages": (legacy(GOOD, ("0", 4, DATA), ("1", 4, DATA)), "list of storages"),
    "a list with a storage twice": (legacy(TWO, ("0", 4, DATA), ("0", 4, DATA)), "list of storages"),
    "a list with its storage twice": (legacy(GOOD, ("0", 4, DATA), ("0", 4, DATA)), "list of storages"),
    "a list of numbers": (legacy(GOOD, (0, 4, DATA)), "list of storages"),
    "another size than in the pickle": (legacy(GOOD, ("0", 3, DATA[4:])), "storage 0 has two sizes"),
    "a negative size": (legacy(GOOD, ("0", -4, DATA)), "storage 0 has two sizes"),
    "sizes in another order": (legacy(OTHER, ("0", 5, bytes(20)), ("1", 4, DATA)), "storage 0 has two sizes"),
    "data outside the file": (legacy(LARGE, ("0", 1 << 40, DATA)), "storage 0 is cut off"),
    "pre-zip data that is cut off": (legacy(GOOD, ("0", 4, DATA[:-1])), "storage 0 is cut off"),
    "a second storage without data": (legacy(TWO, ("0", 4, DATA), ("1", 4, b"")), "storage 1 is cut off"),
    "an empty storage without its size": (write_without_end, "storage 0 is cut off"),
    "something behind the data": (legacy(GOOD, ("0", 4, DATA + b"\0")), "goes on"),
    "a large pre-zip pickle": (large_legacy_pickle, "larger than"),
    "a long pre-zip line": (long_legacy_line, "larger than"),
}
"""How a file is made, and a part of how it is refused."""


@pytest.mark.parametrize("name", FRAMES)
def test_damaged_frames_are_refused(tmp_path: Path, name: str) -> None:
    make, expected = FRAMES[name]
    make(tmp_path / "a.bin")
    assert expected in refusal(tmp_path / "a.bin")


def test_a_path_without_a_file_is_named(tmp_path: Path) -> None:
    assert "cannot be read (No such file" in refusal(tmp_path / "a.bin")
    assert "cannot be read (Is a directory" in refusal(tmp_path)


# Damage by chance


def small(path: Path, zipped: bool) -> bytes:
    """A small file of torch's own, with all that a checkpoint may have."""
    weight = random_tensor(torch.float16, (2, 3))
    tensors = OrderedDict({"w": weight.T, "v": torch.nn.Parameter(weight), "b": torch.arange(3), "e": torch.zeros(0, 2)})
    tensors._metadata = OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]
    save(path, tensors, zipped)
    assert len(layout(path)) == 4
    return path.read_bytes()


def outcome(path: Path) -> str:
    """How a damaged file fares: refused, or taken for one whose tensors all lie in it."""
    try:
        ours = layout(path)
    except UserError as error:
        message = str(error)
        assert message.startswith(str(path)) and message.isprintable(), message
        return "damaged" if "damaged" in message else "refused"
    for stored in ours.values():
        last = sum((length - 1) * step for length, step in zip(stored.shape, stored.stride, strict=True))
        end = stored.offset if 0 in stored.shape else stored.offset + (last + 1) * stored.dtype.itemsize
        assert 0 <= stored.offset <= end <= path.stat().st_size
    return "taken"


@both_layouts
def test_a_file_cut_off_anywhere_is_refused(tmp_path: Path, zipped: bool) -> None:
    data, path = small(tmp_path / "a.bin", zipped), tmp_path / "b.bin"
    assert len(data) > 500
    for length in range(len(data)):
        path.write_bytes(data[:length])
        assert outcome(path) != "taken", length


@both_layouts
def test_bytes_that_flip_lead_to_nothing_but_a_refusal_or_tensors_in_the_file(tmp_path: Path, zipped: bool) -> None:
    data, path, seen, chance = small(tmp_path / "a.bin", zipped), tmp_path / "b.bin", Counter[str](), random.Random(0)
    for _ in range(2000):
        damaged = bytearray(data)
        for _ in range(chance.choice((1, 1, 1, 5))):
            damaged[chance.randrange(len(data))] = chance.choice((0, 1, 0x7F, 0xFF, chance.randrange(256)))
        path.write_bytes(damaged)
        seen[outcome(path)] += 1
    assert all(seen[each] > 50 for each in ("damaged", "refused", "taken")), seen


@both_layouts
def test_bytes_that_flip_in_a_pickle_lead_to_nothing_but_a_refusal_or_tensors_in_the_file(tmp_path: Path, zipped: bool) -> None:
    data, path, seen, chance = (
        pickled({"w": tensor(), "v": tensor("0", 1, (2,), (2,))}, not zipped),
        tmp_path / "b.bin",
        Counter[str](),
        random.Random(0),
    )
    for _ in range(2000):
        damaged = bytearray(data)
        for _ in range(chance.choice((1, 1, 1, 5))):
            damaged[chance.randrange(len(data))] = chance.randrange(256)
        write(path, bytes(damaged), zipped)
        seen[outcome(path)] += 1
    assert all(seen[each] > 50 for each in ("damaged", "refused", "taken")), seen


PIECES = [bytes([code]) for code in b")]}(Nt\x85\x86\x87\x88\x89aeusbRQ0."] + [
    *(b"K\x00", b"K\x02", b"J\xff\xff\xff\xff", b"\x8a\x00", b"\x8a\x09" + b"\xff" * 8 + b"\x00", b"q\x00", b"h\x00", b"q\x01", b"h\x01"),
    *(b"X\x01\x00\x00\x000", b"X\x07\x00\x00\x00storage", b"X\x03\x00\x00\x00cpu", b"r\xff\xff\xff\xff", b"j\xff\xff\xff\xff"),
    *(f"c{name}\n".encode() for name in ("collections\nOrderedDict", "torch\nFloatStorage", "torch.storage\nUntypedStorage")),
    *(f"ctorch._utils\n_rebuild_{name}\n".encode() for name in ("tensor", "tensor_v2", "tensor_v3", "parameter")),
    pickled(tensor())[2:-1],
]
"""Instructions, whole."""


def test_any_program_leads_to_nothing_but_a_refusal_or_tensors_in_the_file(tmp_path: Path) -> None:
    path, seen = tmp_path / "a.bin", Counter[str]()

    @settings(max_examples=1000, deadline=None)
    @given(st.lists(st.sampled_from(PIECES), max_size=40))
    def check(pieces: list[bytes]) -> None:
        write_zip(path, instructions(b"".join(pieces)))
        seen[outcome(path)] += 1

    check()
    assert seen["damaged"] > 50 and seen["refused"] > 50, seen


LIMITED = """
import resource, sys, time
from pathlib import Path
from mtllama.errors import UserError
from mtllama.weights.torch_bin import layout
now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + (640 << 20),) * 2)
resource.setrlimit(resource.RLIMIT_CPU, (120, 120))
for path in map(Path, sys.argv[1:]):
    try:
        print(path.stem, "taken", len(layout(path)))
    except UserError as error:
        print(path.stem, "refused", str(error).count("\\n"), "MemoryError" in str(error))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the limit is set by what this system says of a process")
def test_no_file_takes_much_memory_or_time(tmp_path: Path) -> None:
    some, most = MOST_BYTES // 8, MOST_BYTES - 5000
    word = b"X\x01\x00\x00\x00w"
    programs = {
        "lists": b"]" * some,
        "marks": b"(" * some,
        "tower": b"}" + tower(some) + b"Ns",
        "bush": b"}" + bush(some // 5) + b"Ns",
        "memo": b"}" + b"r\xff\xff\xff\x7f",
        "word": b"X\xff\xff\xff\xff",
        "array": b"\x96" + b"\x00" * 5 + b"\x01\x00\x00",
        "expanded": b"}" + word + pickled(tensor("0", 0, (1 << 31, 1 << 31), (0, 0)))[2:-1] + b"s",
    }
    for name, program in programs.items():
        write_zip(tmp_path / f"{name}.bin", instructions(program))
    write_legacy(tmp_path / "legacy.bin", instructions(b"]" * most))
    long_table_of_contents(tmp_path / "table.bin")
    paths = sorted(tmp_path.iterdir())
    done = subprocess.run([sys.executable, "-c", LIMITED, *paths], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    taken = {"expanded": "taken 1", "memo": "taken 0"}
    assert done.stdout.splitlines() == [f"{path.stem} {taken.get(path.stem, 'refused 0 False')}" for path in paths]
    assert len(paths) == 10
