"""The state of a run between two steps, on disk: weights, optimiser moments, step. Whole or not there."""

import shutil
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from mtllama import folders
from mtllama.progress import say

STATE = "state.json"
TENSORS = "state.safetensors"


def save(checkpoints: Path, step: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer, totals: dict[str, Any], keep: int) -> None:
    """Write the state after `step` steps, then drop all but the last `keep`."""
    tensors = {}
    for name, parameter in model.named_parameters():
        tensors[f"weight/{name}"] = parameter.detach()
        for key, value in optimizer.state[parameter].items():
            tensors[f"{key}/{name}"] = value
    with folders.new_folder(checkpoints / f"step-{step:07d}", overwrite=True) as folder:
        safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / TENSORS)
        folders.write_json(folder / STATE, {"step": step, "totals": totals})
    for old in sorted(checkpoints.glob("step-*"))[:-keep]:
        shutil.rmtree(old)


def restore(checkpoints: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, dict[str, Any]]:
    """Load the newest whole state into model and optimiser; returns its step (0 if there is none) and totals.

    A checkpoint that cannot be read is named and passed over.
    """
    for folder in sorted(checkpoints.glob("step-*"), reverse=True):
        try:
            state = folders.read_json(folder / STATE)
            tensors = safetensors.torch.load_file(folder / TENSORS)
            parameters = dict(model.named_parameters())
            for name in parameters:
                if tensors[f"weight/{name}"].shape != parameters[name].shape:
                    raise ValueError(f"the shape of {name} differs")
        except Exception as error:  # whatever is wrong with it, the one before it may be whole
            say(f"checkpoint {folder} cannot be read ({' '.join(str(error).split())[:120]}); passed over")
            continue
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(tensors.pop(f"weight/{name}"))
        for key, tensor in tensors.items():
            kind, _, name = key.partition("/")
            device = "cpu" if kind == "step" and not parameters[name].is_cuda else parameters[name].device
            optimizer.state[parameters[name]][kind] = tensor.to(device)
        return int(state["step"]), dict(state["totals"])
    return 0, {}
