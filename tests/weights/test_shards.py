"""Checkpoints by tensor name: parity with safetensors' own library, `.bin` of both layouts, and what is refused."""

import errno
import json
import os
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtllama.errors import UserError
from mtllama.weights.shards import (
    BIN_INDEX,
    BIN_SINGLE,
    BLOCK,
    DTYPES,
    INDEX,
    SINGLE,
    CheckpointReader,
    CheckpointWriter,
    SafetensorsWriter,
    TensorInfo,
    raw_bytes,
)

Tensors = dict[str, torch.Tensor]


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Random bits as a tensor: every NaN and infinity may come up."""
    count = torch.Size(shape).numel() * dtype.itemsize
    generator = torch.Generator().manual_seed(seed)
    data = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), dtype=torch.uint8, generator=generator)
    return data.view(dtype).reshape(shape)


def every_kind() -> Tensors:
    """Every dtype as a matrix, a vector of odd length, a scalar and two empty tensors."""
    shapes = {"matrix": (5, 7), "vector": (3,), "scalar": (), "empty": (0,), "flat": (4, 0)}
    return {
        f"{name}.{kind}": random_tensor(dtype, shape, seed)
        for seed, (name, dtype) in enumerate(DTYPES.items())
        for kind, shape in shapes.items()
    }


def infos(tensors: Tensors) -> dict[str, TensorInfo]:
    return {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def write(path: Path, tensors: Tensors) -> None:
    with SafetensorsWriter(path, infos(tensors)) as writer:
        for name, tensor in tensors.items():
            writer.write(raw_bytes(tensor))
            writer.end(name, TensorInfo(tensor.dtype, tuple(tensor.shape)))


def write_checkpoint(folder: Path, tensors: Tensors, max_bytes: int, *, known: bool = True, **options: Any) -> None:
    """Write `tensors` as a checkpoint; `known`: their sizes are told before."""
    with CheckpointWriter(folder, infos(tensors), max_bytes=max_bytes, **options) as writer:
        for name, info in infos(tensors).items():
            writer.begin(info.num_bytes if known else 0)
            writer.write(raw_bytes(tensors[name]))
            writer.end(name, info)


def assert_equal(ours: Tensors, theirs: Tensors) -> None:
    """Same names, dtypes, shapes and bits (NaN equals itself here)."""
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert (ours[name].dtype, ours[name].shape) == (theirs[name].dtype, theirs[name].shape), name
        assert bytes(raw_bytes(ours[name])) == bytes(raw_bytes(theirs[name])), name


def read(folder: Path) -> Tensors:
    reader = CheckpointReader(folder)
    assert len(reader) == len(list(reader))
    for name in reader:
        tensor = reader.tensor(name)
        assert reader.info(name) == TensorInfo(tensor.dtype, tuple(tensor.shape)) and name in reader
    return {name: reader.tensor(name) for name in reader}


def test_a_file_of_ours_is_read_equal_by_safetensors(tmp_path: Path) -> None:
    ours = every_kind()
    assert len(ours) == 5 * len(DTYPES) and {tensor.dtype for tensor in ours.values()} == set(DTYPES.values())
    write(tmp_path / SINGLE, ours)
    theirs = safetensors.torch.load_file(tmp_path / SINGLE)
    assert_equal(ours, theirs)
    with safetensors.safe_open(tmp_path / SINGLE, framework="pt") as handle:
        assert handle.metadata() == {"format": "pt"}


def test_a_file_of_safetensors_is_read_equal_by_us(tmp_path: Path) -> None:
    theirs = every_kind()
    safetensors.torch.save_file(theirs, tmp_path / SINGLE)
    ours = read(tmp_path)
    assert_equal(ours, theirs)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__"),
            st.sampled_from(sorted(DTYPES)),
            st.lists(st.integers(0, 4), max_size=3),
        ),
        unique_by=lambda each: each[0],
        min_size=1,
        max_size=5,
    ),
    st.integers(0, 1000),
    st.integers(1, 200),
)
def test_any_names_and_shapes_come_back_in_any_split(
    tmp_path_factory: pytest.TempPathFactory, kinds: list[tuple[str, str, list[int]]], seed: int, max_bytes: int
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    ours = {name: random_tensor(DTYPES[dtype], tuple(shape), seed) for name, dtype, shape in kinds}
    write_checkpoint(folder, ours, max_bytes)
    files = sorted(folder.glob("*.safetensors"))
    shards = {file.name: safetensors.torch.load_file(file) for file in files}
    for shard in shards.values():
        sizes = [tensor.nbytes for tensor in shard.values() if tensor.nbytes]
        assert len(sizes) <= 1 or sum(sizes) <= max_bytes
    assert (folder / INDEX).is_file() == (len(files) > 1)
    assert sorted(path.name for path in folder.iterdir()) == sorted([*shards, *([INDEX] if len(files) > 1 else [])])
    assert list(CheckpointReader(folder)) == list(ours), "in the order of writing"
    assert_equal(read(folder), ours)
    assert_equal(ours, {name: tensor for shard in shards.values() for name, tensor in shard.items()})


def sharded(folder: Path) -> Tensors:
    """A checkpoint in several files with an index, all of one size of shard."""
    tensors = {f"layer.{i}": random_tensor(torch.float16, (8, 4), i) for i in range(6)}
    write_checkpoint(folder, tensors, 2 * 64)
    return tensors


def test_an_index_gathers_several_shards(tmp_path: Path) -> None:
    tensors = sharded(tmp_path)
    assert len(list(tmp_path.glob("model-*-of-00003.safetensors"))) == 3
    assert_equal(read(tmp_path), tensors)
    index = json.loads((tmp_path / INDEX).read_text(encoding="utf-8"))
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values()) > 0


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "pre-zip"])
@pytest.mark.parametrize("single", [True, False], ids=["single", "indexed"])
def test_bin_shards_of_both_layouts_are_read_equal(tmp_path: Path, zipped: bool, single: bool) -> None:
    theirs = every_kind()
    if not zipped:  # the layout is older than float8: torch cannot read its own back
        theirs = {name: tensor for name, tensor in theirs.items() if not name.startswith("F8")}
    assert len(theirs) >= 50
    theirs["transposed"] = random_tensor(torch.float32, (4, 6)).T  # is not contiguous
    names = list(theirs)
    files = {BIN_SINGLE: names} if single else {"pytorch_model-1.bin": names[::2], "pytorch_model-2.bin": names[1::2]}
    for file, group in files.items():
        torch.save({name: theirs[name] for name in group}, tmp_path / file, _use_new_zipfile_serialization=zipped)
        assert (tmp_path / file).read_bytes()[:2] == b"PK" or not zipped
    if not single:
        weight_map = {name: file for file, group in files.items() for name in group}
        (tmp_path / BIN_INDEX).write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    assert_equal(read(tmp_path), theirs)


class Mine:
    """Runs code when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "pre-zip"])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path: Path, zipped: bool) -> None:
    marker = tmp_path / "marker"
    torch.save({"a": torch.zeros(2), "b": Mine(marker)}, tmp_path / BIN_SINGLE, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=BIN_SINGLE):
        CheckpointReader(tmp_path)
    assert not marker.exists()
    torch.load(tmp_path / BIN_SINGLE, weights_only=False)
    assert marker.is_dir(), "the pickle runs code where it is let"


