"""The figures of a report as PNG and SVG, drawn through matplotlib's objects: no display, and the same bytes every time."""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke

WIDTH = 5.2
"""Inches; narrow on purpose, so that the writing is still read on a phone."""
RUN_COLOURS = ("#8a97a5", "#3d86d6", "#c9781f", "#3f9468", "#9a6fbf")
LINE_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b5608f", "#a87400", "#3f9ac9", "#7a5c3e", "#757575")
INK, MAJORITY, RULE, GROUND = "#1c2733", "#b3261e", "#dfe4ea", "#ffffff"
THEMED = {INK: "ink", MAJORITY: "majority", RULE: "line", GROUND: "card", "#0072b2": "blue", "#7a5c3e": "brown"}
"""Colours that a page may change by a custom property of this name (for its dark form); alone, a figure has its own."""
STYLE = {
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "svg.fonttype": "none",
    "svg.hashsalt": "mtllama",
}
FONT = "system-ui,'Segoe UI',Roboto,'DejaVu Sans',sans-serif"


@dataclass(frozen=True)
class Drawing:
    """One figure twice: as PNG, and as an SVG element that can stand in a page or in a file."""

    png: bytes
    svg: str


@dataclass(frozen=True)
class Bars:
    """One task: value, low and high end for each run (None where it was not measured), and what guessing gets."""

    task: str
    runs: tuple[tuple[float, float, float] | None, ...]
    chance: float | None
    majority: float | None


@dataclass(frozen=True)
class Strip:
    """One task asked through several templates: the value of each, for each run (None where it was not measured)."""

    task: str
    runs: tuple[tuple[float, ...] | None, ...]
    quartiles: tuple[tuple[float, float, float] | None, ...]
    """First quartile, median and third for each run."""
    chance: float | None


def draw_bars(panels: Sequence[tuple[str, Sequence[Bars]]], names: Sequence[str], measure: str) -> Drawing:
    """Grouped horizontal bars with interval whiskers, a panel per group of tasks."""
    halo = [withStroke(linewidth=2.6, foreground=GROUND)]

    def draw(axes: Any, y: float, row: Bars, i: int, thick: float) -> None:
        run = row.runs[i]
        if run is not None:
            value, low, high = run
            axes.barh(y, value, thick * 0.88, color=_colour(i), zorder=2)
            axes.plot([low, high], [y, y], color=INK, linewidth=1.2, marker="|", markersize=5, zorder=4, path_effects=halo)

    with matplotlib.rc_context(STYLE):
        return _panels(panels, names, measure, [row.majority for _, rows in panels for row in rows], draw, 0.21)


def draw_strips(panels: Sequence[tuple[str, Sequence[Strip]]], names: Sequence[str], measure: str) -> Drawing:
    """A dot for every template, the quartiles as a thick line, the median as a tick; a panel per group of tasks."""

    def draw(axes: Any, y: float, row: Strip, i: int, thick: float) -> None:
        run, quartiles = row.runs[i], row.quartiles[i]
        if run is not None and quartiles is not None:
            first, median, third = quartiles
            axes.plot([first, third], [y, y], color=_colour(i), linewidth=6, alpha=0.35, solid_capstyle="butt", zorder=2)
            jitter = [y + thick * 0.22 * ((k % 3) - 1) for k in range(len(run))]  # so that equal values do not hide each other
            axes.plot(sorted(run), jitter, ".", color=_colour(i), markersize=5.5, markeredgewidth=0, zorder=4)
            axes.plot([median] * 2, [y - thick * 0.42, y + thick * 0.42], color=INK, linewidth=1.6, zorder=5)

    with matplotlib.rc_context(STYLE):
        return _panels(panels, names, measure, [], draw, 0.25)


