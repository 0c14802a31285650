"""What a report is made of, and its two renderings: they show the same sections, so they cannot disagree.

What a model wrote is untrusted: HTML escapes it through Jinja (and figures through matplotlib), Markdown through `_md` and fences.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import resources
from typing import NamedTuple

import jinja2


class Cell(NamedTuple):
    """One cell of a table: the number, and what stands small beside it."""

    text: str
    asides: tuple[str, ...] = ()
    strong: bool = False
    bar: float | None = None
    """A share from 0 to 1, drawn as a small bar under the number, which must say the same."""


@dataclass(frozen=True)
class Grid:
    """A table; the first cell of a row is its heading."""

    title: str
    head: tuple[str, ...]
    rows: list[list[Cell]]
    words: bool = False
    """Holds text rather than numbers."""


@dataclass(frozen=True)
class Picture:
    """A figure and what it shows, in words."""

    name: str
    """Of its files, without an ending."""
    png: bytes
    svg: str
    alt: str
    caption: str

    @property
    def inline(self) -> str:
        """The SVG for a page that holds several: its ids carry the figure's name."""
        named = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{self.name}-", self.svg)
        return named.replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1)


@dataclass(frozen=True)
class Reading:
    """Something to unfold and read."""

    group: str
    title: str
    texts: list[tuple[str, str]]
    grids: list[Grid]


@dataclass(frozen=True)
class Section:
    """A headed part of the report."""

    title: str
    paragraphs: list[str]
    terms: list[tuple[str, str]] = field(default_factory=list)
    """Words that the section uses, and what they mean."""
    warnings: list[str] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    grids: list[Grid] = field(default_factory=list)
    readings: list[Reading] = field(default_factory=list)

    @property
    def anchor(self) -> str:
        """Where links to it go."""
        return re.sub(r"\W+", "-", self.title.lower())

    @property
    def groups(self) -> Iterator[tuple[str, list[Reading]]]:
        """Readings that stand under one heading; readings of a group follow each other."""
        for name in dict.fromkeys(reading.group for reading in self.readings):
            yield name, [reading for reading in self.readings if reading.group == name]


@dataclass(frozen=True)
class Page:
    """The whole report."""

    title: str
    models: list[tuple[str, str]]
    """Label and name of each run's model."""
    lead: list[str]
    notes: list[str]
    """What a reader must know before believing a number."""
    sections: list[Section]


def to_html(page: Page) -> str:
    """One file, without scripts or anything from outside."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    source = resources.files("mtllama.evaluate").joinpath("report.html.jinja").read_text(encoding="utf-8")
    return environment.from_string(source).render(page=page) + "\n"


def to_markdown(page: Page) -> str:
    """GitHub's Markdown; figures are files beside it."""
    models = "\n".join(f"* {_md(label)}: {_md(name)}" for label, name in page.models)
    blocks = [
        f"# {_md(page.title)}",
        models,
        *(f"**{_md(text)}**" for text in page.lead),
        *(f"> **Note.** {_md(note)}" for note in page.notes),
    ]
    for section in page.sections:
        blocks += [f"## {_md(section.title)}", *map(_md, section.paragraphs)]
        blocks += ["\n".join(f"* **{_md(term)}**: {_md(meaning)}" for term, meaning in section.terms)] if section.terms else []
        blocks += [f"> **Warning.** {_md(text)}" for text in section.warnings]
        blocks += [f"![{_md(picture.alt)}](figures/{picture.name}.png)\n\n*{_md(picture.caption)}*" for picture in section.pictures]
        blocks += [_md_grid(grid) for grid in section.grids]
        for group, readings in section.groups:
            blocks.append(f"### {_md(group)}")
            for reading in readings:
                texts = [f"{_md(label)}:\n\n{_fence(text)}" for label, text in reading.texts]
                blocks += [f"<details><summary>{_md(reading.title)}</summary>", *texts, *map(_md_grid, reading.grids), "</details>"]
    return "\n\n".join(blocks) + "\n"


def _md_grid(grid: Grid) -> str:
    rule = ["---"] + ["---" if grid.words else "---:"] * (len(grid.head) - 1)
    rows = [[_md_cell(cell) for cell in row] for row in grid.rows]
    lines = [f"| {' | '.join(row)} |" for row in (list(map(_md, grid.head)), rule, *rows)]
    return (f"**{_md(grid.title)}**\n\n" if grid.title else "") + "\n".join(lines)


def _md_cell(cell: Cell) -> str:
    text = _md(cell.text)
    return " ".join([f"**{text}**" if cell.strong and text else text, *map(_md, cell.asides)])


def _md(text: str) -> str:
    """`text` on one line, as it stands: no HTML, no Markdown, no table borders; what cannot start either is left readable."""
    safe = re.sub(r"<(?=\S)", "&lt;", " ".join(text.split()).replace("&", "&amp;"))
    return re.sub(r"([\\`*_|~#]|\](?=[(\[:]))", r"\\\1", safe)


def _fence(text: str) -> str:
    """A code block whose fence is longer than any run of backticks in it."""
    ticks = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{ticks}text\n{text}\n{ticks}"
