"""The lossless difference of two tensors: exact for every bit pattern, small for small changes, loud when damaged."""

import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtllama.errors import UserError
from mtllama.weights import codec, kernels, rans
from mtllama.weights.shards import DTYPES, raw_bytes

DTYPE_LIST = list(DTYPES.values())


def from_patterns(patterns: list[int], dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    data = b"".join(pattern.to_bytes(dtype.itemsize, "little") for pattern in patterns)
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape) if data else torch.empty(shape, dtype=dtype)


def special_patterns(dtype: torch.dtype) -> list[int]:
    """Zeros, extremes, infinities, quiet and signalling NaN and subnormals of both signs (bit patterns of any float layout)."""
    if dtype == torch.bool:
        return [0, 1]
    bits = 8 * dtype.itemsize
    sign = 1 << (bits - 1)
    positive = [0, 1, 2, sign - 1, sign >> 1, (sign >> 1) - 1]
    if dtype.is_floating_point:
        numbers = torch.finfo(dtype)
        values = torch.tensor([float("inf"), float("nan"), numbers.max, numbers.tiny, numbers.smallest_normal / 2, 1.0]).to(dtype)
        if dtype == torch.float64:
            values = torch.tensor([float("inf"), float("nan"), numbers.max, numbers.tiny, numbers.smallest_normal / 2, 1.0], dtype=dtype)
        positive += [int.from_bytes(bytes(raw_bytes(value)), "little") & (sign - 1) for value in values]
        positive.append(positive[6] | 1)  # infinity with a payload: a signalling NaN
    return [*positive, *(pattern | sign for pattern in positive)]


