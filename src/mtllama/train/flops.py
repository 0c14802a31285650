"""Floating-point operations of a training step, and how many a device can do: together the model FLOPs utilisation (MFU)."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

SIDE = {"cpu": 2048}
"""Rows and columns of the matrices that a device is measured with; for others `LARGE_SIDE`. Smaller ones where `PRODUCTS` of them take longer than `SECONDS`."""
SMALL_SIDE, LARGE_SIDE = 256, 8192
SECONDS = 0.3
"""For how long a device is measured, at least."""
PRODUCTS = 5
"""How many products are timed, at least, after a first one that is not: it also sets the kernels up."""


@dataclass(frozen=True)
class Flops:
    """What a model computes for a token, without what is only computed anew (checkpointed activations) or does not multiply matrices.

    A matrix product counts 2 FLOPs a weight and token forward, 2 more for the gradient of its input, and 2 for that of its
    weight if it is trained (the counting of Chowdhery et al. 2022, appendix B, for causal attention and a head on target rows only).
    """

    matrices: int
    """Weights in the layers' matrices, and those that are trained among them."""
    trained: int
    head: int
    """Weights of the head: hidden size x vocabulary."""
    head_trained: bool
    attention: int
    """Layers x heads x dimension of a head."""

    @classmethod
    def of(cls, model: Any) -> "Flops":
        """Of a causal language model of transformers, on any device (`meta`, too)."""
        config = model.config
        matrices = [parameter for parameter in model.get_decoder().layers.parameters() if parameter.ndim == 2]
        head = model.get_output_embeddings().weight
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            sum(parameter.numel() for parameter in matrices),
            sum(parameter.numel() for parameter in matrices if parameter.requires_grad),
            head.numel(),
            head.requires_grad,
            config.num_hidden_layers * config.num_attention_heads * dim,
        )

    def step(self, lengths: Iterable[int], num_targets: int) -> float:
        """FLOPs of forward and backward pass over examples of these lengths, with `num_targets` target tokens in all."""
        lengths = list(lengths)
        layers = sum(lengths) * (4 * self.matrices + 2 * self.trained)
        head = num_targets * self.head * (6 if self.head_trained else 4)
        squares = sum(length * length for length in lengths)
        return float(layers + head + 3 * 2 * self.attention * squares)  # two products over half a square, three times


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s that large matrix products reach on this device in this dtype, measured now."""
    side = SMALL_SIDE
    left = right = torch.ones(side, side, dtype=dtype, device=device)

    def seconds() -> float:
        start = time.perf_counter()
        float((left @ right)[0, 0])  # the copy of a value waits for the device
        return time.perf_counter() - start

    seconds()
    # A processor that has no instructions for a dtype takes a minute for what others do in a moment.
    while side < SIDE.get(device.type, LARGE_SIDE) and seconds() < SECONDS / PRODUCTS:
        side *= 2
        left, right = (torch.ones(side, side, dtype=dtype, device=device) for _ in range(2))
    seconds()
    taken: list[float] = []
    while len(taken) < PRODUCTS or sum(taken) < SECONDS:
        taken.append(seconds())
    return 2 * side**3 / min(taken)
