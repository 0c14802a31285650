"""Another reader of the format, written from docs/delta-format.md: it needs nothing of this package, and restores the same."""

import hashlib
import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zstandard
from checkpoints import EMBEDDING, NORM, Q, Tensors, add_noise, save, with_weights

from mtllama.weights import codec, delta
from mtllama.weights.codec import LEVELS, Level

# The reader: numpy, zstandard, hashlib and json alone. -------------------------------------------------------------------------
WIDTH = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
FIELDS = {"F64": (52, 11), "F32": (23, 8), "F16": (10, 5), "BF16": (7, 8), "F8_E4M3": (3, 4), "F8_E5M2": (2, 5)}  # mantissa, exponent


def read(folder: Path) -> dict[str, tuple[str, bytes]]:
    found, index = {}, folder / "model.safetensors.index.json"
    names = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.exists() else ["model.safetensors"]
    for data in [(folder / name).read_bytes() for name in names if (folder / name).exists()]:
        start = 8 + int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8:start]).items():
            if name != "__metadata__":
                found[name] = entry["dtype"], data[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]]
    return found


def rounded(patterns: np.ndarray, dtype: str, wanted: str) -> np.ndarray:
    if (dtype, wanted) == ("F32", "BF16"):  # to nearest, ties to even
        return ((patterns.astype(np.uint64) + 0x7FFF + (patterns >> 16 & 1)) >> 16).astype(np.uint16)
    return patterns if dtype == wanted else patterns.view(f"f{WIDTH[dtype]}").astype(f"f{WIDTH[wanted]}").view(f"u{WIDTH[wanted]}")


