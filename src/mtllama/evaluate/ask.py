"""A model is asked about items: how likely is each choice, and what is the answer. Raw records, which protocols judge."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from mtllama.errors import UserError
from mtllama.evaluate.items import Item
from mtllama.evaluate.protocols import Kind, Record
from mtllama.model.engine import DAMAGED, Answering, Branches, BrokenLogitsError

_TOGETHER = 16
"""Choices that stand behind one empty prompt in a forward pass: the mask grows with the square of their tokens."""


def ask(
    kind: Kind, engine: Answering, items: Sequence[Item], *, unconditional: bool = False, advance: Callable[[int], None] = lambda n: None
) -> list[Record]:
    """The raw records of items, in their order; a function of these items alone, whatever is asked before or after.

    `score`: the log-probabilities (nat) of every token of every choice and its end marker, and (`unconditional`) those that they
    have after the format's empty prompt. `generate`: the greedy text, to the end marker, a stop string of the items' task or its limit.
    """
    return _score(engine, items, unconditional, advance) if kind == "score" else _generate(engine, items, advance)


def boundary(engine: Answering) -> dict[str, Any]:
    """How prompt and answer meet, as ids: what was put before, between and behind them."""
    encoder = engine.encoder
    return {
        "bos_ids": list(encoder.bos_ids),
        "end_ids": list(encoder.end_ids),
        "blank": "before the answer's ids" if encoder.dummy_prefix or encoder.format.native else "first character of the answer",
        "tokenised": "prompt and answer apart",
        "empty_prompt_ids": _prompt(engine, "", room=0)[0],
        "max_length": encoder.max_length,
    }


def _score(engine: Answering, items: Sequence[Item], unconditional: bool, advance: Callable[[int], None]) -> list[Record]:
    choice_ids = {choice: engine.encoder.answer_ids(choice) for item in items for choice in item.choices or ()}
    records = []
    for item in items:
        assert item.choices is not None
        ids = [choice_ids[choice] for choice in item.choices]
        records.append(_record("score", engine, item, room=max(map(len, ids))) | {"choice_ids": ids, "unconditional": None})
    scores = engine.score([Branches(record["prompt_ids"], record["choice_ids"]) for record in records], advance)
    alone = _unconditional(engine, choice_ids) if unconditional else {}
    for record, found in zip(records, scores, strict=True):
        record["logprobs"] = found
        if alone:
            record["unconditional"] = [alone[choice] for choice in record["choices"]]
        _require_numbers(engine, record)
    return records


def _require_numbers(engine: Answering, record: Record) -> None:
    """Refuse log-probabilities that are not finite: among them some choice would be the largest all the same, mostly the first one."""
    for tokens in (*record["logprobs"], *(record["unconditional"] or ())):
        for value in tokens:
            if not math.isfinite(value):
                raise UserError(
                    f"{record['task']}/{record['item_id']}: {engine.describe()['name']} gives a token the log-probability {value}: {DAMAGED}"
                )


def _unconditional(engine: Answering, choice_ids: dict[str, list[int]]) -> dict[str, list[float]]:
    """Each distinct choice after the format's empty prompt."""
    choices = sorted(choice_ids, key=lambda choice: (len(choice_ids[choice]), choice))
    groups = [choices[start : start + _TOGETHER] for start in range(0, len(choices), _TOGETHER)]
    prompt, _ = _prompt(engine, "", room=0)
    scores = engine.score([Branches(prompt, [choice_ids[choice] for choice in group]) for group in groups])
    return {choice: found for group, each in zip(groups, scores, strict=True) for choice, found in zip(group, each, strict=True)}


def _generate(engine: Answering, items: Sequence[Item], advance: Callable[[int], None]) -> list[Record]:
    ((limit, stop),) = {(item.max_new_tokens, item.stop) for item in items}  # items of one task, or of tasks that are alike
    if engine.encoder.format.end is not None and engine.encoder.format.end not in stop:
        stop = (*stop, engine.encoder.format.end)  # the model was taught that its answers end so
    records = [_record("generate", engine, item, room=limit) for item in items]
    prompts = [record["prompt_ids"] for record in records]
    try:
        found = engine.answer(prompts, max_new_tokens=limit, stop=stop, advance=advance)
    except BrokenLogitsError as error:
        raise UserError(f"{items[error.number].task}/{items[error.number].item_id}: {error}") from None
    return [record | {"text": said.text, "at_limit": said.at_limit} for record, said in zip(records, found, strict=True)]


def _record(kind: Kind, engine: Answering, item: Item, room: int) -> Record:
    prompt_ids, cut = _prompt(engine, item.inputs, room)
    return {
        "task": item.task,
        "template": item.template,
        "item_id": item.item_id,
        "row": item.row,
        "kind": kind,
        "sha256": item.sha256,
        "metrics": list(item.metrics),
        "prompt": engine.tokenizer.decode(prompt_ids) if cut else engine.encoder.prompt_text(item.inputs),
        "prompt_ids": prompt_ids,
        "cut": cut,
        "choices": list(item.choices) if item.choices else None,
        "gold": item.target,
        "gold_index": item.gold,
        "references": list(item.references),
    }


def _prompt(engine: Answering, inputs: str, room: int) -> tuple[list[int], bool]:
    """Ids of a prompt, and whether it was cut. One without any id gets BOS, or EOS where there is no BOS: something to predict from."""
    ids, cut = engine.encoder.prompt_ids(inputs, room=room)
    if not ids:
        bos = engine.tokenizer.bos_token_id
        ids = [engine.tokenizer.eos_token_id if bos is None else bos]
    return ids, cut