def _panels(panels: Any, names: Sequence[str], measure: str, majorities: Sequence[float | None], draw: Any, step: float) -> Drawing:
    """Rows of tasks in panels, each row with a place for every run; `step`: inches a place."""
    heights = [len(rows) * (len(names) + 0.9) * step + 0.35 for _, rows in panels]
    words = [_plain(name) for name in names]
    handles: list[Any] = [Patch(color=_colour(i)) for i in range(len(names))]
    if any(row.chance is not None for _, rows in panels for row in rows):
        handles.append(Line2D([], [], color=INK, linestyle=(0, (1.2, 1.2))))
        words.append("chance")
    if any(majority is not None for majority in majorities):
        handles.append(Line2D([], [], color=MAJORITY, linewidth=2))
        words.append("always the most frequent answer")
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.6 + 0.2 * len(words)), layout="constrained")
    grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights})
    for axes, (title, rows) in zip(grid[:, 0], panels, strict=True):
        thick = 1 / (len(names) + 0.9)
        for y, row in enumerate(rows):
            for i in range(len(names)):
                draw(axes, y + (i - (len(names) - 1) / 2) * thick, row, i, thick)
            half = thick * len(names) / 2 + 0.04
            if getattr(row, "majority", None) is not None:
                axes.plot([row.majority] * 2, [y - half, y + half], color=MAJORITY, linewidth=2, zorder=3)
            if row.chance is not None:
                axes.plot([row.chance] * 2, [y - half, y + half], color=INK, linewidth=1.4, linestyle=(0, (1.2, 1.2)), zorder=3)
        axes.set_yticks(range(len(rows)), [row.task for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_title(title, loc="left", fontsize=10, fontweight="bold", color=INK)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", color=RULE, linewidth=0.8, zorder=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
    grid[-1, 0].set_xlim(0, 100)
    grid[-1, 0].set_xlabel(measure)
    figure.legend(handles, words, loc="outside upper left", frameon=False, fontsize=8.5)
    return _drawing(figure)


def smooth(losses: Sequence[float], weights: Sequence[float], window: int) -> list[float]:
    """Exponential mean over about `window` steps, every step weighing as many target tokens as it had."""
    keep, total, weight, smoothed = 1 - 1 / window, 0.0, 0.0, []
    for loss, count in zip(losses, weights, strict=True):
        total, weight = keep * total + loss * count, keep * weight + count
        smoothed.append(total / weight if weight else loss)
    return smoothed


def draw_losses(series: Sequence[tuple[str, Sequence[int], Sequence[float]]]) -> Drawing:
    """Loss by step; the first series is the whole, drawn in front of its parts."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
        axes = figure.subplots()
        for i, (name, steps, values) in enumerate(series):
            colour, width = (INK, 2.4) if i == 0 else (LINE_COLOURS[(i - 1) % len(LINE_COLOURS)], 1.3)
            dashes = "-" if i <= len(LINE_COLOURS) else "--"
            mark = "." if len(steps) < 30 else ""
            axes.plot(steps, values, dashes, color=colour, linewidth=width, marker=mark, label=_plain(name), zorder=3 if i == 0 else 2)
        axes.set_xlabel("step")
        axes.set_ylabel("loss (nat per target token)")
        axes.set_ylim(bottom=0)
        axes.grid(color=RULE, linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8.5)
        return _drawing(figure)


def _colour(index: int) -> str:
    return RUN_COLOURS[index % len(RUN_COLOURS)]


def _plain(text: str, length: int = 56) -> str:
    """`text` short enough for a legend; a dollar sign would start a formula."""
    short = text if len(text) <= length else text[: length - 1] + "…"
    return short.replace("$", r"\$")


def _drawing(figure: Figure) -> Drawing:
    png, svg = io.BytesIO(), io.StringIO()
    figure.savefig(png, format="png", dpi=200, facecolor=GROUND, metadata={"Software": None})
    figure.savefig(svg, format="svg", facecolor=GROUND, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return Drawing(png.getvalue(), _themed(svg.getvalue()))


def _themed(svg: str) -> str:
    """An SVG file as an element for a page: ids that nothing points to would clash with those of other figures, and colours are the page's."""
    element = svg[svg.index("<svg") :].strip()
    pointed = set(re.findall(r'(?:url\(|href=")#([^)"]+)', element))
    element = re.sub(r' id="([^"]+)"', lambda found: found[0] if found[1] in pointed else "", element)
    element = re.sub(r"<!--.*?-->\s*|<metadata>.*?</metadata>\s*|<defs>\s*<style.*?</defs>\s*", "", element, flags=re.DOTALL)
    element = re.sub(r"'DejaVu Sans'[^;\"]*", FONT, element)
    for colour, name in THEMED.items():
        element = re.sub(rf"((?:fill|stroke): ){colour}\b", rf"\g<1>var(--{name}, {colour})", element)
    head, bracket, rest = element.partition(">")
    head = re.sub(r' (?:width|height)="[^"]*"', "", head)  # the page gives it its width; its view box keeps the proportions
    return f'{head} stroke-linejoin="round" stroke-linecap="butt"{bracket}{rest}\n'
