"""The figures of a report as PNG bytes, drawn through matplotlib's objects: no global state, no display."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke

WIDTH = 6.0
"""Inches; narrow on purpose, so that the writing is still read on a phone."""
RUN_COLOURS = ("#b9c3ce", "#4f94dc", "#e39a4f", "#63b285", "#a480c4")
LINE_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5c3e", "#8c8c8c")
INK, MAJORITY = "#1c2733", "#b3261e"


@dataclass(frozen=True)
class Bars:
    """One task: value, low and high end for each run (None where it was not measured), and what guessing gets."""

    task: str
    runs: tuple[tuple[float, float, float] | None, ...]
    chance: float | None
    majority: float | None


def draw_bars(panels: Sequence[tuple[str, Sequence[Bars]]], names: Sequence[str], measure: str) -> bytes:
    """Grouped horizontal bars with interval whiskers, a panel per group of tasks."""
    step = 0.23  # inches a bar
    heights = [len(rows) * (len(names) + 0.9) * step + 0.35 for _, rows in panels]
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.75 + 0.2 * (len(names) + 1)), layout="constrained")
    halo = [withStroke(linewidth=2.6, foreground="white")]
    grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights})
    for axes, (title, rows) in zip(grid[:, 0], panels, strict=True):
        for y, row in enumerate(rows):
            thick = 1 / (len(names) + 0.9)
            for i, run in enumerate(row.runs):
                if run is None:
                    continue
                value, low, high = run
                at = y + (i - (len(names) - 1) / 2) * thick
                axes.barh(at, value, thick * 0.88, color=_colour(i), zorder=2)
                axes.plot([low, high], [at, at], color=INK, linewidth=1.2, marker="|", markersize=5, zorder=4, path_effects=halo)
            half = thick * len(names) / 2 + 0.04
            if row.majority is not None:
                axes.plot([row.majority] * 2, [y - half, y + half], color=MAJORITY, linewidth=2, alpha=0.75, zorder=3)
            if row.chance is not None:
                axes.plot([row.chance] * 2, [y - half, y + half], color=INK, linewidth=1.4, linestyle=(0, (1.2, 1.2)), zorder=3)
        axes.set_yticks(range(len(rows)), [row.task for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_title(title, loc="left", fontsize=10.5, fontweight="bold", color=INK)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", color="#e3e8ee", linewidth=0.8, zorder=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
    grid[-1, 0].set_xlim(0, 100)
    grid[-1, 0].set_xlabel(measure)
    handles: list[Any] = [Patch(color=_colour(i)) for i in range(len(names))]
    words = [_plain(name) for name in names]
    if any(row.chance is not None for _, rows in panels for row in rows):
        handles += [Line2D([], [], color=INK, linestyle=(0, (1.2, 1.2))), Line2D([], [], color=MAJORITY, linewidth=2, alpha=0.75)]
        words += ["chance", "always the most frequent answer"]
    figure.legend(handles, words, loc="outside upper left", frameon=False, fontsize=9)
    return _png(figure)


def smooth(losses: Sequence[float], weights: Sequence[float], window: int) -> list[float]:
    """Exponential mean over about `window` steps, every step weighing as many target tokens as it had."""
    keep, total, weight, smoothed = 1 - 1 / window, 0.0, 0.0, []
    for loss, count in zip(losses, weights, strict=True):
        total, weight = keep * total + loss * count, keep * weight + count
        smoothed.append(total / weight if weight else loss)
    return smoothed


def draw_losses(series: Sequence[tuple[str, Sequence[int], Sequence[float]]]) -> bytes:
    """Loss by step; the first series is the whole, drawn in front of its parts."""
    figure = Figure(figsize=(WIDTH, 4.4), layout="constrained")
    axes = figure.subplots()
    for i, (name, steps, values) in enumerate(series):
        colour, width = (INK, 2.4) if i == 0 else (LINE_COLOURS[(i - 1) % len(LINE_COLOURS)], 1.3)
        dashes = "-" if i <= len(LINE_COLOURS) else "--"
        mark = "." if len(steps) < 30 else ""
        axes.plot(steps, values, dashes, color=colour, linewidth=width, marker=mark, label=_plain(name), zorder=3 if i == 0 else 2)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nat per target token)")
    axes.set_ylim(bottom=0)
    axes.grid(color="#e3e8ee", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return _png(figure)


def _colour(index: int) -> str:
    return RUN_COLOURS[index % len(RUN_COLOURS)]


def _plain(text: str, length: int = 60) -> str:
    """`text` short enough for a legend; a dollar sign would start a formula."""
    short = text if len(text) <= length else text[: length - 1] + "…"
    return short.replace("$", r"\$")


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=180, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()
