"""Model folders for the tests of deltas: changed copies, and comparisons to the last bit."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from mtllama.weights import delta, restore
from mtllama.weights.manifest import Manifest
from mtllama.weights.shards import INDEX, SINGLE, CheckpointReader, raw_bytes

Tensors = dict[str, torch.Tensor]
EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
Q = "model.layers.1.self_attn.q_proj.weight"


def weights(folder: Path) -> Tensors:
    """Every tensor of a folder of safetensors, by their own library."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in safetensors.torch.load_file(file).items()}


def save(tensors: Tensors, folder: Path) -> Path:
    """The tensors alone as a checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    return folder


def with_weights(source: Path, folder: Path, change: Callable[[Tensors], Any]) -> Path:
    """A copy of a model folder, its weights changed in place by `change` and in one file."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors", INDEX))
    tensors = weights(source)
    change(tensors)
    return save(tensors, folder)


def add_noise(tensors: Tensors) -> None:
    """A little training: two thirds of the weights move, one tensor stays equal."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in tensors.items():
        if name != NORM:
            scale = 1e-2 if tensor.ndim == 1 else 1e-3  # a norm's weights are 1, where bf16 is coarse
            tensors[name] = (tensor.float() + scale * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)


def same_bits(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Dtype, shape and every bit (NaN equals itself here)."""
    return (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape) and bytes(raw_bytes(ours)) == bytes(raw_bytes(theirs))


def assert_weights(ours: Tensors, theirs: Tensors) -> None:
    """The same names, dtypes, shapes and bits."""
    assert ours.keys() == theirs.keys() and theirs
    assert not [name for name in theirs if not same_bits(ours[name], theirs[name])]


def other_files(folder: Path) -> list[Path]:
    """All that is not weights."""
    return sorted(path for path in folder.iterdir() if path.suffix not in (".safetensors", ".bin") and path.name != INDEX)


def assert_restored(restored: Path, target: Path) -> None:
    """Every tensor bit for bit and every other file byte for byte, and nothing else."""
    ours, theirs = CheckpointReader(restored), CheckpointReader(target)
    assert_weights({name: ours.tensor(name) for name in ours}, {name: theirs.tensor(name) for name in theirs})
    for ours_file, theirs_file in zip(other_files(restored), other_files(target), strict=True):
        assert ours_file.name == theirs_file.name and ours_file.read_bytes() == theirs_file.read_bytes()


def apply(base: Path, made: Path, out: Path, **options: Any) -> delta.Summary:
    """Restore one delta as it is."""
    return restore.apply(restore.open_target(base, [made]), out, base, made, **options)


def round_trip(base: Path, target: Path, room: Path, **options: Any) -> tuple[delta.Summary, Manifest]:
    """Make, apply, compare; returns what `make` said and the manifest."""
    summary = delta.make(base, target, room / "delta", **options)
    applied = apply(base, room / "delta", room / "restored")
    assert_restored(room / "restored", target)
    assert (applied.num_tensors, applied.num_equal) == (summary.num_tensors, summary.num_equal)
    return summary, Manifest.read(room / "delta")


def copies(base: Path, made: Path, room: Path) -> tuple[Path, Path]:
    """Copies of both that may be damaged."""
    return Path(shutil.copytree(base, room / "base")), Path(shutil.copytree(made, room / "delta"))


def nothing_left(out: Path) -> bool:
    """Neither the output nor a part of it beside."""
    return not out.exists() and not list(out.parent.glob(f".{out.name}*"))


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
