"""RMSNorm and SwiGLU as one autograd step each: fewer passes over memory, and less of it kept for the backward pass.

As modelling code writes them, each is five to eight operations whose intermediate results are kept. Here the backward pass
works out again what is cheap, and writes in place; where there is none, nothing is kept.
"""

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F

BEFORE_MATRICES = ("input_layernorm", "post_attention_layernorm")
"""Norms whose outputs are multiplied with matrices and go nowhere else, by the names that the LLaMA family has for them."""


def fuse(decoder: Any, compute: torch.dtype) -> None:
    """Let the decoder's norms and gated units compute by the functions below. Modules of other shapes are left as they are.

    What stands behind a norm goes into several matrix products: it is cast to the compute dtype once, not for each of them.
    """
    for name, module in decoder.named_modules():
        if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
            wanted = compute if name.rpartition(".")[2] in BEFORE_MATRICES else None
            module.forward = MethodType(_norm(wanted), module)
        elif all(hasattr(module, part) for part in ("gate_proj", "up_proj", "down_proj")) and _is_silu(module.act_fn):
            module.forward = MethodType(_gated, module)


def _is_silu(activation: Any) -> bool:
    return isinstance(activation, torch.nn.SiLU) or type(activation).__name__ == "SiLUActivation"


def _norm(dtype: torch.dtype | None) -> Any:
    def forward(self: Any, hidden_states: torch.Tensor) -> Any:
        return _RMSNorm.apply(hidden_states, self.weight, self.variance_epsilon, dtype or hidden_states.dtype)  # type: ignore[no-untyped-call]

    return forward


def _gated(self: Any, x: torch.Tensor) -> Any:
    if not torch.is_grad_enabled():
        return self.down_proj(F.silu(self.gate_proj(x), inplace=True).mul_(self.up_proj(x)))
    return self.down_proj(_SwiGLU.apply(self.gate_proj(x), self.up_proj(x)))  # type: ignore[no-untyped-call]


class _RMSNorm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in float32 (Zhang and Sennrich, 2019).

    Only x and one number a row are kept.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype) -> torch.Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)  # [..., 1]: reads x once, and writes no square of it
        inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return torch.mul(x, inverse).mul_(weight).to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        x, weight, inverse = ctx.saved_tensors
        unit = torch.mul(x, inverse)  # [..., hidden] float32
        grad = grads[0].to(torch.float32, copy=True)
        d_weight = None
        if ctx.needs_input_grad[1]:
            d_weight = torch.mul(grad, unit).flatten(0, -2).sum(0).to(weight.dtype)
        grad.mul_(weight)
        along = torch.linalg.vecdot(grad, unit).unsqueeze(-1).div_(-x.shape[-1])
        return grad.addcmul_(unit, along).mul_(inverse).to(x.dtype), d_weight, None, None


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up (Shazeer, 2020). silu(gate) is not kept."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        d_gate = torch.ops.aten.silu_backward(torch.mul(grads[0], up), gate)
        return d_gate, F.silu(gate).mul_(grads[0])
