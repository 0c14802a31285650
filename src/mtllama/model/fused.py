"""RMSNorm and SwiGLU as one autograd step each, embedding and head with gradients in place: fewer passes over memory, and less of it kept.

As modelling code writes them, the first two are five to eight operations whose intermediate results are kept. Here the backward pass
works out again what is cheap, and writes in place; where there is none, nothing is kept. The last two have weights that are a vocabulary
long: left to autograd, every pass makes two gradients of that size, and copies to and from the compute dtype, and adds them up.
"""

from collections.abc import Iterator
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F

BEFORE_MATRICES = ("input_layernorm", "post_attention_layernorm")
"""Norms whose outputs are multiplied with matrices and go nowhere else, by the names that the LLaMA family has for them."""

SLICE = 2**20
"""Weights of the head that are handled at a time on a CPU: their copy in the compute dtype stays in its cache, and in the heap."""


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


def fuse_tables(model: Any, compute: torch.dtype) -> None:
    """Let the model's embedding and head, as far as they are trained, add to the gradients of their weights in place.

    Autograd is not told of these gradients: `backward` fills `weight.grad`, `torch.autograd.grad` does not see them. Modules of
    other shapes (a head with a bias, one with an adapter around it) are left as they are.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if type(embedding) is torch.nn.Embedding and embedding.weight.requires_grad:
        embedding.forward = MethodType(_lookup, embedding)  # type: ignore[method-assign]
    if type(head) is torch.nn.Linear and head.bias is None and head.weight.requires_grad:
        head.forward = MethodType(_product(compute), head)  # type: ignore[method-assign]


def _lookup(self: Any, ids: torch.Tensor) -> Any:
    return _Lookup.apply(ids, self.weight, self.padding_idx)  # type: ignore[no-untyped-call]


def _product(compute: torch.dtype) -> Any:
    def forward(self: Any, x: torch.Tensor) -> Any:
        return _Product.apply(x, self.weight, compute)  # type: ignore[no-untyped-call]

    return forward


class _Lookup(torch.autograd.Function):
    """Rows of an embedding. [..., seq] -> [..., seq, hidden]"""

    @staticmethod
    def forward(ctx: Any, ids: torch.Tensor, weight: torch.Tensor, padding: int | None) -> torch.Tensor:
        ctx.weight, ctx.padding = weight, padding
        ctx.save_for_backward(ids)
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[None, None, None]:
        (ids,), (grad,), total = ctx.saved_tensors, grads, _gradient(ctx.weight)
        if ctx.padding is not None:  # as torch has it: this row is not trained by being looked up
            ids, grad = ids[ids != ctx.padding], grad[ids != ctx.padding]
        # Not index_add_, whose order of adding differs from run to run on GPUs.
        total.index_put_((ids.flatten(),), grad.reshape(-1, grad.shape[-1]).to(total.dtype), accumulate=True)
        return None, None, None


class _Product(torch.autograd.Function):
    """x @ weight^T in the compute dtype. [..., hidden] -> [..., vocabulary]"""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, compute: torch.dtype) -> torch.Tensor:
        ctx.weight, ctx.dtype = weight, x.dtype
        x = x.to(compute)
        ctx.save_for_backward(x)
        logits = x.new_empty(*x.shape[:-1], len(weight))
        for part in _slices(weight):
            logits[..., part] = x @ weight[part].to(compute).t()
        return logits

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (x,), (grad,), total = ctx.saved_tensors, grads, _gradient(ctx.weight)
        d_x = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for part in _slices(ctx.weight):
            d_x += grad[..., part] @ ctx.weight[part].to(x.dtype)
            total[part] += grad[..., part].flatten(0, -2).t() @ x.flatten(0, -2)
        return d_x.to(ctx.dtype), None, None


def _gradient(weight: torch.Tensor) -> torch.Tensor:
    """That of a weight, to be added to."""
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    return weight.grad


def _slices(weight: torch.Tensor) -> Iterator[slice]:
    """Rows of a weight that are handled at a time: on GPUs all of them, where few large products are what counts."""
    rows = max(1, SLICE // weight.shape[1]) if weight.device.type == "cpu" else len(weight)
    for first in range(0, len(weight), rows):
        yield slice(first, first + rows)


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