@st.composite
def pairs(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """Base and target of one dtype and shape; any bit pattern, the special ones often."""
    dtype = draw(st.sampled_from(DTYPE_LIST))
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
    count = torch.Size(shape).numel()
    anything = st.integers(0, 1) if dtype == torch.bool else st.integers(0, (1 << 8 * dtype.itemsize) - 1)
    patterns = st.lists(st.one_of(st.sampled_from(special_patterns(dtype)), anything), min_size=count, max_size=count)
    return from_patterns(draw(patterns), dtype, shape), from_patterns(draw(patterns), dtype, shape)


def assert_same_bits(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    assert bytes(raw_bytes(ours)) == bytes(raw_bytes(theirs))


@pytest.fixture(params=["compiled", "numpy"])
def loops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the compiled loops, and with those of numpy."""
    if request.param == "numpy":
        monkeypatch.setattr(kernels, "loops", lambda: None)
    elif kernels.loops() is None:
        pytest.skip("numba is not installed")
    return str(request.param)


@settings(max_examples=300, deadline=None)
@given(pairs())
def test_every_tensor_comes_back_bit_for_bit_from_any_base(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    base, target = pair
    before = bytes(raw_bytes(base))
    assert_same_bits(codec.decode(base, codec.encode(base, target), "t"), target)
    assert_same_bits(codec.decode_whole(codec.encode_whole(target), target.dtype, tuple(target.shape), "t"), target)
    assert bytes(raw_bytes(base)) == before, "the base is left as it was"


@pytest.mark.parametrize("dtype", DTYPE_LIST, ids=str)
def test_every_special_value_comes_back_from_every_other(dtype: torch.dtype) -> None:
    patterns = special_patterns(dtype)
    base = from_patterns([a for a in patterns for _ in patterns], dtype, (len(patterns), len(patterns)))
    target = from_patterns(patterns * len(patterns), dtype, (len(patterns), len(patterns)))
    if dtype.is_floating_point:
        wide = target.double()
        assert wide.isnan().any() and ((wide == 0) & wide.signbit()).any() and ((wide == 0) & ~wide.signbit()).any()
        assert dtype == torch.float8_e4m3fn or wide.isinf().any(), "float8_e4m3fn has no infinity"
    assert_same_bits(codec.decode(base, codec.encode(base, target), "t"), target)


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPE_LIST if dtype.itemsize == 1 and dtype != torch.bool], ids=str)
def test_all_pairs_of_one_byte_values_come_back(dtype: torch.dtype) -> None:
    base = torch.arange(256, dtype=torch.uint8).repeat_interleave(256).view(dtype)
    target = torch.arange(256, dtype=torch.uint8).repeat(256).view(dtype)
    assert base.numel() == 65536
    assert_same_bits(codec.decode(base, codec.encode(base, target), "t"), target)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int16], ids=str)
def test_all_two_byte_values_come_back(dtype: torch.dtype) -> None:
    base = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    for shift in (0, 1, 32767, 32768, 40000):
        target = base.view(torch.int16).roll(shift).view(dtype)
        assert_same_bits(codec.decode(base, codec.encode(base, target), "t"), target)


def test_a_tensor_that_is_not_contiguous_comes_back() -> None:
    base, target = torch.randn(6, 4).T, torch.randn(6, 4).T
    assert not base.is_contiguous()
    assert_same_bits(codec.decode(base, codec.encode(base, target), "t"), target.contiguous())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.float8_e5m2, torch.float32], ids=str)
def test_a_restored_tensor_owns_memory_that_may_be_written_to(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from_numpy, seen = torch.from_numpy, []

    def watched(array: Any) -> torch.Tensor:
        seen.append(array.flags.writeable)
        return from_numpy(array)

    monkeypatch.setattr(torch, "from_numpy", watched)
    target = torch.ones(8).to(dtype)
    codec.decode(target, codec.encode(target, target), "t")
    codec.decode_whole(codec.encode_whole(target), dtype, (8,), "t")
    assert seen == [True, True]


@pytest.mark.parametrize(
    ("dtype", "largest"), [(torch.float32, 0.8), (torch.float16, 0.6), (torch.bfloat16, 0.5)], ids=["float32", "float16", "bfloat16"]
)
def test_small_updates_become_a_small_delta(dtype: torch.dtype, largest: float) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = 0.02 * torch.randn(200_000, generator=generator)
    base = weights.to(dtype)
    target = (base.float() + 1e-4 * torch.randn(200_000, generator=generator)).to(dtype)
    assert (base != target).float().mean() > 0.3, "most weights do change"
    data = codec.encode(base, target)
    assert len(data) < largest * base.nbytes
    assert len(data) < 0.9 * len(codec.encode_whole(target)), "a difference is smaller than the tensor alone"
    assert_same_bits(codec.decode(base, data, "t"), target)


def test_equal_tensors_become_next_to_nothing() -> None:
    base = torch.randn(100_000)
    assert len(codec.encode(base, base.clone())) < 0.001 * base.nbytes


def test_a_step_to_the_neighbouring_number_costs_the_same_everywhere() -> None:
    base = torch.tensor([0.0, 1.0, -1.0, 1e-42, -1e-42, 3e38, -3e38, float("inf"), 1.9999999]).repeat(1000)
    far = torch.randn(9000, generator=torch.Generator().manual_seed(0))
    up, down = torch.nextafter(base, torch.tensor(torch.inf)), torch.nextafter(base, torch.tensor(-torch.inf))
    for target in (up, down):
        assert (target != base).sum() >= 8000
        assert len(codec.encode(base, target)) < 500 < len(codec.encode(base, far)) / 10


def test_data_of_another_length_is_an_error_that_names_the_tensor() -> None:
    base, longer = torch.randn(50), torch.randn(51)
    with pytest.raises(UserError, match=r"layer\.7.*204 bytes, 200 are needed"):
        codec.decode(base, codec.encode(longer, longer), "layer.7")
    with pytest.raises(UserError, match=r"layer\.7.*200 bytes, 204 are needed"):
        codec.decode_whole(codec.encode_whole(base), torch.float32, (51,), "layer.7")
    with pytest.raises(UserError, match=r"layer\.7"):
        codec.decode(torch.zeros(0), codec.encode(base, base), "layer.7")


def test_data_cut_off_anywhere_is_an_error_that_names_the_tensor() -> None:
    base, target = torch.randn(300), torch.randn(300)
    data = codec.encode(base, target)
    for length in (0, 1, 3, 4, 5, 8, len(data) // 2, len(data) - 1):
        with pytest.raises(UserError, match=r"layer\.7"):
            codec.decode(base, data[:length], "layer.7")


def test_foreign_data_is_an_error_that_names_the_tensor() -> None:
    for data in (b"no zstandard at all", b"\0" * 100, b"\x50\x2a\x4d\x18\x04\0\0\0abcd"):  # the last is a skippable frame
        with pytest.raises(UserError, match=r"layer\.7"):
            codec.decode(torch.zeros(25), data, "layer.7")


def test_a_flipped_bit_never_ends_in_anything_but_a_user_error_or_a_tensor_of_the_right_kind() -> None:
    # Values may come out wrong here; the SHA-256 of the delta finds them (test_delta.py).
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(400, generator=generator).bfloat16()
    target = (base.float() + 0.01 * torch.randn(400, generator=generator)).bfloat16()
    data = codec.encode(base, target)
    refused = wrong = 0
    for place in random.Random(0).sample(range(8 * len(data)), 300):
        damaged = bytearray(data)
        damaged[place // 8] ^= 1 << (place % 8)
        try:
            restored = codec.decode(base, bytes(damaged), "layer.7")
        except UserError as error:
            assert "layer.7" in str(error)
            refused += 1
        else:
            assert (restored.dtype, restored.shape) == (target.dtype, target.shape)
            wrong += bytes(raw_bytes(restored)) != bytes(raw_bytes(target))
    assert refused > 0 and wrong > 0 and refused + wrong > 250, (refused, wrong)


def test_only_tensors_of_one_kind_have_a_difference() -> None:
    for other in (torch.zeros(4), torch.zeros(3, dtype=torch.float16)):
        with pytest.raises(AssertionError, match="one kind"):
            codec.encode(torch.zeros(3), other)


def changed(dtype: torch.dtype, size: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and what a little training makes of them; whole numbers likewise."""
    generator = torch.Generator().manual_seed(seed)
    if not dtype.is_floating_point:
        base = torch.randint(0, 100, (size,), generator=generator).to(dtype)
        return base, base + torch.randint(0, 3, (size,), generator=generator).to(dtype)
    base = 0.1 * torch.randn(size, generator=generator, dtype=torch.float64)
    return base.to(dtype), (base + 1e-3 * torch.randn(size, generator=generator, dtype=torch.float64)).to(dtype)


FLOATS = [dtype for dtype in DTYPE_LIST if dtype.is_floating_point]


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int64, torch.int8], ids=str)
@pytest.mark.parametrize("size", [4096, 5000, 70_001])
def test_many_weights_come_back_by_exponent(dtype: torch.dtype, size: int, loops: str) -> None:
    base, target = changed(dtype, size)
    data = codec.encode(base, target)
    assert data[0] == codec.EXPONENTS
    assert_same_bits(codec.decode(base, data, "t"), target)
    assert len(codec.encode(base, target)) == len(data)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_any_patterns_at_all_come_back_by_exponent(dtype: torch.dtype, loops: str) -> None:
    generator = torch.Generator().manual_seed(1)
    base, target = (torch.randint(0, 256, (6000 * dtype.itemsize,), dtype=torch.uint8, generator=generator).view(dtype) for _ in range(2))
    data = codec.encode(base, target)
    assert data[0] == codec.EXPONENTS
    assert_same_bits(codec.decode(base, data, "t"), target)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn], ids=str)