def test_a_bin_file_that_is_not_a_checkpoint_is_refused(tmp_path: Path) -> None:
    contents = [
        [torch.zeros(2)],
        {"model": {"a": torch.zeros(2)}},
        {"a": torch.zeros(2), "step": 3},
        {"a": torch.zeros(2, dtype=torch.complex64)},
    ]
    for content in contents:
        torch.save(content, tmp_path / BIN_SINGLE)
        with pytest.raises(UserError, match=f"{BIN_SINGLE} is not a plain torch checkpoint"):
            CheckpointReader(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    sharded(tmp_path)
    gone = tmp_path / "model-00002-of-00003.safetensors"
    gone.unlink()
    with pytest.raises(UserError, match=f"{gone.name} is missing"):
        CheckpointReader(tmp_path)


def test_a_tensor_that_its_shard_lacks_is_named(tmp_path: Path) -> None:
    tensors = sharded(tmp_path)
    write(tmp_path / "model-00002-of-00003.safetensors", {"layer.2": tensors["layer.2"]})
    with pytest.raises(UserError, match=r"model-00002-of-00003.safetensors lacks the tensor layer\.3"):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize("name", [SINGLE, BIN_SINGLE])
def test_a_file_cut_off_anywhere_is_named(tmp_path: Path, name: str) -> None:
    tensors = {"a": random_tensor(torch.bfloat16, (16, 4)), "b": random_tensor(torch.float32, (3,))}
    if name == SINGLE:
        write(tmp_path / name, tensors)
    else:
        torch.save(tensors, tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    lengths = [0, 1, 7, 8, 9, len(whole) // 2, len(whole) - 5, len(whole) - 1]
    for length in lengths:
        (tmp_path / name).write_bytes(whole[:length])
        with pytest.raises(UserError, match=name):
            read(tmp_path)


def test_a_bit_flipped_in_the_header_never_changes_a_tensor_of_the_same_name_and_kind(tmp_path: Path) -> None:
    tensors = {f"layer.{i}": random_tensor(torch.float16, (8, 4), i) for i in range(4)}
    write(tmp_path / SINGLE, tensors)
    whole = (tmp_path / SINGLE).read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    places = random.Random(0).sample(range(8 * end), 150)
    refused = renamed = 0
    for place in places:
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << (place % 8)
        (tmp_path / SINGLE).write_bytes(damaged)
        try:
            found = read(tmp_path)
        except UserError as error:
            assert SINGLE in str(error)
            refused += 1
            continue
        for name in found.keys() & tensors.keys():
            if infos(found)[name] == infos(tensors)[name]:
                assert_equal({name: found[name]}, {name: tensors[name]})
        renamed += found.keys() != tensors.keys()
    assert refused > 50 and renamed > 0, (refused, renamed)


@pytest.mark.parametrize("target", ["../outside.safetensors", "sub/inside.safetensors", "/absolute/outside.safetensors"])
def test_an_index_that_points_outside_its_folder_is_refused(tmp_path: Path, target: str) -> None:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    write(tmp_path / "outside.safetensors", {"a": torch.zeros(2)})
    write(folder / "sub" / "inside.safetensors", {"a": torch.zeros(2)})
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": target}}), encoding="utf-8")
    with pytest.raises(UserError, match=f"{INDEX} points outside its folder .*{target}"):
        CheckpointReader(folder)


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": ["model.safetensors"]}', '{"weight_map": {"a": [1]}}']
)
def test_a_broken_index_is_named(tmp_path: Path, content: str) -> None:
    write(tmp_path / SINGLE, {"a": torch.zeros(2)})
    assert len(CheckpointReader(tmp_path)) == 1
    (tmp_path / INDEX).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=rf"{INDEX}|is missing|/\[1\] cannot be read"):
        CheckpointReader(tmp_path)


def test_a_folder_without_weights_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{tmp_path} holds no weights"):
        CheckpointReader(tmp_path)
    with pytest.raises(UserError, match="nowhere does not exist"):
        CheckpointReader(tmp_path / "nowhere")


def test_a_dtype_that_we_do_not_know_is_named(tmp_path: Path) -> None:
    safetensors.torch.save_file({"wide": torch.zeros(3, dtype=torch.uint64)}, tmp_path / SINGLE)
    with pytest.raises(UserError, match="tensor wide has the dtype U64"):
        CheckpointReader(tmp_path)


def test_the_writer_refuses_bytes_that_are_not_the_tensor_and_more_than_was_announced(tmp_path: Path) -> None:
    one = TensorInfo(torch.float32, (2,))

    def short(writer: SafetensorsWriter) -> None:
        writer.write(bytes(7))
        writer.end("one", one)

    def long(writer: SafetensorsWriter) -> None:
        writer.write(bytes(8))
        writer.write(bytes(1))
        writer.end("one", one)

    for act in (short, long):
        with pytest.raises(AssertionError, match="the bytes of one are not"), SafetensorsWriter(tmp_path / SINGLE, {"one": one}) as writer:
            act(writer)
    with pytest.raises(AssertionError, match="outgrown its room"), SafetensorsWriter(tmp_path / SINGLE, {"one": one}) as writer:
        for name in ("one", "another, of whose name nothing was known"):
            writer.write(bytes(8))
            writer.end(name, one)
    write(tmp_path / SINGLE, {"one": torch.ones(2)})
    assert_equal(read(tmp_path), {"one": torch.ones(2)})


def test_fewer_and_smaller_tensors_than_announced_make_a_file_that_safetensors_reads(tmp_path: Path) -> None:
    bounds = {f"layer.{number}": TensorInfo(torch.uint8, (10**13,)) for number in range(20)}
    tensors = {name: random_tensor(torch.uint8, (number,), number) for number, name in enumerate(bounds) if number % 3}
    with CheckpointWriter(tmp_path, bounds, {"format": "other"}) as writer:
        for name, tensor in tensors.items():
            writer.begin()
            for byte in tensor.numpy():  # in any pieces
                writer.write(bytes([byte]))
            writer.end(name, TensorInfo(torch.uint8, tuple(tensor.shape)))
    assert_equal(safetensors.torch.load_file(tmp_path / SINGLE), tensors)
    assert_equal(read(tmp_path), tensors)
    with safetensors.safe_open(tmp_path / SINGLE, framework="pt") as handle:
        assert handle.metadata() == {"format": "other"}
    assert (tmp_path / SINGLE).stat().st_size % 8 == sum(tensor.nbytes for tensor in tensors.values()) % 8, "data begins at a whole word"


def test_shards_whose_sizes_are_known_only_afterwards_end_with_the_tensor_that_fills_them(tmp_path: Path) -> None:
    tensors = {f"layer.{number}": random_tensor(torch.uint8, (60,), number) for number in range(5)}
    write_checkpoint(tmp_path, tensors, 100, known=False)
    assert [len(safetensors.torch.load_file(file)) for file in sorted(tmp_path.glob("*.safetensors"))] == [2, 2, 1]
    assert_equal(read(tmp_path), tensors)


def test_no_tensors_make_no_file(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {}, 100)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("direct", [True, False], ids=["past the page cache", "through it"])
@pytest.mark.parametrize("size", [0, 1, 4096, BLOCK - 100, BLOCK, 2 * BLOCK + 777])
def test_tensors_of_any_size_are_written_whether_or_not_the_disk_takes_direct_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direct: bool, size: int
) -> None:
    asked: list[bool] = []
    turn = SafetensorsWriter._direct

    def watched(self: SafetensorsWriter, on: bool) -> None:
        asked.append(on)
        if direct or not on:
            turn(self, on)

    monkeypatch.setattr(SafetensorsWriter, "_direct", watched)
    tensors = {"a": random_tensor(torch.uint8, (size,)), "b": random_tensor(torch.float16, (3,))}
    write(tmp_path / SINGLE, tensors)
    assert True in asked
    assert_equal(safetensors.torch.load_file(tmp_path / SINGLE), tensors)


