"""What a delta changed, layer by layer: told from its manifest and the headers of its shards, no weight is read."""

import io
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtllama import folders
from mtllama.errors import UserError
from mtllama.weights.manifest import DELTA_JSON, Manifest
from mtllama.weights.shards import DTYPE_NAMES, CheckpointReader, TensorInfo

NAMES_SHOWN = 4
"""Tensors that the text names one by one; `--json` has them all."""
RARE = ("recast_tensors", "renamed_tensors")
"""Lists that the text leaves out where they are empty."""


@dataclass(frozen=True)
class Change:
    """What changed in one tensor or in several together."""

    name: str
    num_tensors: int
    num_weights: int
    num_equal: int
    """Weights whose bits are the base's; none of a tensor that the base has not."""
    num_inexact: int
    """Weights that will not come back exact."""
    num_bytes: int
    """Size in the delta."""
    norm: float
    """Euclidean norm of the difference, and of the base; where the base has no tensor, it counts as zeros."""
    base_norm: float

    @classmethod
    def total(cls, name: str, parts: Iterable["Change"]) -> "Change":
        """Several together: counts add up, norms as squares."""
        found = list(parts)
        return cls(
            name,
            sum(each.num_tensors for each in found),
            sum(each.num_weights for each in found),
            sum(each.num_equal for each in found),
            sum(each.num_inexact for each in found),
            sum(each.num_bytes for each in found),
            math.hypot(*(each.norm for each in found)),
            math.hypot(*(each.base_norm for each in found)),
        )

    @property
    def equal_share(self) -> float | None:
        """Share of the weights whose bits are the base's; None of no weights."""
        return self.num_equal / self.num_weights if self.num_weights else None

    @property
    def relative_norm(self) -> float | None:
        """Norm of the difference by that of the base; None where the base is zero or a norm overflowed."""
        known = self.base_norm > 0 and math.isfinite(self.norm) and math.isfinite(self.base_norm)
        return self.norm / self.base_norm if known else None

    def to_json(self) -> dict[str, Any]:
        """As `--json` has it."""
        return {
            "name": self.name,
            "tensors": self.num_tensors,
            "weights": self.num_weights,
            "equal": self.num_equal,
            "equal_share": self.equal_share,
            "inexact": self.num_inexact,
            "bytes": self.num_bytes,
            "norm": _finite(self.norm),
            "base_norm": _finite(self.base_norm),
            "relative_norm": self.relative_norm,
        }


