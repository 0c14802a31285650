"""A loaded model asked two things: how likely is each of these answers, and what do you answer.

Answers to one prompt share its computation: the prompt stands once, all answers behind it as branches of a tree in
the same forward pass, each seeing the prompt and itself only. Prompts that begin alike share their beginning in the same way
(`model/families.py`). That is exact, not an approximation. Items stand one behind the other in one row, so nothing is computed
for padding (`model/packed.py`); a row of generation that has ended gives its slot to the next prompt.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch

from mtllama.data.prompt import PromptEncoder
from mtllama.errors import UserError
from mtllama.model.families import Family, beyond, families, passes
from mtllama.model.fused import fuse
from mtllama.model.generation import Generation, Settings
from mtllama.model.load import LoadedModel
from mtllama.model.packed import PACKED, Cache, Part, Step, Trees

TOKENS_PER_PASS = 1024
"""Tokens in one forward pass: enough to keep two cores or a GPU busy, small in memory."""
ROWS_PER_CHUNK = 128
"""Rows multiplied with the head at a time."""
ROWS_PER_GENERATION = 64
"""Prompts continued together."""
CACHE_BYTES = 2**28
"""Memory of a CPU for the keys and values of prompts that are continued together; one prompt may take more."""
CACHE_SHARE = 8
"""One part in so many of a GPU's memory is for them there."""
REFILL = 8
"""Slots are filled again when one in so many is free: then a pass has prompts enough to be worth it."""
DAMAGED = "its weights are damaged, or too large for the dtype; try --dtype float32, or another model"
"""Why a model would give no numbers."""


@dataclass(frozen=True)
class Branches:
    """One prompt and the answers to score behind it, as ids (answers with their end marker)."""

    prompt: list[int]
    answers: list[list[int]]

    def __len__(self) -> int:
        # The last token of an answer is predicted but never read.
        return len(self.prompt) + sum(len(answer) - 1 for answer in self.answers)


@dataclass(frozen=True)
class Scored:
    """An answer's log-probabilities (nat), token by token, and whether each token was the likeliest in its place."""

    log_probs: list[float]
    greedy: bool
    top: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    """The likeliest tokens in each place, and their log-probabilities (nat), where they were asked for."""


class Said(NamedTuple):
    """A generated answer."""

    text: str
    at_limit: bool
    """Whether it ended at the limit of its tokens, and at neither its end marker nor a stop string."""


class BrokenLogitsError(UserError):
    """A prompt is continued by logits that are no numbers: the likeliest of them would be as good as any."""

    def __init__(self, model: str, number: int) -> None:
        super().__init__(f"{model} gives logits that are no numbers (NaN): {DAMAGED}")
        self.number = number
        """Which of the prompts."""


class Answering(Protocol):
    """What an evaluation needs of a model, wherever it runs: an `Engine` here, or a server (`evaluate/endpoint.py`)."""

    @property
    def tokenizer(self) -> Any:
        """Of the model, as transformers has it."""

    @property
    def encoder(self) -> PromptEncoder:
        """Text to ids and back, in the format of the evaluation."""

    def describe(self) -> dict[str, Any]:
        """Facts for results: which model, and the dtype that it computes in."""

    def score(self, items: Sequence[Branches], advance: Callable[[int], None] = ...) -> list[list[list[float]]]:
        """Log-probabilities (nat) of every token of every answer: item -> answer -> token."""

    def answer(
        self, prompts: Sequence[list[int]], *, max_new_tokens: int = ..., stop: Sequence[str] = ..., advance: Callable[[int], None] = ...
    ) -> list[Said]:
        """Greedy continuations of prompt ids, each cut before its first stop string or end marker."""


@dataclass
class _Row:
    """A prompt that is being continued: its number, and what has been said so far."""

    number: int
    new: list[int] = field(default_factory=list)


