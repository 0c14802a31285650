"""What a run tells of itself, step by step: metrics.jsonl, skipped.jsonl, cut.jsonl, TensorBoard. And whether a step is to be trusted."""

import contextlib
import json
import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtllama import folders
from mtllama.errors import UserError

METRICS, SKIPPED, CUT, TENSORBOARD = "metrics.jsonl", "skipped.jsonl", "cut.jsonl", "tensorboard"
WINDOW = 100
"""Steps whose median gradient norm the next one is compared with."""
ENOUGH = 20
"""Steps before which there is no comparing."""
IN_A_ROW = 3
"""Steps that are passed over one after the other before the run stops."""
NAMED = 3
"""Examples that are named with such a step."""


@dataclass(frozen=True)
class Seen:
    """One example of a step, and what came of it."""

    index: int
    """Position in the mixture."""
    task: str
    family: str
    template: str
    row: int
    tokens: int
    targets: int
    loss: float
    """Summed over its target tokens (nat)."""

    def __str__(self) -> str:
        return f"{self.task} / {self.template} row {self.row} (index {self.index}, loss {self.loss / max(1, self.targets):.3g})"


def sums(seen: Iterable[Seen], key: str) -> dict[str, dict[str, float]]:
    """Mean loss of a target token, target tokens and tokens, by `family` or `task`."""
    groups: dict[str, list[Seen]] = {}
    for each in seen:
        groups.setdefault(getattr(each, key), []).append(each)
    return {name: _sum(group) for name, group in sorted(groups.items())}


def _sum(group: Sequence[Seen]) -> dict[str, float]:
    targets = sum(each.targets for each in group)
    loss = math.fsum(each.loss for each in group) if all(math.isfinite(each.loss) for each in group) else math.nan
    return {"loss": loss / max(1, targets), "targets": targets, "tokens": sum(each.tokens for each in group)}


class Journal:
    """The files in the folder of a run, from a step on: lines of later steps, which will be taken again, are dropped."""

    def __init__(self, work: Path, start: int, *, spike: float, tensorboard: bool) -> None:
        """`spike`: a gradient norm that many times the median of those before is not trusted; 0: never mind."""
        self._work, self._spike = work, spike
        self._norms: deque[float] = deque(maxlen=WINDOW)
        self._in_a_row = 0
        rewind(work / METRICS, start, lambda line: self._note(line["grad_norm"], passed_over="passed_over" in line))
        rewind(work / SKIPPED, start)
        rewind(work / CUT, start)
        self._board = _board(work / TENSORBOARD, start) if tensorboard else None

    def _note(self, norm: float | None, *, passed_over: bool) -> None:
        self._in_a_row = self._in_a_row + 1 if passed_over else 0
        if not passed_over and norm is not None:
            self._norms.append(norm)

    def doubt(self, loss: float | None, norm: float) -> str | None:
        """Why a step should not be taken; None if it should. A step without targets has no loss."""
        if loss is None:
            return None
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return f"loss {loss}, gradient norm {norm}"
        usual = statistics.median(self._norms) if len(self._norms) >= ENOUGH else math.inf
        if self._spike and norm > self._spike * usual:
            return f"gradient norm {norm:.3g}, {norm / usual:.0f} times the median of the steps before"
        return None

    def write(
        self,
        line: dict[str, Any],
        seen: Sequence[Seen],
        skipped: Sequence[dict[str, Any]],
        cut: Sequence[dict[str, Any]],
        doubt: str | None,
    ) -> str | None:
        """Write down a step, and where in the mixture it skipped something or cut a prompt; returns what there is to say about it, if it was
        passed over.

        Raises `UserError` after too many of these in a row.
        """
        worst = sorted(seen, key=lambda each: (not math.isfinite(each.loss), each.loss / max(1, each.targets)), reverse=True)[:NAMED]
        if doubt:
            line = {**line, "passed_over": doubt, "examples": [vars(each) for each in worst]}
        self._append(METRICS, [line])
        self._append(SKIPPED, [{"step": line["step"], **each} for each in skipped])
        self._append(CUT, [{"step": line["step"], **each} for each in cut])
        self._note(line["grad_norm"], passed_over=bool(doubt))
        if self._board:
            for name, value in _scalars(line):
                self._board.add_scalar(name, value, line["step"])
        if not doubt:
            return None
        what = f"step {line['step']} is passed over: {doubt}; the examples with the largest loss: {'; '.join(map(str, worst))}"
        if self._in_a_row >= IN_A_ROW:
            raise UserError(
                f"{what}; that was {IN_A_ROW} steps in a row: look at these examples, or give the same command with a lower train.lr, "
                f"train.dtype=float32 or another train.spike: it goes on with them from the last checkpoint in {self._work}"
            )
        return what

    def _append(self, name: str, lines: Sequence[dict[str, Any]]) -> None:
        with open(self._work / name, "a", encoding="utf-8") as handle:
            handle.writelines(json.dumps(_plain(line)) + "\n" for line in lines)

    def close(self) -> None:
        """Write out what is still held back."""
        if self._board:
            self._board.close()


def rewind(file: Path, step: int, note: Callable[[dict[str, Any]], None] = lambda line: None) -> None:
    """Drop the lines of later steps than this one (a last line that a kill cut short among them); the others are shown to `note`.

    One at a time: those of a long run do not fit beside a model.
    """
    if not file.is_file():
        return
    with open(file, "rb") as lines, folders.new_file(file) as kept:
        for line in lines:
            with contextlib.suppress(ValueError):
                if (found := json.loads(line))["step"] <= step:
                    kept.write(line.rstrip(b"\n") + b"\n")
                    note(found)


def _plain(value: Any) -> Any:
    """JSON has no word for what is not a number."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return value if not isinstance(value, float) or math.isfinite(value) else None


def _scalars(line: dict[str, Any]) -> Iterable[tuple[str, float]]:
    for name in ("loss", "lr", "grad_norm", "tokens_per_second", "mfu"):
        if line[name] is not None:
            yield f"train/{name}", line[name]
    for kind in ("families", "tasks"):
        for name, found in line[kind].items():
            yield f"{kind}/{name}", found["loss"]


def _board(folder: Path, start: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("train.tensorboard needs a package that is not there; run: pip install 'mtllama[tensorboard]'") from error
    return SummaryWriter(str(folder), purge_step=start + 1 if start else None)  # type: ignore[no-untyped-call]
