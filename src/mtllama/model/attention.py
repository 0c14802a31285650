"""Attention that keeps to its segment, for rows in which several examples stand one behind the other.

Three ways, one result: FlashAttention over all segments at once where a GPU has it, plain matrix products on CPUs, and torch's own
attention segment by segment everywhere else.
"""

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

from mtllama.errors import UserError

SEGMENTS = "mtllama_segments"
"""Name under which transformers finds it: `attn_implementation=SEGMENTS`, then `model(..., segments=[12, 40])`."""
ROWS = 256
"""Queries that are handled at a time: half of a long segment's square lies above the diagonal, and is left out by blocks."""
FLASH_CAPABILITY, FLASH_DIM = (8, 0), 256
"""What FlashAttention 2 asks of a GPU, and the largest dimension of a head that it knows."""
LONGEST = 2048
"""Segments up to which the probabilities are kept for the backward pass; longer ones would take too much memory."""


def segment_attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # [1, heads, seq, dim]
    key: torch.Tensor,  # [1, kv_heads, seq, dim]
    value: torch.Tensor,  # [1, kv_heads, seq, dim]
    attention_mask: torch.Tensor | None,
    *,
    segments: list[int],
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each of `segments` (lengths that add up to seq); masks are not looked at."""
    require_plain(module, kwargs)
    if query.device.type == "cpu" and not dropout and max(segments) <= LONGEST:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        dtype = value.dtype  # under autocast, rotated queries and keys are float32 beside values in bfloat16
        with torch.autocast("cpu", enabled=False):
            out: torch.Tensor = _Segments.apply(query.to(dtype), key.to(dtype), value, segments, scale)  # type: ignore[no-untyped-call]
        return out, None
    if value.dtype in (torch.bfloat16, torch.float16) and not dropout and _has_flash(query.device, query.shape[-1]):
        ends = _ends(tuple(segments), query.device)
        q, k, v = (each[0].transpose(0, 1).to(value.dtype) for each in (query, key, value))  # [seq, heads, dim]
        longest = max(segments)
        flash = varlen_attn(q, k, v, ends, ends, longest, longest, window_size=(-1, 0), enable_gqa=True, scale=scaling)
        assert isinstance(flash, torch.Tensor)
        return flash[None], None
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    parts = zip(*(torch.split_with_sizes(each, segments, dim=2) for each in (query, key, value)), strict=True)
    outputs = [F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, dropout_p=dropout) for q, k, v in parts]
    return torch.cat(outputs, dim=2).transpose(1, 2), None  # [1, seq, heads, dim]


def require_plain(module: torch.nn.Module, options: dict[str, Any]) -> None:
    """Refuse a model whose attention has parts that would be left out without a word."""
    for name in ("softcap", "s_aux"):
        if options.get(name) is not None:
            raise UserError(
                f"attention of {type(module).__name__} has a part ({name}) that is not computed here; the LLaMA family has none"
            )


def _has_flash(device: torch.device, dim: int) -> bool:
    """Whether torch's FlashAttention runs there with heads of this dimension."""
    return device.type == "cuda" and dim <= FLASH_DIM and dim % 8 == 0 and torch.cuda.get_device_capability(device) >= FLASH_CAPABILITY


@functools.lru_cache(8)  # every layer asks for the same ones
def _ends(segments: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Where segments begin and end. [segments + 1]"""
    return torch.tensor([0, *itertools.accumulate(segments)], dtype=torch.int32, device=device)


class _Segments(torch.autograd.Function):
    """The same by plain matrix products: on CPUs several times as fast as torch's own attention, whose backward pass above all is slow.

    The heads that share a key stand one behind the other, so that keys and values are not repeated.
    """

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: list[int], scale: float) -> torch.Tensor:
        _, heads, seq, dim = query.shape
        out = query.new_empty(seq, heads, dim)
        kept = []
        for start, first, last in _blocks(segments):
            q, k, v = _rows(query, key, first, last), key[0, :, start:last], value[0, :, start:last]
            above = _above(heads // len(k), last - first, last - start, q.dtype)
            scores = torch.baddbmm(above, q, k.transpose(1, 2), alpha=scale)  # [kv_heads, groups * rows, keys]
            probabilities = torch.softmax(scores, dim=-1)
            out[first:last] = _seq_first(torch.bmm(probabilities, v), last - first)
            kept.append(probabilities)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.segments, ctx.scale = segments, scale
        return out[None]  # [1, seq, heads, dim]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        query, key, value, *kept = ctx.saved_tensors
        grad = grads[0].transpose(1, 2)  # [1, heads, seq, dim]
        d_query, d_key, d_value = query.new_empty(*query.shape[1:]), torch.zeros_like(key[0]), torch.zeros_like(value[0])
        for (start, first, last), probabilities in zip(_blocks(ctx.segments), kept, strict=True):
            q, d_out = _rows(query, key, first, last), _rows(grad, key, first, last)
            k, v = key[0, :, start:last], value[0, :, start:last]
            d_value[:, start:last] += torch.bmm(probabilities.transpose(1, 2), d_out)
            d_probabilities = torch.bmm(d_out, v.transpose(1, 2))
            d_scores = torch._softmax_backward_data(d_probabilities, probabilities, -1, probabilities.dtype).mul_(ctx.scale)
            d_key[:, start:last] += torch.bmm(d_scores.transpose(1, 2), q)
            d_query[:, first:last] = torch.bmm(d_scores, k).view(-1, last - first, query.shape[-1])
        return d_query[None], d_key[None], d_value[None], None, None


def _blocks(segments: list[int]) -> Iterator[tuple[int, int, int]]:
    """Where each segment begins, and its blocks of rows in turn: start, first, last."""
    start = 0
    for length in segments:
        for first in range(start, start + length, ROWS):
            yield start, first, min(first + ROWS, start + length)
        start += length


@functools.lru_cache(64)  # every layer asks for the same ones
def _above(groups: int, rows: int, keys: int, dtype: torch.dtype) -> torch.Tensor:
    """Minus infinity where one of the last `rows` of `keys` places would look ahead, for each head that shares a key. [groups * rows, keys]"""
    return torch.full((rows, keys), -torch.inf, dtype=dtype).triu_(keys - rows + 1).repeat(groups, 1)


def forget_masks() -> None:
    """Drop the masks that are kept. Those of a pass over tensors without contents are such tensors themselves, and a real pass that met
    them would be given memory that nothing was written to.
    """
    _above.cache_clear()


def _rows(query: torch.Tensor, key: torch.Tensor, first: int, last: int) -> torch.Tensor:
    """Rows of all heads that share a key, one head behind the other. [kv_heads, groups * rows, dim]"""
    return query[0, :, first:last].reshape(key.shape[1], -1, query.shape[-1])


def _seq_first(rows: torch.Tensor, count: int) -> torch.Tensor:
    """The inverse: [rows, heads, dim]."""
    return rows.view(-1, count, rows.shape[-1]).transpose(0, 1)


AttentionInterface.register(SEGMENTS, segment_attention)