class Engine:
    """Scoring and greedy generation over a model. Everything is computed under `torch.inference_mode`."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded = loaded
        self.model, self.tokenizer = loaded.model.eval(), loaded.tokenizer
        self.model.set_attn_implementation(PACKED)
        self.decoder, self.head = self.model.get_decoder(), self.model.get_output_embeddings()
        fuse(self.decoder, loaded.dtype)
        self.device = next(self.model.parameters()).device
        # Whoever gives a mask of four dimensions has no other made; the plan says who sees whom.
        self._no_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.device)
        self.encoder = PromptEncoder(loaded.tokenizer, loaded.format, loaded.max_length)
        self.ends = loaded.end_ids()

    def describe(self) -> dict[str, Any]:
        """Facts for results: which model, and the dtype that it computes in."""
        return {**self.loaded.describe(), "dtype": str(self.loaded.dtype).removeprefix("torch.")}

    def score(self, items: Sequence[Branches], advance: Callable[[int], None] = lambda n: None) -> list[list[list[float]]]:
        """Log-probabilities (nat) of every token of every answer: item -> answer -> token.

        An answer has at least one token, and so has a prompt. The order of `items` does not matter to speed; the result is in it.
        """
        return [[answer.log_probs for answer in item] for item in self.judge(items, advance)]

    @torch.inference_mode()
    def judge(self, items: Sequence[Branches], advance: Callable[[int], None] = lambda n: None, *, top: int = 0) -> list[list[Scored]]:
        """What `score` gives, whether greedy text would have been the answer, and the `top` likeliest tokens in its places: item -> answer."""
        results: list[list[Scored]] = [[] for _ in items]
        for group in passes(families([item.prompt for item in items]), [len(item) for item in items], TOKENS_PER_PASS):
            for i, scores in self._score_pass(items, group, top):
                results[i] = scores
            advance(sum(len(family.members) for family in group))
        return results

    def _score_pass(self, items: Sequence[Branches], group: Sequence[Family], top: int) -> Iterator[tuple[int, list[Scored]]]:
        """The numbers of the items of some families, and the scores of their answers."""
        ids: list[int] = []
        parts: list[Part] = []
        rows: list[int] = []  # places whose next token is scored
        wanted: list[int] = []
        row_of: list[int] = []  # for each of `wanted`, which of `rows` it is read from
        for family in group:
            before = _shared_part(family, items[family.members[0]].prompt, ids, parts)
            for i in family.members:
                prompt, answers = items[i].prompt[family.shared :], items[i].answers
                ids += prompt
                parts.append(Part(len(prompt), [len(answer) - 1 for answer in answers], before))
                prompt_row = len(rows)
                rows.append(len(ids) - 1)
                for answer in answers:
                    row_of += [prompt_row, *range(len(rows), len(rows) + len(answer) - 1)]
                    rows += range(len(ids), len(ids) + len(answer) - 1)
                    ids += answer[:-1]
                    wanted += answer
        log_probs, likeliest, tops = self._log_probs(self._hidden(ids, Trees(parts, self.device)), rows, row_of, wanted, top)
        first = 0
        for i in itertools.chain.from_iterable(family.members for family in group):
            ends = list(itertools.accumulate(map(len, items[i].answers), initial=first))
            yield i, [Scored(log_probs[a:b], all(likeliest[a:b]), tops[a:b]) for a, b in itertools.pairwise(ends)]
            first = ends[-1]

    def _hidden(self, ids: Sequence[int], plan: Trees | Step) -> torch.Tensor:
        """What the model makes of one packed row. [seq, hidden]"""
        hidden: torch.Tensor = self.decoder(
            input_ids=torch.tensor([ids], device=self.device),
            position_ids=plan.positions[None].to(self.device),
            attention_mask=self._no_mask,
            use_cache=False,
            plan=plan,
        ).last_hidden_state[0]
        return hidden

    def _log_probs(
        self, hidden: torch.Tensor, rows: Sequence[int], row_of: Sequence[int], wanted: Sequence[int], top: int
    ) -> tuple[list[float], list[bool], list[tuple[tuple[int, float], ...]]]:
        """Log-probability of each of `wanted` behind row `rows[row_of]` of `hidden`, whether none is likelier, and the `top` likeliest ones;
        in chunks, so that logits stay small.
        """
        places, tokens, sources = (torch.tensor(each, device=self.device) for each in (rows, wanted, row_of))
        found = torch.empty(len(wanted), device=self.device)
        likeliest = torch.empty(len(wanted), dtype=torch.bool, device=self.device)
        best = torch.empty(len(rows), top, device=self.device)
        best_tokens = torch.empty(len(rows), top, dtype=torch.int64, device=self.device)
        for start in range(0, len(rows), ROWS_PER_CHUNK):
            logits = self.head(hidden[places[start : start + ROWS_PER_CHUNK]]).float()  # [chunk, vocab]
            here = ((sources >= start) & (sources < start + ROWS_PER_CHUNK)).nonzero().squeeze(1)
            source = sources[here] - start
            totals = logits.logsumexp(dim=1)
            found[here] = logits[source, tokens[here]] - totals[source]
            likeliest[here] = logits.argmax(dim=1)[source] == tokens[here]
            if top:
                values, best_tokens[start : start + ROWS_PER_CHUNK] = logits.topk(top, dim=1)
                best[start : start + ROWS_PER_CHUNK] = values - totals[:, None]
        pairs = [tuple(zip(*each, strict=True)) for each in zip(best_tokens.tolist(), best.tolist(), strict=True)] if top else []
        return found.tolist(), likeliest.tolist(), [pairs[row] for row in row_of] if top else []

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[list[int]],
        *,
        max_new_tokens: int = 64,
        stop: Sequence[str] = ("\n",),
        advance: Callable[[int], None] = lambda n: None,
    ) -> list[str]:
        """Greedy continuations of prompt ids, each cut before its first stop string or end marker.

        Blanks and line breaks before the first word do not count as a stop.
        """
        return [said.text for said in self.answer(prompts, max_new_tokens=max_new_tokens, stop=stop, advance=advance)]

    def answer(
        self,
        prompts: Sequence[list[int]],
        *,
        max_new_tokens: int = 64,
        stop: Sequence[str] = ("\n",),
        advance: Callable[[int], None] = lambda n: None,
    ) -> list[Said]:
        """What `generate` gives, and whether the limit ended it."""
        found = self.continue_ids(prompts, max_new_tokens=max_new_tokens, ended=lambda new: self._stopped(new, stop), advance=advance)
        return [
            Said(self._text(ids, stop), len(ids) >= max_new_tokens and ids[-1] not in self.ends and not self._stopped(ids, stop))
            for ids in found
        ]

    @torch.inference_mode()
    def continue_ids(
        self,
        prompts: Sequence[list[int]],
        *,
        max_new_tokens: int,
        ended: Callable[[list[int]], bool] = lambda new: False,
        advance: Callable[[int], None] = lambda n: None,
    ) -> list[list[int]]:
        """Greedy continuations as ids: each to its end marker, to where `ended` says so of its ids, or to the limit."""
        found: list[list[int]] = [[] for _ in prompts]
        places = self._cache_bytes() // self.bytes_per_place()
        # Longest first, families together.
        largest_first = sorted(families(prompts), key=lambda family: -max(len(prompts[i]) for i in family.members))
        waiting = [i for family in largest_first for i in family.members]
        while waiting:
            width = max(len(prompts[i]) for i in waiting) + max_new_tokens
            room, slots = max(1, places // width), min(ROWS_PER_GENERATION, len(waiting))
            # Where memory does not allow as many slots as are wanted, prompts of half the length get their own, and more of them.
            alike = [i for i in waiting if room >= slots or 2 * (len(prompts[i]) + max_new_tokens) > width]
            self._continue(prompts, alike, Cache(min(room, slots), width), max_new_tokens, ended, found, advance)
            done = set(alike)
            waiting = [i for i in waiting if i not in done]
        return found

    def _cache_bytes(self) -> int:
        # Of all memory, not of what is free: what is computed together must not depend on who else is there.
        return torch.cuda.get_device_properties(self.device).total_memory // CACHE_SHARE if self.device.type == "cuda" else CACHE_BYTES

    def bytes_per_place(self) -> int:
        """Bytes that the keys and values of one token take, in all layers."""
        config = self.model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return int(2 * config.num_hidden_layers * heads * dim * self.loaded.dtype.itemsize)

    def _continue(
        self,
        prompts: Sequence[list[int]],
        order: Sequence[int],
        cache: Cache,
        max_new_tokens: int,
        ended: Callable[[list[int]], bool],
        found: list[list[int]],
        advance: Callable[[int], None],
    ) -> None:
        """Fill in what is `found` for the prompts in `order`."""
        waiting, taken = list(reversed(order)), list[_Row]()  # in the order of the cache's slots
        while waiting or taken:
            free = cache.slots - len(taken)
            if waiting and free * REFILL >= cache.slots:
                new = [_Row(waiting.pop())]
                tokens = len(prompts[new[0].number])
                while waiting and len(new) < free:
                    tokens += beyond(prompts[new[-1].number], prompts[waiting[-1]])
                    if tokens > TOKENS_PER_PASS:
                        break
                    new.append(_Row(waiting.pop()))
                logits = self.begin([prompts[row.number] for row in new], cache)
                taken += new
            else:
                new = taken
                logits = self.step([row.new[-1] for row in taken], cache)
            for row, token in zip(new, self.likeliest(logits), strict=True):
                if token is None:
                    raise BrokenLogitsError(self.loaded.source.name, row.number)
                row.new.append(token)
            done = 0
            for slot in reversed(range(len(taken) - len(new), len(taken))):  # from behind: those that move have been looked at
                row = taken[slot]
                if row.new[-1] in self.ends or len(row.new) >= max_new_tokens or ended(row.new):
                    found[row.number] = row.new
                    taken[slot] = taken[cache.leave(slot)]
                    taken.pop()
                    done += 1
            if done:
                advance(done)

    def begin(self, prompts: Sequence[list[int]], cache: Cache) -> torch.Tensor:
        """Read prompts into free slots; logits of what comes next. [prompts, vocab]"""
        ids: list[int] = []
        parts: list[Part] = []
        for family in families(prompts):
            before = _shared_part(family, prompts[family.members[0]], ids, parts)
            for i in family.members:
                ids += prompts[i][family.shared :]
                parts.append(Part(len(prompts[i]) - family.shared, behind=before, slot=len(cache.lengths) + i))
        plan = Trees(parts, self.device, cache)
        logits: torch.Tensor = self.head(self._hidden(ids, plan)[torch.tensor(plan.ends(), device=self.device)])
        return logits

    def step(self, tokens: Sequence[int], cache: Cache) -> torch.Tensor:
        """Go on by one token in every slot that is taken. [slots, vocab]"""
        logits: torch.Tensor = self.head(self._hidden(tokens, Step(cache, self.device)))
        return logits

    def likeliest(self, logits: torch.Tensor) -> list[int | None]:
        """The likeliest token by each row of logits [rows, vocab]; None where some of the row are no numbers (NaN)."""
        values, tokens = logits.max(-1)  # NaN is larger than any number to it
        return [None if nan else token for token, nan in zip(tokens.tolist(), values.isnan().tolist(), strict=True)]

    def _stopped(self, new: list[int], stop: Sequence[str]) -> bool:
        text = self.tokenizer.decode(new, skip_special_tokens=True).lstrip() if stop else ""
        return any(s in text for s in stop)

    def _text(self, ids: list[int], stop: Sequence[str]) -> str:
        ids = list(itertools.takewhile(lambda token: token not in self.ends, ids))
        return before_stop(self._whole(ids), stop)

    def generation(self, prompt: Sequence[int], settings: Settings) -> Generation:
        """A continuation of a prompt, to be given the logits of each place."""
        return Generation(self.tokenizer, settings, self.ends, prompt)

    @torch.inference_mode()
    def stream(self, prompt: list[int], settings: Settings) -> Iterator[str]:
        """Pieces of text as they are generated; a character is never split, a stop string never shown."""
        generation = self.generation(prompt, settings)
        cache = Cache(1, len(prompt) + settings.max_new_tokens)
        while generation.reason is None:
            logits = self.step(generation.ids[-1:], cache) if generation.ids else self.begin([prompt], cache)  # [1, vocab]
            (token,) = self.likeliest(logits)
            if token is None:
                raise BrokenLogitsError(self.loaded.source.name, 0)
            if piece := generation.take(logits[0], token):
                yield piece

    def _whole(self, ids: list[int]) -> str:
        """The text of ids, without the first bytes of a character that the limit cut off."""
        # SentencePiece tokenizers spoil the whole characters before a broken one too, so ids are dropped as well as bytes.
        texts = [self.tokenizer.decode(ids[: len(ids) - n], skip_special_tokens=True) for n in range(min(4, len(ids)))]
        return max((text.rstrip("\N{REPLACEMENT CHARACTER}") for text in texts), key=len, default="")


def before_stop(text: str, stop: Sequence[str]) -> str:
    """What stands before the first stop string; blanks and line breaks before the first word do not count as one."""
    text = text.strip()
    ends = [text.index(each) for each in stop if each in text]
    return text[: min(ends)].strip() if ends else text


def _shared_part(family: Family, prompt: list[int], ids: list[int], parts: list[Part]) -> int | None:
    """Lay out what the members of a family have in common; returns the number of its part, if there is one."""
    if not family.shared:
        return None
    ids += prompt[: family.shared]
    parts.append(Part(family.shared))
    return len(parts) - 1
