"""The loss: the mean cross-entropy over all target tokens of a step's effective batch, however it is split into passes and over ranks.

The head is multiplied with target rows only, some at a time. Matrix products run in the compute dtype under autocast.
"""

import os
import shutil
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from mtllama.data.batching import Batch, pack
from mtllama.data.prompt import Encoded
from mtllama.errors import UserError
from mtllama.model.fused import fuse, fuse_tables
from mtllama.train.parallel import Ranks

HEAD_ROWS = 256
"""Target rows whose logits are held at a time: there may be as many as a pass has tokens, and a row is a vocabulary long."""
COMPILED = "mtllama_segments_compiled"
"""Segment attention within compiled layers: it is given the batch, since they would be compiled anew for every length of a list."""


class Objective(torch.nn.Module):
    """The losses of a batch as a module: its call is what weights are gathered for and freed behind, where they are sharded."""

    def __init__(self, model: Any, compute: torch.dtype) -> None:
        super().__init__()
        self.model, self.compute = model, compute
        fuse(model.get_decoder(), compute)
        fuse_tables(model, compute)

    def forward(self, batch: Batch) -> torch.Tensor:
        """As `target_losses`, with matrix products in the compute dtype."""
        with torch.autocast(next(self.parameters()).device.type, dtype=torch.bfloat16, enabled=self.compute == torch.bfloat16):
            return target_losses(self.model, batch)


def compile_layers(model: Any, layers: list[torch.nn.Module], device: torch.device) -> None:
    """Compile the layers but for their attention: once for all lengths, in place of once for every number of segments."""
    from transformers import AttentionInterface

    from mtllama.model.attention import segment_attention

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def attend(*args: Any, segments: Batch, **kwargs: Any) -> Any:
        return segment_attention(*args, segments=segments.segments, **kwargs)

    if device.type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))):
        raise UserError("train.compile needs a C++ compiler on a CPU, and there is none; install g++, or set train.compile=false")
    AttentionInterface.register(COMPILED, attend)
    model.config._attn_implementation = COMPILED
    for layer in layers:
        layer.compile(dynamic=True)


def backward(objective: Objective, examples: Sequence[Encoded], tokens_per_pass: int, ranks: Ranks) -> torch.Tensor:
    """Gradients of the mean loss of the effective batch, over all ranks; returns the summed loss of each of this rank's. [num_examples]"""
    losses = torch.zeros(len(examples))
    batches = list(pack(examples, tokens_per_pass))
    plans = ranks.gather((sum(example.num_target for example in examples), len(batches)))
    scale = ranks.loss_scale / max(1, sum(num_targets for num_targets, _ in plans))
    # Each pass is one of every rank's: those that have fewer add some that weigh nothing.
    idle = [next(pack([Encoded([0, 0], 1, cut=False)], 2))] * (max(passes for _, passes in plans) - len(batches))
    for batch, weight in [*((batch, scale) for batch in batches), *((batch, 0.0) for batch in idle)]:
        token_losses = objective(batch)  # [num_target]
        torch.autograd.backward(token_losses.sum() * weight)
        if weight:
            losses.index_add_(0, batch.owners, token_losses.detach().float().cpu())
    return losses


def target_losses(model: Any, batch: Batch) -> torch.Tensor:
    """Cross-entropy (nat) of every target token. [num_target]"""
    device = next(model.parameters()).device
    segments = batch if model.config._attn_implementation == COMPILED else batch.segments
    hidden = (
        model.get_decoder()(input_ids=batch.ids.to(device), position_ids=batch.positions.to(device), segments=segments, use_cache=False)
    ).last_hidden_state  # [1, seq, hidden]
    rows, targets = hidden[0, batch.predict.to(device)], batch.targets.to(device)  # [num_target, hidden], [num_target]
    head = model.get_output_embeddings()

    def losses(rows: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(head(rows).float(), targets, reduction="none")

    if len(rows) <= HEAD_ROWS:
        return losses(rows, targets)
    parts = zip(torch.split(rows, HEAD_ROWS), torch.split(targets, HEAD_ROWS), strict=True)
    return torch.cat([cast(torch.Tensor, checkpoint(losses, *part, use_reentrant=False)) for part in parts])