@dataclass(frozen=True)
class Info:
    """All that `delta info` tells."""

    folder: Path
    manifest: Manifest
    num_bytes: int
    """Size of the folder, and of the weights in it."""
    num_weight_bytes: int
    all: Change
    parts: tuple[Change, ...]
    """The layers by number, then what lies outside them (embedding, head, final norm) by name."""
    kinds: tuple[Change, ...]
    """Matrices of one kind over all layers."""
    cells: Mapping[tuple[str, str], Change]
    """By the names of a layer and a kind."""

    @property
    def target_bytes(self) -> int:
        """Size of the target's weights."""
        return sum(entry.info.num_bytes for entry in self.manifest.entries.values())

    @property
    def bits_per_weight(self) -> float:
        """Size of the weights in the delta."""
        return 8 * self.num_weight_bytes / max(1, self.all.num_weights)

    @property
    def target_bits_per_weight(self) -> float:
        """Size of the target's weights."""
        return 8 * self.target_bytes / max(1, self.all.num_weights)

    def to_json(self) -> dict[str, Any]:
        """One document with everything that the text has, no list cut short."""
        tables = (("layers", self.parts), ("kinds", self.kinds))
        return {
            "delta": str(self.folder),
            "mode": self.manifest.mode,
            "base_name": self.manifest.base_name,
            "versions": self.manifest.versions,
            "bytes": self.num_bytes,
            "weight_bytes": self.num_weight_bytes,
            "target_weight_bytes": self.target_bytes,
            "bits_per_weight": self.bits_per_weight,
            "target_bits_per_weight": self.target_bits_per_weight,
            **{key: names for key, _, names in self._lists()},
            "total": self.all.to_json(),
            **{key: [change.to_json() for change in table] for key, table in tables},
        }

    def text(self) -> str:
        """What it is, and a table by layer and by kind; at most 100 columns wide with names of the usual length."""
        manifest, num_weights = self.manifest, self.all.num_weights
        share = self.num_weight_bytes / max(1, self.target_bytes)
        exact = (
            "every weight comes back bit for bit"
            if manifest.mode == "bits"
            else f"the sum is rounded, {self.all.num_inexact:,} of {num_weights:,} weights do not come back exact"
        )
        lines = [
            f"{self.folder}: delta of {manifest.base_name}",
            f"mode {manifest.mode}: {exact}",
            f"made with {', '.join(f'{name} {version}' for name, version in manifest.versions.items())}",
            f"{self.num_bytes / 1e6:,.1f} MB on disk; its weights are {self.num_weight_bytes / 1e6:,.1f} of the target's "
            f"{self.target_bytes / 1e6:,.1f} MB ({share:.1%}): {self.bits_per_weight:.2f} of {self.target_bits_per_weight:.2f} bits a weight",
            f"{self.all.num_tensors:,} tensors with {num_weights:,} weights, of which {_percent(self.all.equal_share, 1)} have the base's bits",
            *(f"{what}: {len(names)}{_some(names)}" for key, what, names in self._lists() if names or key not in RARE),
        ]
        tables = [_table("layer", self.parts, self.all)]
        if self.kinds:
            tables.append(_table("kind", self.kinds, Change.total("all layers", self.kinds)))
        return "\n\n".join("\n".join(part) for part in (lines, *tables))

    def _lists(self) -> Iterator[tuple[str, str, list[str]]]:
        """Key, words and names of the tensors that are special in some way."""
        entries = self.manifest.entries.items()
        built = [(name, entry.info, entry.base) for name, entry in entries if entry.base]
        yield "equal_tensors", "tensors equal to the base's", [name for name, entry in entries if entry.kind == "equal"]
        yield "base_unused", "tensors that the base has and the target has not", self.manifest.base_unused
        yield "new_tensors", "tensors new in the target", [name for name, entry in entries if entry.base is None]
        resized = [_resized(name, base.info, info) for name, info, base in built if base.info.shape != info.shape]
        yield "resized_tensors", "tensors resized", resized
        recast = [
            f"{name} ({DTYPE_NAMES[base.info.dtype]} to {DTYPE_NAMES[info.dtype]})"
            for name, info, base in built
            if base.info.dtype != info.dtype
        ]
        yield "recast_tensors", "tensors of another precision", recast
        yield (
            "renamed_tensors",
            "tensors built on one of another name",
            [f"{name} (on {base.name})" for name, _, base in built if base.name != name],
        )


def read(folder: Path) -> Info:
    """Look at a delta made by `delta.make`; any other folder is a `UserError`."""
    if not folder.is_dir():
        raise UserError(f"delta folder {folder} does not exist")
    if not (folder / DELTA_JSON).is_file():
        raise UserError(
            f"{folder} has no {DELTA_JSON}, the record that this is told from: only a delta of `mtllama delta make` has one, "
            "neither a model nor a delta published by other tools (`mtllama delta apply` takes the latter, too)"
        )
    manifest = Manifest.read(folder)
    needed = [name for name, entry in manifest.entries.items() if entry.kind != "equal"]
    reader = CheckpointReader(folder) if needed else None
    changes: dict[str, Change] = {}
    for name, entry in manifest.entries.items():
        size = 0
        if entry.kind != "equal":
            if reader is None or name not in reader:
                raise UserError(f"{folder}: the difference of {name} is missing; fetch or make the delta again")
            size = reader.info(name).num_bytes
        num_equal = entry.num_equal if entry.base else 0  # of a new tensor it counts zeros
        changes[name] = Change(name, 1, entry.info.size, num_equal, entry.num_inexact, size, entry.norm, entry.base_norm)
    parts, kinds, cells = _group(changes)
    return Info(
        folder,
        manifest,
        sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
        sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        Change.total("total", changes.values()),
        parts,
        kinds,
        cells,
    )


