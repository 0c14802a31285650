"""Why a base is not the delta's base, in words: another model, another precision, a chat variant, a resized vocabulary, a delta."""

import math
from collections.abc import Iterable

import numpy as np
import torch

from mtllama.errors import UserError
from mtllama.weights import codec
from mtllama.weights.delta import sample
from mtllama.weights.manifest import BaseTensor, Manifest
from mtllama.weights.shards import DTYPE_NAMES, CheckpointReader

ALIKE = 0.9
"""Correlation of the samples of a model and of one that was trained further; of unrelated ones it is about 0."""
DELTA_SIZE = 0.2
"""Differences are at most so large a part of the weights."""
MODEL_SIZE, OPPOSED = 0.5, -0.3
"""Numbers that are a larger part than this and correlate more than this are no difference."""


def check_kind(base: CheckpointReader, manifest: Manifest) -> None:
    """Compare names, shapes, dtypes and samples of every tensor that the delta builds on: quick, and no weights are read whole.

    Of a base that is fetched shard by shard only the samples of those that are there.
    """
    needed = {entry.base.name: entry.base for entry in manifest.entries.values() if entry.base}
    for name, wanted in needed.items():
        if name not in base:
            raise UserError(f"wrong base: {base.label} has no tensor {name}: another model; {_asked(manifest)}")
        found = base.info(name)
        if found.shape != wanted.info.shape:
            here = f"in {base.label} the tensor {name} has the shape {list(found.shape)}, not {list(wanted.info.shape)}"
            resized = "embed" in name or "lm_head" in name
            what = "its vocabulary was resized" if resized and found.shape[1:] == wanted.info.shape[1:] else "another model"
            raise UserError(f"wrong base: {here}: {what}; {_asked(manifest)}")
        if found.dtype != wanted.info.dtype:
            here = f"in {base.label} the tensor {name} is {DTYPE_NAMES[found.dtype]}, not {DTYPE_NAMES[wanted.info.dtype]}"
            raise UserError(f"wrong base: {here}: {_precision(base, wanted)}; {_asked(manifest)}")
    for name, wanted in needed.items():
        if base.can_read(name) and sample(base, name) != wanted.sample:
            raise wrong_values(base, manifest, name)


def wrong_values(base: CheckpointReader, manifest: Manifest, name: str) -> UserError:
    """The error for a base whose tensor `name` has other values."""
    return UserError(
        f"wrong base: in {base.label} the tensor {name} differs in its values: {_likeness(base, manifest)}; {_asked(manifest)}"
    )


def check_published(base: CheckpointReader, delta: CheckpointReader, names: Iterable[str]) -> None:
    """Refuse a model that is taken for a published delta: its numbers are as large as the base's and not opposed to them.

    Names and shapes fit. (The delta of two models that have nothing in common is large, too, but takes the base away.)
    """
    pairs = []
    for name in names:
        info = base.info(name)
        if len(info.shape) > 1 and info.dtype.is_floating_point and delta.info(name).dtype.is_floating_point:
            before, change = (_numbers(_from_bytes(sample(each, name, info.size), each.info(name).dtype)) for each in (base, delta))
            if size := _norm(before):
                pairs.append((before / size, change / size))
    if not pairs:
        return
    a, b = (np.concatenate(side) for side in zip(*pairs, strict=True))
    if _norm(b) > MODEL_SIZE * _norm(a) and float(a @ b) > OPPOSED * _norm(a) * _norm(b):
        raise UserError(f"{delta.label} is a model, not a delta: its numbers are as large as those of {base.label}")


def _asked(manifest: Manifest) -> str:
    return f"the delta needs {manifest.base_name}"


def _precision(base: CheckpointReader, wanted: BaseTensor) -> str:
    """Whether one is the other, rounded, and which."""
    if not base.can_read(wanted.name):
        return "another precision, or another model"
    dtype, found = wanted.info.dtype, _read(base, wanted.name)
    asked = _from_bytes(wanted.sample, dtype)
    if not (dtype.is_floating_point and found.dtype.is_floating_point):
        return "another model"
    if torch.equal(found.to(dtype), asked):
        return f"the same weights in another precision: convert it to {DTYPE_NAMES[dtype]}"
    if torch.equal(asked.to(found.dtype), found):
        return f"the same weights, but rounded: the original in {DTYPE_NAMES[dtype]} is needed"
    return "another precision, and other values too"


def _likeness(base: CheckpointReader, manifest: Manifest) -> str:
    """What the samples of all matrices together say."""
    needed = {e.base.name: e.base for e in manifest.entries.values() if e.base and e.info.dtype.is_floating_point and len(e.info.shape) > 1}
    fits = [name for name, wanted in needed.items() if name in base and base.info(name) == wanted.info and base.can_read(name)]
    if not fits:
        return "another model"
    asked = [_numbers(_from_bytes(needed[name].sample, needed[name].info.dtype)) for name in fits]
    found = [_numbers(_read(base, name)) for name in fits]
    num_other = sum(not np.array_equal(a, b) for a, b in zip(asked, found, strict=True))
    if num_other <= 1 < len(fits):
        return "the rest looks right: the file is damaged, or that tensor was edited"
    # Each tensor by its own size, so that large ones do not decide alone.
    sizes = [_norm(a) or 1.0 for a in asked]
    a, b = (np.concatenate([each / size for each, size in zip(side, sizes, strict=True)]) for side in (asked, found))
    if _norm(b) < DELTA_SIZE * _norm(a):
        return "its numbers are as small as differences: a delta, taken for a model?"
    correlation = float(a @ b) / ((_norm(a) * _norm(b)) or 1.0)
    if correlation > ALIKE:
        return f"a model trained further from the same weights, such as a chat variant (correlation {correlation:.3f})"
    return f"another model of the same shape (correlation {correlation:.3f})"


def _norm(values: np.ndarray) -> float:
    return math.sqrt(float(values @ values))


def _read(base: CheckpointReader, name: str) -> torch.Tensor:
    return _from_bytes(sample(base, name), base.info(name).dtype)


def _from_bytes(data: bytes, dtype: torch.dtype) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(dtype) if data else torch.empty(0, dtype=dtype)


def _numbers(values: torch.Tensor) -> np.ndarray:
    found: np.ndarray = np.nan_to_num(codec.values(codec.bits(values), values.dtype).astype(np.float64), posinf=0, neginf=0)
    return found
