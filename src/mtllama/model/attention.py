"""Attention that keeps to its segment, for rows in which several examples stand one behind the other."""

from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

SEGMENTS = "mtllama_segments"
"""Name under which transformers finds it: `attn_implementation=SEGMENTS`, then `model(..., segments=[12, 40])`."""


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
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    parts = zip(*(torch.split_with_sizes(each, segments, dim=2) for each in (query, key, value)), strict=True)
    outputs = [F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, dropout_p=dropout) for q, k, v in parts]
    return torch.cat(outputs, dim=2).transpose(1, 2), None  # [1, seq, heads, dim]


AttentionInterface.register(SEGMENTS, segment_attention)