def test_the_compiled_loops_and_numpy_write_the_same_bytes(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    if kernels.loops() is None:
        pytest.skip("numba is not installed")
    base, target = changed(dtype, 50_000)
    ours = codec.encode(base, target)
    monkeypatch.setattr(kernels, "loops", lambda: None)
    assert codec.encode(base, target) == ours


def test_slices_and_threads_change_nothing(monkeypatch: pytest.MonkeyPatch, loops: str) -> None:
    monkeypatch.setattr(rans, "CHUNK", 5000)
    base, target = changed(torch.bfloat16, 23_456)
    with ThreadPoolExecutor(3) as pool:
        data = codec.encode(base, target, "default", pool)
        assert data == codec.encode(base, target)
        assert_same_bits(codec.decode(base, data, "t", pool), target)


def test_by_exponent_a_difference_comes_close_to_its_context_entropy() -> None:
    """bf16 weights of many sizes after a small change; `theirs` is the entropy of the numbers given the base's exponent."""
    base, target = changed(torch.bfloat16, 400_000)
    numbers = kernels.difference(codec._bits(base), codec._bits(target), 1 << 15).astype(np.int64)
    exponents = (codec._bits(base).astype(np.int64) >> 7) & 255

    def bits(keys: np.ndarray) -> float:
        _, counts = np.unique(keys, return_counts=True)
        return float((counts * np.log2(len(keys) / counts)).sum())

    theirs = bits(exponents << 16 | numbers) - bits(exponents)
    ours = 8 * len(codec.encode(base, target))
    assert 0.95 * theirs < ours < 1.05 * theirs
    assert ours < 0.85 * 8 * len(codec.encode(base, target, "fast"))


def test_a_damaged_coded_tensor_is_refused_or_without_effect(loops: str) -> None:
    """Any single flipped bit: an error that names the tensor, or (in a bit that nothing depends on) the same tensor."""
    base, target = changed(torch.bfloat16, 4500)
    data = codec.encode(base, target)
    caught = Counter[str]()
    for place in random.Random(0).sample(range(8 * len(data)), 400):
        damaged = bytearray(data)
        damaged[place // 8] ^= 1 << place % 8
        try:
            restored = codec.decode(base, bytes(damaged), "layer.7")
        except UserError as error:
            assert str(error).startswith("layer.7: the delta")
            caught["refused"] += 1
        else:  # the SHA-256 of the tensor tells
            caught["same" if torch.equal(restored, target) else "other"] += 1
    assert caught["refused"] > 100 and caught["same"] < 20, caught
    for length in random.Random(1).sample(range(len(data)), 60):
        with pytest.raises(UserError, match=r"layer.7: the delta"):
            codec.decode(base, data[:length], "layer.7")
    with pytest.raises(UserError, match=r"layer.7: the delta"):
        codec.decode(base[:4400], data, "layer.7")
