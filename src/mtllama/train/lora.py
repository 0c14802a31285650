"""LoRA through peft: adapters are put into the model and trained, the base keeps its values. peft is imported when it is asked for."""

import hashlib
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from mtllama.errors import UserError
from mtllama.model import adapter
from mtllama.train.parallel import Ranks, whole
from mtllama.train.recipe import LoraConfig

_NAME = "default"
"""What peft calls an adapter that has no name of its own."""


def add(model: Any, config: LoraConfig) -> None:
    """Put adapters without values (see `start`) around the matrices that the recipe names, and freeze everything else."""
    peft = _peft()
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    for target in config.targets:
        if not any(name.split(".")[-1] == target for name in names):
            known = ", ".join(sorted({name.split(".")[-1] for name in names}))
            raise UserError(f"lora.targets: the model has no matrix {target!r}; choose among {known}")
    head = model.get_output_embeddings()
    if head.weight is model.get_input_embeddings().weight and any(
        name.split(".")[-1] in config.targets for name in names if model.get_submodule(name) is head
    ):
        raise UserError("lora.targets: lm_head shares its weights with the embedding in this model; leave it out")
    peft.inject_adapter_in_model(_settings(config), model, low_cpu_mem_usage=True)


def start(prefix: str, part: torch.nn.Module, seed: int) -> None:
    """Give the adapters without values of a part (`prefix`: its name in the model, with a dot behind it) the values to start from, in float32.

    Drawn by peft's rule, A from a uniform distribution and B zero, by name: the same, however many ranks there are.
    """
    for name, module in part.named_modules():
        if not hasattr(module, "lora_A") or not module.lora_A[_NAME].weight.is_meta:  # type: ignore[index, union-attr]
            continue
        a, b = module.lora_A[_NAME], module.lora_B[_NAME]  # type: ignore[index, union-attr]
        device = module.base_layer.weight.device  # type: ignore[union-attr]
        device = torch.device("cpu") if device.type == "meta" else device
        draw = torch.Generator().manual_seed(seed_of(seed, prefix + name))
        first = torch.nn.init.kaiming_uniform_(torch.empty(a.weight.shape), a=5**0.5, generator=draw)
        a.weight = torch.nn.Parameter(first.to(device))
        b.weight = torch.nn.Parameter(torch.zeros(b.weight.shape, device=device))


def seed_of(*parts: int | str) -> int:
    """One seed for torch out of a run's and of what is drawn: hashed, since torch's generator on CPUs takes no more than 32 bits of a number."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big")


def save(model: Any, config: LoraConfig, base: str | None, folder: Path, ranks: Ranks) -> None:
    """Write the adapters as peft does. `base`: path or hub id that it will be asked to put them on. All ranks."""
    tensors = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            tensor = whole(parameter.detach())
            if ranks.first:
                tensors[adapter.PREFIX + name.replace(f".{_NAME}.", ".")] = tensor.cpu().contiguous()
    if ranks.first:
        settings = _settings(config)
        settings.base_model_name_or_path, settings.inference_mode = base, True
        settings.save_pretrained(folder)
        safetensors.torch.save_file(tensors, folder / adapter.WEIGHTS, metadata={"format": "pt"})


def _settings(config: LoraConfig) -> Any:
    return _peft().LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=list(config.targets),
        task_type="CAUSAL_LM",
    )


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise UserError("the recipe asks for LoRA, and peft is not installed; run: pip install 'mtllama[lora]'") from error
    return peft