def decode(contexts: list[int], tables: list[list[tuple[int, int, int]]], data: bytes) -> list[int]:
    lanes, words, _ = struct.unpack_from("<HII", data)
    states, word, end = list(struct.unpack_from(f"<{lanes}I", data, 10)), 10 + 4 * lanes, 10 + 4 * lanes + 2 * words
    raw, held, have, numbers = iter(data[end:]), 0, 0, []
    for number, context in enumerate(contexts):
        state = states[number % lanes]
        token, frequency, start = tables[context][state % 4096]
        state = frequency * (state // 4096) + state % 4096 - start
        if state < 1 << 16:
            state, word = state << 16 | data[word] | data[word + 1] << 8, word + 2
        states[number % lanes] = state
        shift = (token - 16) // 4 + 2 if token >= 16 else 0
        while have < shift:
            held, have = held | next(raw) << have, have + 8
        numbers.append((4 | token & 3) << shift | held & (1 << shift) - 1 if shift else token)
        held, have = held >> shift, have - shift
    assert word == end and set(states) == {1 << 16} and held == 0 and next(raw, None) is None
    return numbers


def restore(before: np.ndarray, dtype: str, rows: int, data: bytes) -> np.ndarray:
    foot, at = data[-4 - int.from_bytes(data[-4:], "little") : -4], 5
    coding, count = struct.unpack_from("<BI", foot)
    sizes, at = struct.unpack_from(f"<{count}I", foot, at), at + 4 * count
    contexts, tables = np.zeros(len(before), np.int64), []
    if coding:
        (count,) = struct.unpack_from("<H", foot, at)
        firsts, at = np.frombuffer(foot, "<u2", count, at + 2), at + 2 + 2 * count
        mantissa, exponent = FIELDS.get(dtype, (0, 0))
        contexts = np.searchsorted(firsts, (before >> mantissa) & ((1 << exponent) - 1), "right") - 1
        if coding == 2:
            bounds, size = np.frombuffer(foot, "<u2", 7, at), int.from_bytes(foot[at + 14 : at + 18], "little")
            scales, at = zstandard.decompress(foot[at + 18 : at + 18 + size]), at + 18 + size
            of_row, of_column = np.frombuffer(scales[:rows], np.uint8), np.frombuffer(scales[rows:], np.uint8)
            contexts += len(firsts) * np.searchsorted(bounds, np.add.outer(of_row.astype(int), of_column).reshape(-1), "right")
        for _ in range(len(firsts) * (8 if coding == 2 else 1)):
            used = int.from_bytes(foot[at : at + 2], "little")
            tokens, counts = foot[at + 2 : at + 2 + used], np.frombuffer(foot, "<u2", used, at + 2 + used).astype(int) + 1
            starts, at = np.cumsum(counts) - counts, at + 2 + 3 * used
            tables.append([each for each in zip(tokens, counts.tolist(), starts.tolist(), strict=True) for _ in range(each[1])])
    assert at == len(foot) and sum(sizes) == len(data) - len(foot) - 4
    parts, at = [np.zeros(0, before.dtype)], 0
    for number, size in enumerate(sizes):
        part, at = data[at : at + size], at + size
        here = contexts[number << 18 : number + 1 << 18]
        planes = np.frombuffer(zstandard.decompress(part), np.uint8).reshape(-1, len(here)) if coding == 0 else None
        parts.append(
            planes.T.copy().view(before.dtype)[:, 0] if planes is not None else np.array(decode(here.tolist(), tables, part), before.dtype)
        )
    numbers, sign = np.concatenate(parts), before.dtype.type(1 << 8 * before.itemsize - 1 if dtype in FIELDS else 0)
    one = before.dtype.type(1)
    change = (numbers >> one) ^ (~(numbers & one) + one)  # the zigzag undone, modulo 2^bits
    ordered = (np.where(before & sign, ~before, before | sign) if sign else before) + change
    return np.where(ordered & sign, ordered ^ sign, ~ordered) if sign else ordered


def apply(base_dir: Path, delta_dir: Path) -> dict[str, bytes]:
    manifest = json.loads((delta_dir / "delta.json").read_text(encoding="utf-8"))
    assert manifest.pop("sha256") == hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    assert (manifest["format"], manifest["format_version"], manifest["mode"]) == ("mtllama-delta", 3, "bits")
    base, coded, result = read(base_dir), read(delta_dir), {}
    for name, entry in manifest["tensors"].items():
        before = np.zeros(math.prod(entry["shape"]), f"<u{WIDTH[entry['dtype']]}")
        if "base" in entry:
            dtype, data = base[entry["base"]["name"]]
            assert hashlib.sha256(data).hexdigest() == entry["base"]["sha256"]
            known = rounded(np.frombuffer(data, f"<u{WIDTH[dtype]}"), dtype, entry["dtype"])[: len(before)]
            before[: len(known)] = known
        rows = entry["shape"][0] if entry["shape"] else 1
        result[name] = (before if entry["kind"] == "equal" else restore(before, entry["dtype"], rows, coded[name][1])).tobytes()
        assert hashlib.sha256(result[name]).hexdigest() == entry["sha256"]
    return result


# -------------------------------------------------------------------------------------------------------------------------------


def codings(made: Path) -> set[int]:
    return {data[-4 - int.from_bytes(data[-4:], "little")] for _, data in read(made).values()}


def bigger(tensors: Tensors) -> None:
    """Every kind of entry: equal, changed, of another size, new, and rows that change by very different amounts."""
    add_noise(tensors)
    noise = torch.randn(600, 64, generator=torch.Generator().manual_seed(2)) * (torch.arange(600) % 8 == 0)[:, None]
    changed = (tensors[EMBEDDING].float() + 0.1 * noise).bfloat16()
    tensors[EMBEDDING] = torch.cat([changed, torch.ones(3, 64, dtype=torch.bfloat16)])
    tensors["lm_head.weight"] = -changed
    tensors["buffer"], tensors["scalar"], tensors["empty"] = torch.linspace(0, 1, 9), torch.tensor(3), torch.zeros(0, 5)


@pytest.mark.parametrize("level", LEVELS)
def test_another_reader_restores_the_same(pico: Path, tmp_path: Path, level: Level) -> None:
    target = with_weights(pico, tmp_path / "target", bigger)
    delta.make(pico, target, tmp_path / "delta", level=level)
    theirs = {name: data for name, (_, data) in read(target).items()}
    assert apply(pico, tmp_path / "delta") == theirs and len(theirs) > 20
    assert codings(tmp_path / "delta") == {"fast": {0}, "default": {0, 1}, "small": {0, 1, 2}}[level]
    kinds = json.loads((tmp_path / "delta" / "delta.json").read_text())["tensors"]
    assert kinds[NORM]["kind"] == "equal" and kinds[Q]["kind"] == "difference"


@pytest.mark.parametrize("level", LEVELS)
def test_another_reader_restores_every_dtype_from_any_patterns(tmp_path: Path, level: Level) -> None:
    generator = torch.Generator().manual_seed(0)
    dtypes: dict[str, Any] = {str(dtype): dtype for dtype in (*codec._MANTISSA, torch.int64, torch.int32, torch.int16, torch.int8)}
    assert len(dtypes) == 10

    def patterns(dtype: torch.dtype) -> torch.Tensor:
        return torch.randint(0, 256, (65, 65 * dtype.itemsize), dtype=torch.uint8, generator=generator).view(dtype)

    sides = [{name: patterns(dtype) for name, dtype in dtypes.items()} for _ in range(2)]
    base, target = (save(tensors, tmp_path / str(number)) for number, tensors in enumerate(sides))
    delta.make(base, target, tmp_path / "delta", level=level)
    assert apply(base, tmp_path / "delta") == {name: data for name, (_, data) in read(target).items()}
    assert codings(tmp_path / "delta") == ({0} if level == "fast" else {1})


@pytest.mark.parametrize("level", LEVELS)
def test_another_reader_restores_several_slices_and_a_base_in_another_precision(tmp_path: Path, level: Level) -> None:
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(1000, 300, generator=generator)
    change = 0.01 * exact * torch.randn(1000, 300, generator=generator) * (torch.arange(1000) % 3 == 0)[:, None]
    base = save({"a": exact, "b": exact[:50].clone()}, tmp_path / "base")
    target = save({"a": (exact + change).bfloat16(), "b": (exact + change)[:50].half()}, tmp_path / "target")
    delta.make(base, target, tmp_path / "delta", level=level)
    assert exact.numel() > codec.SLICE
    assert apply(base, tmp_path / "delta") == {name: data for name, (_, data) in read(target).items()}
    assert codings(tmp_path / "delta") == {LEVELS.index(level)}