def _group(changes: Mapping[str, Change]) -> tuple[tuple[Change, ...], tuple[Change, ...], dict[tuple[str, str], Change]]:
    """Tensors summed up by part of the model, by kind, and by both."""
    places = {name: _place(name) for name in changes}
    labels = _labels({kind for _, kind in places.values() if kind})

    def sums(key: Callable[[str], Any]) -> dict[Any, list[Change]]:
        found: dict[Any, list[Change]] = {}
        for name in sorted(changes):
            if (group := key(name)) is not None:
                found.setdefault(group, []).append(changes[name])
        return found

    parts = sums(lambda name: places[name][0])
    kinds = sums(lambda name: labels[places[name][1]] if places[name][1] else None)
    both = sums(lambda name: (places[name][0], labels[places[name][1]]) if places[name][1] else None)
    layers = {layer for layer, _ in both}
    order = sorted(parts, key=lambda part: (part not in layers, *_number(part)))
    return (
        tuple(Change.total(part, parts[part]) for part in order),
        tuple(Change.total(kind, each) for kind, each in kinds.items()),
        {place: Change.total(place[1], each) for place, each in both.items()},
    )


def _place(name: str) -> tuple[str, tuple[str, ...]]:
    """The layer of a tensor, and its kind: the rest of its name. Outside of all layers: its module, and nothing.

    The first number in a name is its layer's; further ones (of experts) make no kind of their own.
    """
    parts = name.split(".")
    for i, part in enumerate(parts[:-1]):
        if part.isdecimal():
            rest = ["*" if each.isdecimal() else each for each in parts[i + 1 :]]
            return ".".join(parts[: i + 1]), tuple(rest[:-1] if rest[-1] == "weight" and len(rest) > 1 else rest)
    return ".".join(parts[:-1]) or name, ()


def _number(part: str) -> tuple[str, int, str]:
    """Sorts layers of one stack by their number."""
    stack, _, number = part.rpartition(".")
    return (stack, len(number), number) if number.isdecimal() else (part, 0, "")


def _labels(kinds: set[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """As many of the last parts of each kind as tell it from all others: `q_proj` of `self_attn.q_proj`."""
    found = {}
    for kind in kinds:
        lengths = range(2 if kind[-1] in ("weight", "bias") else 1, len(kind))
        unique = (length for length in lengths if not any(other[-length:] == kind[-length:] for other in kinds if other != kind))
        found[kind] = ".".join(kind[-next(unique, len(kind)) :])
    return found


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _percent(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}%}"


def _resized(name: str, before: TensorInfo, after: TensorInfo) -> str:
    return f"{name} ({' x '.join(map(str, before.shape))} to {' x '.join(map(str, after.shape))})"


def _some(names: Sequence[str]) -> str:
    if not names:
        return ""
    rest = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return f" ({', '.join(names[:NAMES_SHOWN])}{rest})"


def _table(head: str, changes: Sequence[Change], total: Change) -> list[str]:
    """Lines of a table, the total last; numbers stand at the right."""
    columns: dict[str, Callable[[Change], str]] = {
        head: lambda change: change.name,
        "weights": lambda change: f"{change.num_weights:,}",
        "equal bits": lambda change: _percent(change.equal_share, 1),
        "norm": lambda change: f"{change.norm:#.4g}",
        "relative": lambda change: _percent(change.relative_norm, 3),
        "MB": lambda change: f"{change.num_bytes / 1e6:,.3f}",
    }
    if total.num_inexact:
        columns["inexact"] = lambda change: f"{change.num_inexact:,}"
    cells = [list(columns), *([tell(change) for tell in columns.values()] for change in (*changes, total))]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True)))
        for row in cells
    ]


WIDTH, COLUMN = 6.4, 0.27
"""Inches of a figure with up to ten kinds, and of each further one."""
ROW, MAX_HEIGHT = 0.17, 16.0
"""Inches of a layer, as long as all together are not higher than this."""
INK, BAR, UNCHANGED, LINE = "#1c2733", "#4f94dc", "#d5dae0", "#e3e8ee"
LEAST, MOST = 5.0, 1000.0
"""Range of the colour scale: like changes look alike, and what changed less than its lowest has that colour."""


def write_figure(info: Info, path: Path) -> None:
    """Write a PNG: relative norm by layer and kind, share of equal bits by layer. It replaces a file, whole or not at all."""
    if path.suffix.lower() != ".png":
        raise UserError(f"--figure {path} does not end in .png, the one kind of picture that there is")
    if path.is_dir():
        raise UserError(f"--figure {path} is a folder; name a file in it")
    content = _draw(info)
    with folders.explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        folders.write_bytes(path, content)


