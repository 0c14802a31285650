"""One item under every protocol, as text: what the model read, what it gave each choice, what it said, who takes what for the answer."""

from collections.abc import Sequence

from mtllama.errors import UserError
from mtllama.evaluate import original, protocols
from mtllama.evaluate.ask import ask
from mtllama.evaluate.items import Item, TaskItems
from mtllama.evaluate.protocols import Judgement, Record
from mtllama.model.engine import Answering


def find_items(tasks: Sequence[TaskItems], name: str) -> list[Item]:
    """The renderings of the row called `TASK/ITEM`, where ITEM is its id, or else its number in the file."""
    task, slash, wanted = name.partition("/")
    if not slash or not wanted:
        raise UserError(f"--explain is {name!r}; give TASK/ITEM, such as copa/7")
    items = next((each.items for each in tasks if each.task.name == task), [])
    found = [item for item in items if item.item_id == wanted] or [item for item in items if str(item.row) == wanted]
    if not found:
        known = ", ".join(dict.fromkeys(item.item_id for item in items[:3]))
        raise UserError(f"{task} has no item {wanted!r}; it has {len({item.row for item in items})}: {known}, ...")
    return found


def explain(engine: Answering, item: Item) -> str:
    """The item under every protocol that says something about it."""
    records: list[Record] = [ask("score", engine, [item], unconditional=True)[0]] if item.choices else []
    records += ask("generate", engine, [item])
    verdicts = [(record, protocol, protocols.judge(record, protocol)) for record in records for protocol in protocols.of_record(record)]
    first = records[0]
    cut = ", its middle cut out to fit" if first["cut"] else ""
    lines = [f"{item.task}/{item.item_id} (row {item.row}, template {item.template}, format {engine.encoder.format.name})", ""]
    lines += [f"prompt as the model reads it, {len(first['prompt_ids'])} ids{cut}:"]
    shown = engine.tokenizer.decode(first["prompt_ids"])
    lines += [f"  | {line}" for line in shown.split("\n")]
    lines += [f"gold: {' / '.join(item.references) if item.gold is None else _named(first, item.gold)}", ""]
    if item.choices:
        lines += _choices(engine, first)
    lines += [f"generated: {records[-1]['text']!r}", "", "protocol       verdict"]
    for record, protocol, judged in verdicts:
        right = "right" if judged.correct else "wrong"
        said = _named(record, judged.predicted) if judged.predicted is not None else repr(judged.prediction)
        values = "" if "accuracy" in judged.values else "".join(f", {name} {100 * value:.1f}" for name, value in judged.values.items())
        lines.append(f"{protocol:<13}  {right}{values}: {said}, since {_reason(record, protocol, judged)}")
    return "\n".join([*lines, "", _difference(verdicts)])


def _choices(engine: Answering, record: Record) -> list[str]:
    lines = []
    for place in range(len(record["choices"])):
        lines.append(f"choice {_named(record, place)}{' [gold]' if place == record['gold_index'] else ''}")
        tokens = [engine.tokenizer.decode([token]) for token in record["choice_ids"][place]]
        for label, key in (("given the prompt", "logprobs"), ("after an empty prompt", "unconditional")):
            parts = " ".join(f"{token!r} {nats:.2f}" for token, nats in zip(tokens, record[key][place], strict=True))
            lines.append(f"  {label}: {sum(record[key][place]):.2f} = {parts}")
    return [*lines, ""]


def _named(record: Record, place: int) -> str:
    return f"({chr(ord('A') + place)}) {record['choices'][place]}"


def _reason(record: Record, protocol: str, judged: Judgement) -> str:
    if judged.scores is not None:
        best = judged.predicted or 0
        rest = sorted((score for place, score in enumerate(judged.scores) if place != best), reverse=True)
        what = {
            "rank": "its sum is the largest",
            "rank-mean": f"over its {len(record['logprobs'][best])} tokens it is the most likely",
            "rank-char": f"over its {len(record['choices'][best])} characters it is the most likely",
            "rank-byte": f"over its {len(record['choices'][best].encode())} bytes it is the most likely",
            protocols.PMI: "the prompt adds most to it",
        }[protocol]
        return f"{what} ({judged.scores[best]:.3f}{f', the next {rest[0]:.3f}' if rest else ''})"
    if protocol == protocols.GENERATE:
        if record["choices"] is None:
            return "this is what was generated" if judged.prediction else "nothing was generated"
        return "the text is none of the choices, word for word" if judged.unparsed else "the text is this choice, word for word"
    if record["choices"] is None:
        return "the text says None, which counts as no answer" if judged.not_found else "the text is taken as it is"
    if judged.not_found:
        return "none of its words is in the text, so it falls through to its first class"
    mended = protocol == protocols.MENDED
    _, found = original.choose(record["task"], record["template"], record["text"], record["choices"], mended=mended)
    if found in record["choices"]:
        return "of the two its letters are nearest to the text's, or it is the first of equals"
    return f"{found!r} is the first of its words in the text"


def _difference(verdicts: Sequence[tuple[Record, str, Judgement]]) -> str:
    """One sentence: who differs from the first protocol, and why."""
    groups: dict[str, list[tuple[Record, str, Judgement]]] = {}
    for record, protocol, judged in verdicts:
        said = _named(record, judged.predicted) if judged.predicted is not None else f"no choice ({judged.prediction!r})"
        if record["choices"] is None:
            said = repr(judged.prediction)
        groups.setdefault(said, []).append((record, protocol, judged))
    if len(groups) == 1:
        return f"All {len(verdicts)} protocols take {next(iter(groups))} for the answer."
    parts = [
        f"{', '.join(protocol for _, protocol, _ in group)} {'take' if len(group) > 1 else 'takes'} {said}, since {_reason(*group[0])}"
        for said, group in groups.items()
    ]
    return f"They differ: {'; '.join(parts)}."
