"""A loaded model asked two things: how likely is each of these answers, and what do you answer.

Answers to one prompt share its computation: the prompt stands once, all answers behind it as branches of a tree in
the same forward pass, each seeing the prompt and itself only. That is exact, not an approximation.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mtllama.data.prompt import PromptEncoder
from mtllama.model.load import LoadedModel

TOKENS_PER_PASS = 2048
"""Tokens in one forward pass, padding included: enough to keep two cores or a GPU busy, small in memory."""
ROWS_PER_CHUNK = 256
"""Rows multiplied with the head at a time."""
ROWS_PER_GENERATION = 32
"""Prompts continued together."""


@dataclass(frozen=True)
class Branches:
    """One prompt and the answers to score behind it, as ids (answers with their end marker)."""

    prompt: list[int]
    answers: list[list[int]]

    def __len__(self) -> int:
        # The last token of an answer is predicted but never read.
        return len(self.prompt) + sum(len(answer) - 1 for answer in self.answers)


class Engine:
    """Scoring and greedy generation over a model. Everything is computed under `torch.inference_mode`."""

    def __init__(self, loaded: LoadedModel) -> None:
        from transformers import GenerationConfig

        self.loaded = loaded
        self.model, self.tokenizer = loaded.model.eval(), loaded.tokenizer
        # A folder's own penalties and stop strings would get into `generate`; greedy means the most likely token here.
        self.model.generation_config = GenerationConfig()
        self.device = next(self.model.parameters()).device
        self.encoder = PromptEncoder(loaded.tokenizer, loaded.format, loaded.max_length)

    @torch.inference_mode()
    def score(self, items: Sequence[Branches], advance: Callable[[int], None] = lambda n: None) -> list[list[list[float]]]:
        """Log-probabilities (nat) of every token of every answer: item -> answer -> token.

        Items are grouped by length, so the order of `items` does not matter to speed; the result is in their order.
        """
        results: list[list[list[float]]] = [[] for _ in items]
        for group in _groups([len(item) for item in items], TOKENS_PER_PASS):
            for i, scores in zip(group, self._score_pass([items[i] for i in group]), strict=True):
                results[i] = scores
            advance(len(group))
        return results

    def _score_pass(self, items: Sequence[Branches]) -> list[list[list[float]]]:
        width = max(len(item) for item in items)
        ids = torch.zeros(len(items), width, dtype=torch.int64)
        positions = torch.zeros(len(items), width, dtype=torch.int64)
        # A padded place sees itself, so that no row of the mask is empty (its softmax would be NaN).
        mask = torch.eye(width, dtype=torch.bool).repeat(len(items), 1, 1)  # [batch, query, key]
        rows: list[int] = []  # flat places whose next token is scored
        wanted: list[int] = []
        for r, item in enumerate(items):
            start = len(item.prompt)
            ids[r, :start] = torch.tensor(item.prompt)
            positions[r, :start] = torch.arange(start)
            mask[r, :start, :start] = torch.ones(start, start, dtype=torch.bool).tril()
            place = start
            for answer in item.answers:
                fed = len(answer) - 1
                end = place + fed
                ids[r, place:end] = torch.tensor(answer[:-1], dtype=torch.int64)
                positions[r, place:end] = torch.arange(start, start + fed)
                mask[r, place:end, :start] = True
                mask[r, place:end, place:end] = torch.ones(fed, fed, dtype=torch.bool).tril()
                rows += [r * width + start - 1] + [r * width + p for p in range(place, end)]
                wanted += answer
                place = end
        hidden = self.model.get_decoder()(
            input_ids=ids.to(self.device),
            position_ids=positions.to(self.device),
            attention_mask=mask[:, None].to(self.device),
            use_cache=False,
        ).last_hidden_state  # [batch, seq, hidden]
        log_probs = self._log_probs(hidden.flatten(0, 1)[torch.tensor(rows, device=self.device)], torch.tensor(wanted, device=self.device))
        flat = iter(log_probs.tolist())
        return [[[next(flat) for _ in answer] for answer in item.answers] for item in items]

    def _log_probs(self, hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Log-probability of `tokens` [n] after `hidden` [n, hidden], in chunks so that logits stay small."""
        head = self.model.get_output_embeddings()
        parts = []
        for start in range(0, len(tokens), ROWS_PER_CHUNK):
            wanted = tokens[start : start + ROWS_PER_CHUNK]
            logits = head(hidden[start : start + ROWS_PER_CHUNK]).float()  # [chunk, vocab]
            parts.append(logits.gather(1, wanted[:, None]).squeeze(1) - logits.logsumexp(dim=1))
        return torch.cat(parts)

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
        texts = [""] * len(prompts)
        for group in _groups([len(prompt) for prompt in prompts], TOKENS_PER_PASS * 2, ROWS_PER_GENERATION):
            for i, text in zip(group, self._generate_pass([prompts[i] for i in group], max_new_tokens, stop), strict=True):
                texts[i] = text
            advance(len(group))
        return texts

    def _generate_pass(self, prompts: Sequence[list[int]], max_new_tokens: int, stop: Sequence[str]) -> list[str]:
        from transformers import GenerationConfig, StoppingCriteriaList

        width = max(len(prompt) for prompt in prompts)
        pad = self.tokenizer.eos_token_id
        ids = torch.full((len(prompts), width), pad, dtype=torch.int64)
        attention = torch.zeros(len(prompts), width, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            attention[row, width - len(prompt) :] = 1

        def stopped(generated: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            tails = self.tokenizer.batch_decode(generated[:, width:], skip_special_tokens=True)
            return torch.tensor([any(s in tail.lstrip() for s in stop) for tail in tails], device=generated.device)

        generated = self.model.generate(
            input_ids=ids.to(self.device),
            attention_mask=attention.to(self.device),
            generation_config=GenerationConfig(
                max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad, eos_token_id=self.tokenizer.eos_token_id
            ),
            stopping_criteria=StoppingCriteriaList([stopped]) if stop else None,
        )
        return [self._text(row, stop) for row in generated[:, width:].tolist()]

    def _text(self, ids: list[int], stop: Sequence[str]) -> str:
        if self.tokenizer.eos_token_id in ids:
            ids = ids[: ids.index(self.tokenizer.eos_token_id)]
        text = self._whole(ids).strip()
        ends = [text.index(s) for s in stop if s in text]
        return text[: min(ends)].strip() if ends else text

    @torch.inference_mode()
    def stream(
        self, prompt: list[int], *, max_new_tokens: int = 256, temperature: float = 0.0, stop: Sequence[str] = (), seed: int = 0
    ) -> Iterator[str]:
        """Pieces of text as they are generated; a character is never split, a stop string never shown."""
        generator = torch.Generator(device=self.device).manual_seed(seed)
        ids = torch.tensor([prompt], device=self.device)
        cache, new, shown = None, [], ""
        for _ in range(max_new_tokens):
            out = self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, logits = out.past_key_values, out.logits[0, -1].float()
            if temperature > 0:
                token = int(torch.multinomial((logits / temperature).softmax(0), 1, generator=generator))
            else:
                token = int(logits.argmax())
            if token == self.tokenizer.eos_token_id:
                break
            new.append(token)
            ids = torch.tensor([[token]], device=self.device)
            text = self.tokenizer.decode(new, skip_special_tokens=True).lstrip()
            ended = [text.index(s) for s in stop if s in text]
            if ended:
                text = text[: min(ended)]
            if not ended and text.endswith("\N{REPLACEMENT CHARACTER}"):  # the first bytes of a character that is not whole yet
                continue
            held = 0 if ended else max((n for s in stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
            safe = text[: len(text) - held]
            if len(safe) > len(shown):
                yield safe[len(shown) :]
                shown = safe
            if ended:
                return
        text = self._whole(new).lstrip()
        if len(text) > len(shown):
            yield text[len(shown) :]

    def _whole(self, ids: list[int]) -> str:
        """The text of ids, without the first bytes of a character that the limit cut off."""
        # SentencePiece tokenizers spoil the whole characters before a broken one too, so ids are dropped as well as bytes.
        texts = [self.tokenizer.decode(ids[: len(ids) - n], skip_special_tokens=True) for n in range(min(4, len(ids)))]
        return max((text.rstrip("\N{REPLACEMENT CHARACTER}") for text in texts), key=len, default="")


def _groups(lengths: Sequence[int], max_tokens: int, max_rows: int = 1 << 30) -> Iterator[list[int]]:
    """Indices in groups of like length, longest first, each within the budget of padded tokens."""
    group: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if group and ((len(group) + 1) * lengths[group[0]] > max_tokens or len(group) >= max_rows):
            yield group
            group = []
        group.append(i)
    if group:
        yield group