def test_a_file_system_that_refuses_direct_output_is_written_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused: list[int] = []

    class Picky:
        """A file that takes no direct output, as some systems say only when it is tried."""

        def __init__(self, file: Any) -> None:
            self._file = file

        def write(self, view: memoryview) -> int:
            if len(view) == BLOCK and not refused:
                refused.append(len(view))
                raise OSError(errno.EINVAL, "Invalid argument")
            return int(self._file.write(view[:10_000_000]))

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

    tensors = {"a": random_tensor(torch.uint8, (2 * BLOCK + 5,))}
    with SafetensorsWriter(tmp_path / SINGLE, infos(tensors)) as writer:
        monkeypatch.setattr(writer, "_file", Picky(writer._file))
        writer.write(raw_bytes(tensors["a"]))
        writer.end("a", infos(tensors)["a"])
    assert refused == [BLOCK]
    assert_equal(safetensors.torch.load_file(tmp_path / SINGLE), tensors)


def test_an_error_between_two_tensors_closes_the_file_and_is_passed_on(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ZeroDivisionError), CheckpointWriter(tmp_path, infos({"a": torch.ones(2)})) as writer:
        writer.begin(8)
        raise ZeroDivisionError
    assert len(os.listdir("/proc/self/fd")) == before
    assert not (tmp_path / SINGLE).exists()