def _draw(info: Info) -> bytes:
    """The figure, through matplotlib's objects: no global state, no display."""
    from matplotlib.figure import Figure  # it takes a second to load, and a table needs none

    row, more = min(ROW, MAX_HEIGHT / len(info.parts)), COLUMN * max(0, len(info.kinds) - 10)
    figure = Figure(figsize=(WIDTH + more, max(3.2, row * len(info.parts) + 2.1)), layout="constrained")
    figure.suptitle(_plain(f"What changed from {info.manifest.base_name}", 70), fontsize=10, fontweight="bold", color=INK)
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3.4 + more, 1.4))
    _draw_norms(figure, left, info)
    _draw_equal(right, info)
    _label_rows(left, info, every=math.ceil(0.12 / row))
    for axes in (left, right):
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0, labelsize=7)
    right.tick_params(axis="y", labelleft=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=180, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def _draw_norms(figure: Any, axes: Any, info: Info) -> None:
    """Heat map of the relative norms: a row for each part, first as a whole, then by kind."""
    from matplotlib.colors import ListedColormap, LogNorm
    from matplotlib.ticker import FuncFormatter, LogLocator

    grid = [[part, *(info.cells.get((part.name, kind.name)) for kind in info.kinds)] for part in info.parts]
    same = [[change is not None and change.num_equal == change.num_weights > 0 for change in row] for row in grid]
    values = [[change.relative_norm if change else None for change in row] for row in grid]
    changed = [value for row in values for value in row if value] or [1e-3]
    high = max(changed)
    low = max(min(*changed, high / LEAST), high / MOST)
    axes.imshow(
        [[1.0 if each else math.nan for each in row] for row in same],
        aspect="auto",
        cmap=ListedColormap([UNCHANGED]),
        interpolation="nearest",
    )
    image = axes.imshow(
        [
            [math.nan if value is None or equal else max(value, low) for value, equal in zip(*rows, strict=True)]
            for rows in zip(values, same, strict=True)
        ],
        aspect="auto",
        cmap="YlGnBu",
        norm=LogNorm(low, high),
        interpolation="nearest",
    )
    axes.axvline(0.5, color="white", linewidth=3)
    axes.set_title("norm of the difference / norm of the base", fontsize=8.5, color=INK)
    labels = ["all", *(_plain(kind.name, 28) for kind in info.kinds)]
    axes.set_xticks(range(len(labels)), labels, rotation=60, ha="right", rotation_mode="anchor")
    bar = figure.colorbar(image, ax=axes, location="bottom", aspect=40, pad=0.02)
    bar.set_ticks(LogLocator(subs=(1, 2, 5)))
    bar.ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
    bar.ax.minorticks_off()
    bar.ax.tick_params(labelsize=7)
    bar.set_label("grey: unchanged; white: nothing there, or not in the base", fontsize=7, color=INK)


def _draw_equal(axes: Any, info: Info) -> None:
    """Bars of the shares of equal bits."""
    axes.barh(range(len(info.parts)), [100 * (part.equal_share or 0) for part in info.parts], height=0.72, color=BAR)
    axes.set_title("bit-equal weights", fontsize=8.5, color=INK)
    axes.set_xlim(0, 100)
    axes.set_xticks((0, 50, 100), ("0", "50", "100%"))
    axes.grid(axis="x", color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)


def _label_rows(axes: Any, info: Info, every: int) -> None:
    """Name the rows: by number alone where there is one stack of layers, and not all, where they are too low."""
    layers = {layer for layer, _ in info.cells}
    stacks = {_number(layer)[0] for layer in layers}
    labels = [_number(part.name)[2] if part.name in layers and len(stacks) == 1 else part.name for part in info.parts]
    ticks = [y for y in range(len(labels)) if y % every == 0]
    axes.set_yticks(ticks, [_plain(labels[y], 30) for y in ticks])
    axes.set_ylim(len(labels) - 0.5, -0.5)
    if len(stacks) == 1:
        axes.set_ylabel(_plain(stacks.pop(), 60), fontsize=8, color=INK)


def _plain(text: str, length: int) -> str:
    """`text` short enough for a label, its end kept; a dollar sign would start a formula."""
    short = text if len(text) <= length else f"…{text[1 - length :]}"
    return short.replace("$", r"\$")
