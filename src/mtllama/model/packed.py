"""Attention of inference over one packed row: prompts with their answers as branches, and prompts that are being continued.

Nothing is padded: what one token is multiplied with in the linear layers is another token, never a filler. Only attention
knows where an item begins and ends. A model gets there by `attn_implementation=PACKED`, then `model(..., plan=plan)`; without a
plan it computes as with transformers' own "sdpa".
"""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from mtllama.model.attention import require_plain

PACKED = "mtllama_packed"
"""Name under which transformers finds it."""
ROWS = 128
"""Queries of one item that are handled at a time: what lies above the diagonal is left out by blocks."""


class Plan(Protocol):
    """Who sees whom in a pass."""

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int | None
    ) -> torch.Tensor:
        """[heads, seq, dim] against [kv_heads, seq, dim] -> [seq, heads, dim]; `window`: how many places back a token sees, if not all."""
        ...


class Cache:
    """Keys and values of prompts that are being continued: `slots` of `width` places each, of which the first `len(lengths)` are taken.

    Taken slots stand together, so that a pass over them costs nothing for the others.
    """

    def __init__(self, slots: int, width: int) -> None:
        self.slots, self.width = slots, width
        self.lengths: list[int] = []
        self.layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # [slots, kv_heads, width, dim] each

    def layer(self, layer: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values of a layer; `like` has their heads, dtype and device. [kv_heads, seq, dim]"""
        if layer not in self.layers:
            shape = (self.slots, like.shape[0], self.width, like.shape[2])
            # Zeros: a place that is masked still counts as 0 times what stands there, and that must not be NaN.
            self.layers[layer] = like.new_zeros(shape), like.new_zeros(shape)
        return self.layers[layer]

    def resized(self, slots: int, width: int) -> "Cache":
        """A cache of another size with what is in this one."""
        other, taken, kept = Cache(slots, width), len(self.lengths), max(self.lengths, default=0)
        other.lengths = list(self.lengths)
        for layer, tensors in self.layers.items():
            if taken:
                for mine, theirs in zip(tensors, other.layer(layer, tensors[0][0]), strict=True):
                    theirs[:taken, :, :kept] = mine[:taken, :, :kept]
        return other

    def leave(self, slot: int) -> int:
        """Free a slot; the last one that is taken moves into it. Returns the number of the one that moved."""
        last = len(self.lengths) - 1
        if slot != last:
            for tensors in self.layers.values():
                for tensor in tensors:
                    tensor[slot, :, : self.lengths[last]] = tensor[last, :, : self.lengths[last]]
        self.lengths[slot] = self.lengths[last]
        self.lengths.pop()
        return last


@dataclass(frozen=True)
class Part:
    """A stretch of the row that is read in one go: a prompt with its answers, or what several prompts begin with."""

    length: int
    """Tokens of the prompt, those that stand in the part before it not counted."""
    answers: Sequence[int] = ()
    """Tokens of each answer."""
    behind: int | None = None
    """Number of the part, earlier in the row, that this one goes on from."""
    slot: int | None = None
    """Where the keys and values of the prompt are kept in the cache."""


@dataclass(frozen=True)
class _Block:
    """Queries `first` to `last` of the part that begins at `start`: they see what it is behind, and of its first `free` places all."""

    before: tuple[int, int]
    """First and last place of what the part is behind, in the row; empty where it is behind nothing."""
    start: int
    first: int
    last: int
    free: int
    hidden: torch.Tensor  # bool [last - first, last - start - free], what they do not see of the others

    def keys(self, of: torch.Tensor) -> torch.Tensor:
        """What the queries may look at, of a tensor whose second-last dimension are the row's places (or the only one)."""
        dim = max(0, of.dim() - 2)
        own = of.narrow(dim, self.start, self.last - self.start)
        first, last = self.before
        return torch.cat([of.narrow(dim, first, last - first), own], dim) if last > first else own


class Trees:
    """Parts one behind the other: a prompt sees what it is behind and what stands before it in the prompt, an answer all that and itself.

    With a `cache`, keys and values of the prompts that have a slot (and no answers then) are kept there, in the next free slots.
    """

    def __init__(self, parts: Sequence[Part], device: torch.device, cache: Cache | None = None) -> None:
        self.device, self.cache, self.parts = device, cache, parts
        self.starts, self.blocks, places, branches = [0], [], [], []
        kept: dict[int, int] = {}
        for part in parts:
            length = part.length + sum(part.answers)
            first, last = self.before(part)
            place = torch.arange(last - first, last - first + length)
            branch = torch.zeros(length, dtype=torch.int64)  # 0 is the prompt
            end = part.length
            for number, answer in enumerate(part.answers, start=1):
                branch[end : end + answer] = number
                place[end : end + answer] -= end - part.length
                end += answer
            # One answer alone is to its prompt what more prompt would be: its blocks need not be as wide as it is long.
            plain = length if len(part.answers) == 1 else part.length
            self.blocks += _blocks((first, last), self.starts[-1], plain, branch)
            self.starts.append(self.starts[-1] + length)
            places.append(place)
            branches.append(branch)
            if part.slot is not None:
                kept[part.slot] = last - first + part.length
        if cache:
            cache.lengths += [kept[slot] for slot in sorted(kept)]
        self.positions = torch.cat(places)  # [seq], where each token stands to its model
        self.branches = branches
        self.masks: list[torch.Tensor] = []  # of the blocks; the same for all layers
        self.batches: dict[int | None, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def before(self, part: Part) -> tuple[int, int]:
        """First and last place in the row of what a part is behind."""
        return (0, 0) if part.behind is None else (self.starts[part.behind], self.starts[part.behind + 1])

    def ends(self) -> list[int]:
        """Place of the last token of each prompt that has a slot, in the order of the slots."""
        found = {part.slot: start + part.length - 1 for part, start in zip(self.parts, self.starts, strict=False) if part.slot is not None}
        return [found[slot] for slot in sorted(found)]

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int | None
    ) -> torch.Tensor:
        """As `Plan` has it."""
        if self.cache:
            keys, values = self.cache.layer(layer, key)
            for part, (start, end) in zip(self.parts, itertools.pairwise(self.starts), strict=True):
                if part.slot is not None:
                    first, last = self.before(part)
                    for to, tensor in ((keys[part.slot], key), (values[part.slot], value)):
                        to[:, : last - first] = tensor[:, first:last]
                        to[:, last - first : last - first + end - start] = tensor[:, start:end]
        by_blocks = query.device.type == "cpu"
        return (self._by_blocks if by_blocks else self._padded)(query, key, value, scale, window)

    def _by_blocks(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int | None) -> torch.Tensor:
        """By plain matrix products: on CPUs several times as fast as torch's own attention with a mask.

        The heads that share a key stand one behind the other, so that keys and values are not repeated.
        """
        heads, seq, dim = query.shape
        out = query.new_empty(seq, heads, dim)
        if not self.masks:
            self.masks = [_added(block.hidden, query.dtype) for block in self.blocks]
        for block, mask in zip(self.blocks, self.masks, strict=True):
            q = query[:, block.first : block.last].reshape(len(key), -1, dim)  # [kv_heads, groups * rows, dim]
            k, v = block.keys(key), block.keys(value)
            rows, keys = block.last - block.first, k.shape[1]
            scores = torch.baddbmm(q.new_empty(1, 1, 1), q, k.transpose(1, 2), beta=0, alpha=scale)  # [kv_heads, groups * rows, keys]
            seen = scores.view(heads, rows, keys)
            seen[:, :, keys - mask.shape[1] :] += mask
            if window and keys > window:
                mine, theirs = self.positions[block.first : block.last], block.keys(self.positions)
                seen.masked_fill_(mine[:, None] - theirs >= window, -torch.inf)
            out[block.first : block.last] = torch.bmm(scores.softmax(-1), v).view(heads, rows, dim).transpose(0, 1)
        return out

    def _padded(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int | None) -> torch.Tensor:
        """By torch's own attention, the items side by side: few calls, which is what counts on a GPU."""
        index, mask, own = self._batch(window)
        q, k, v = (each[:, index].transpose(0, 1) for each in (query, key, value))  # [items, heads, longest, dim]
        groups = len(query) // len(key)
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)  # [items, longest, heads, dim]
        return out.flatten(0, 1)[own]

    def _batch(self, window: int | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Places in the row of what the parts are behind and of their own tokens [parts, longest], whom they see
        [parts, 1, longest, longest], and where their own tokens are among all of these [seq].
        """
        if window in self.batches:
            return self.batches[window]
        rows, kinds = [], []
        for part, start, branch in zip(self.parts, self.starts, self.branches, strict=False):
            first, last = self.before(part)
            rows.append(torch.cat([torch.arange(first, last), torch.arange(start, start + len(branch))]))
            kinds.append(torch.cat([branch.new_zeros(last - first), branch]))
        longest = max(map(len, rows))
        index = torch.zeros(len(rows), longest, dtype=torch.int64)
        mask = torch.eye(longest, dtype=torch.bool).repeat(len(rows), 1, 1)  # a filler sees itself: no row may be empty
        for number, (row, kind) in enumerate(zip(rows, kinds, strict=True)):
            index[number, : len(row)] = row
            seen = ~_hidden(kind, kind, 0)
            if window:
                places = self.positions[row]
                seen &= places[:, None] - places < window
            mask[number, : len(row), : len(row)] = seen
        own = [
            torch.arange(len(row) - len(branch), len(row)) + number * longest
            for number, (row, branch) in enumerate(zip(rows, self.branches, strict=True))
        ]
        self.batches[window] = index.to(self.device), mask[:, None].to(self.device), torch.cat(own).to(self.device)
        return self.batches[window]


class Step:
    """One more token for every slot of a cache that is taken."""

    def __init__(self, cache: Cache, device: torch.device) -> None:
        self.cache = cache
        self.positions = torch.tensor(cache.lengths)  # [taken]
        cache.lengths = [length + 1 for length in cache.lengths]
        self.width = max(cache.lengths)
        self.place = self.positions.to(device)
        self.slot = torch.arange(len(cache.lengths), device=device)
        self.masks: dict[int | None, torch.Tensor] = {}

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int | None
    ) -> torch.Tensor:
        """As `Plan` has it."""
        keys, values = self.cache.layer(layer, key)
        keys[self.slot, :, self.place], values[self.slot, :, self.place] = key.transpose(0, 1), value.transpose(0, 1)
        taken = len(self.slot)
        # The heads that share a key are as many queries of one head.
        q = query.transpose(0, 1).reshape(taken, len(key), -1, query.shape[-1])  # [taken, kv_heads, groups, dim]
        k, v = keys[:taken, :, : self.width], values[:taken, :, : self.width]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self._mask(window, q.dtype), scale=scale)
        return out.reshape(taken, len(query), -1)

    def _mask(self, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """What to add to the scores. [taken, 1, 1, width]"""
        if window not in self.masks:
            places = torch.arange(self.width, device=self.place.device)
            hidden = places > self.place[:, None]
            if window:
                hidden |= self.place[:, None] - places >= window
            self.masks[window] = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)[
                :, None, None
            ]
        return self.masks[window]


def _blocks(before: tuple[int, int], start: int, prompt: int, branch: torch.Tensor) -> list[_Block]:
    """The blocks of one part: those of the prompt (or what is as one), whose first places all see whole blocks before them, then those of the
    answers."""
    blocks = []
    for first in range(0, prompt, ROWS):
        last = min(first + ROWS, prompt)
        blocks.append(_Block(before, start, start + first, start + last, first, _above(last - first)))
    for first in range(prompt, len(branch), ROWS):
        last = min(first + ROWS, len(branch))
        hidden = _hidden(branch[first:last], branch[prompt:last], first - prompt)
        blocks.append(_Block(before, start, start + first, start + last, prompt, hidden))
    return blocks


def _hidden(queries: torch.Tensor, keys: torch.Tensor, ahead: int) -> torch.Tensor:
    """What queries do not see of keys, by their branches; `ahead` keys stand before the first query. bool [queries, keys]"""
    other = (keys != queries[:, None]) & (keys != 0)
    return other.logical_or_(torch.ones_like(other).triu_(ahead + 1))


def _added(hidden: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What to add to scores, so that `hidden` ones do not count: on CPUs far faster than to fill them in, or torch's attention to read them."""
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)


@functools.lru_cache(maxsize=ROWS)
def _above(rows: int) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.ones(rows, rows, dtype=torch.bool).triu_(1)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # [1, heads, seq, dim]
    key: torch.Tensor,  # [1, kv_heads, seq, dim]
    value: torch.Tensor,  # [1, kv_heads, seq, dim]
    attention_mask: torch.Tensor | None,
    *,
    plan: Plan | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as `plan` has it, masks not looked at; without a plan, transformers' own."""
    if plan is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)  # type: ignore[no-any-return]
    require_plain(module, kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return plan.attend(module.layer_idx, query[0], key[0], value[0], scale, sliding_window)[None], None  # type: ignore[arg-type]


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)