@pytest.mark.parametrize("kind", ["safetensors", "zip", "pre-zip"])
def test_any_slice_of_a_tensor_is_that_part_of_it_laid_flat(tmp_path: Path, kind: str) -> None:
    tensors = {"matrix": random_tensor(torch.bfloat16, (7, 9)), "scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3)}
    if kind == "safetensors":
        write(tmp_path / SINGLE, tensors)
    else:
        tensors["turned"] = random_tensor(torch.float32, (5, 4, 3)).permute(2, 0, 1)
        tensors["repeated"] = random_tensor(torch.float32, (5, 1)).expand(5, 6)
        torch.save(tensors, tmp_path / BIN_SINGLE, _use_new_zipfile_serialization=kind == "zip")
    reader, draw = CheckpointReader(tmp_path), random.Random(0)
    assert set(reader) == set(tensors)
    for _ in range(40):
        for name, tensor in tensors.items():
            start = draw.randint(0, tensor.numel())
            stop = draw.randint(start, tensor.numel())
            assert_equal({name: reader.read(name, start, stop)}, {name: tensor.reshape(-1)[start:stop].clone()})
            assert reader.file(name).parent == tmp_path


def test_slices_may_be_read_in_threads_of_contiguous_and_turned_tensors(tmp_path: Path) -> None:
    tensors = {f"layer.{number}": random_tensor(torch.float32, (60, 50), number).T for number in range(4)}
    tensors["plain"] = random_tensor(torch.float32, (60, 50))
    torch.save(tensors, tmp_path / BIN_SINGLE)
    reader = CheckpointReader(tmp_path)
    asked = [(name, start) for start in range(0, 3000, 100) for name in tensors]
    with ThreadPoolExecutor(8) as pool:
        for (name, start), found in zip(asked, pool.map(lambda each: reader.read(each[0], each[1], each[1] + 100), asked), strict=True):
            assert_equal({name: found}, {name: tensors[name].reshape(-1)[start : start + 100].clone()})


@pytest.mark.parametrize("name", [SINGLE, BIN_SINGLE])
def test_a_file_that_is_cut_off_while_it_is_read_is_named(tmp_path: Path, name: str) -> None:
    tensors = {"a": torch.zeros(1000), "b": torch.ones(1000)}
    if name == SINGLE:
        write(tmp_path / name, tensors)
    else:
        torch.save(tensors, tmp_path / name)
    reader = CheckpointReader(tmp_path)
    assert reader.tensor("b").sum() == 1000
    os.truncate(tmp_path / name, 4000)
    with pytest.raises(UserError, match=f"{name} was cut off while it was read"):
        reader.tensor("b")


def test_a_tensor_said_to_be_larger_than_its_file_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1).expand(1 << 40)}, tmp_path / BIN_SINGLE)
    assert (tmp_path / BIN_SINGLE).stat().st_size < 10_000
    with pytest.raises(UserError, match="tensor a is larger than its file; refused"):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize("tensor", [torch.arange(12.0)[::2][:1], torch.zeros(3, 0), torch.arange(6).view(2, 3).t(), torch.tensor(2.5)])
def test_raw_bytes_are_those_of_the_values_in_order_whatever_the_strides(tensor: torch.Tensor) -> None:
    assert bytes(raw_bytes(tensor)) == tensor.numpy().tobytes()
