"""The examples of a step: drawn from the mixture by their places in it, encoded, and dealt out to the ranks.

Every rank draws and encodes its part, then all are dealt out so that each rank has about as many tokens: the places, and with them
what a step trains on, are a function of the step alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mtllama.data.batching import deal
from mtllama.data.mixture import Mixture
from mtllama.data.prompt import Encoded, PromptEncoder
from mtllama.train.parallel import Ranks
from mtllama.train.recipe import TrainConfig


@dataclass
class Totals:
    """Counts over the run so far; they travel with the checkpoints."""

    examples: int = 0
    tokens: int = 0
    """Real tokens read, padding not counted."""
    targets: int = 0
    cut: int = 0
    """Prompts that lost their middle to fit into max_length."""
    skipped: int = 0
    """Draws that gave nothing to train on: no template applies, or the answer alone is too long."""
    seconds: float = 0.0


@dataclass(frozen=True)
class Drawn:
    """An example of a step, and where it is from."""

    index: int
    """Position in the mixture."""
    task: str
    family: str
    template: str
    row: int
    encoded: Encoded

    @property
    def origin(self) -> dict[str, Any]:
        """Where it is from, as a line of a file has it."""
        return {"index": self.index, "task": self.task, "template": self.template, "row": self.row}


@dataclass
class Drawing:
    """What the ranks drew for one step, in the order of the mixture."""

    examples: list[Drawn] = field(default_factory=list)
    skipped: list[dict[str, Any]] = field(default_factory=list)
    """Where draws were from that gave nothing to train on, and why they did not."""

    @property
    def cut(self) -> list[dict[str, Any]]:
        """Where the examples are from whose prompts lost their middle."""
        return [each.origin for each in self.examples if each.encoded.cut]

    def add_to(self, totals: Totals) -> None:
        """Count what was drawn."""
        totals.examples += len(self.examples)
        totals.tokens += sum(len(each.encoded.ids) for each in self.examples)
        totals.targets += sum(each.encoded.num_target for each in self.examples)
        totals.cut += len(self.cut)
        totals.skipped += len(self.skipped)


def draw(train: TrainConfig, mixture: Mixture, encoder: PromptEncoder, step: int, ranks: Ranks) -> tuple[Drawing, list[Drawn]]:
    """All that stands at the places of a step, and this rank's part of it. All ranks."""
    parts = ranks.gather(_draw(train.indices(step)[ranks.rank :: ranks.size], mixture, encoder))
    drawing = Drawing(
        sorted((each for part in parts for each in part.examples), key=lambda each: each.index),
        sorted((each for part in parts for each in part.skipped), key=lambda each: each["index"]),
    )
    shares = deal([len(each.encoded.ids) for each in drawing.examples], ranks.size)
    return drawing, [drawing.examples[number] for number in shares[ranks.rank]]


def _draw(indices: Sequence[int], mixture: Mixture, encoder: PromptEncoder) -> Drawing:
    draws = [mixture.draw(index) for index in indices]
    encodings = iter(encoder.encode_batch([(draw.example.inputs, draw.example.targets) for draw in draws if draw.example]))
    found = Drawing()
    for index, draw in zip(indices, draws, strict=True):
        encoded = next(encodings) if draw.example else None
        if encoded is None:
            why = "its answer alone is longer than train.max_length" if draw.example else "no prompt applies"
            found.skipped.append({"index": index, "task": draw.task, "template": draw.template, "row": draw.row, "why": why})
        else:
            found.examples.append(Drawn(index, draw.task, draw.family, draw.template, draw.row, encoded))
    return found
