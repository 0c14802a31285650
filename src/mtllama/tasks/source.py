"""Rows of a data set: from local files by one file rule, or from the Hugging Face hub.

The file rule: `<set>[/<config>]/[<config>.]<split>[.<note>].<jsonl|jsonl.gz|csv|parquet>`, where `<set>` is the
catalogue name or the hub id (its `/` a folder or `_`).
"""

import dataclasses
import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtllama import hub
from mtllama.errors import UserError

Row = dict[str, Any]
SUFFIXES = (".jsonl", ".jsonl.gz", ".csv", ".parquet")


@dataclass(frozen=True)
class Location:
    """Where the rows of a data set may lie, on the hub and in a local folder."""

    hub_id: str
    config: str | None = None
    revision: str | None = None
    local: tuple[str, ...] = ()
    """Further names of the local folder."""
    local_config: str | None = None
    """The config as it stands in local file names, where that differs from the hub's."""
    splitless: bool = False
    """Local files carry no split in their name (XQuAD)."""


@dataclass(frozen=True)
class DataFile:
    """One local file of rows."""

    path: Path
    split: str
    note: str


def find_file(name: str, location: Location, data_dir: Path, splits: tuple[str, ...]) -> DataFile | None:
    """The file of the first of `splits` that is there; two files for one split are an error, none is None."""
    if not data_dir.is_dir():
        raise UserError(f"data folder {data_dir} does not exist; check --data-dir")
    found = list(_candidates(name, location, data_dir))
    for split in splits:
        fits = {file.path.resolve(): file for file in found if file.split == split or location.splitless}
        if len(fits) > 1:
            paths = " and ".join(str(file.path) for file in fits.values())
            raise UserError(f"{name}: two files for the split {split}: {paths}; keep one in the data folder")
        if fits:
            return dataclasses.replace(next(iter(fits.values())), split=split)
    return None


def _candidates(name: str, location: Location, data_dir: Path) -> Iterator[DataFile]:
    config = location.local_config or location.config
    sets = dict.fromkeys((name, *location.local, location.hub_id, location.hub_id.replace("/", "_"), location.hub_id.split("/")[-1]))
    folders: dict[Path, str | None] = {}  # folder -> config that a file's name must carry, or "" where it may
    for each in sets:
        own = each == name or each in location.local
        folders[data_dir / each] = None if own else config
        if config:
            folders[data_dir / each / config] = None
            folders[data_dir / f"{each}_{config}"] = None
    for folder, needed in folders.items():
        if not folder.is_dir():
            continue
        for path in sorted(folder.iterdir()):
            suffix = next((s for s in SUFFIXES if path.name.endswith(s)), None)
            if suffix is None or not path.is_file():
                continue
            stem = path.name.removesuffix(suffix)
            if config and (stem + ".").startswith(config + "."):
                stem = stem[len(config) + 1 :]
            elif config and (needed or _other_config(stem)):
                continue
            split, _, note = ("", "", stem) if location.splitless else stem.partition(".")
            yield DataFile(path, split, note)


def _other_config(stem: str) -> bool:
    """Whether a file name begins with a config rather than a split, as `cb.validation` does."""
    first = stem.split(".")[0]
    return not first.startswith(("train", "validation", "test", "dev"))


def read_rows(path: Path) -> list[Row]:
    """All rows of a local file; a broken one is an error with file and line (or row group)."""
    try:
        if path.suffix in (".parquet", ".csv"):
            return _read_table(path)
        opener: Any = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8") as handle:
            return list(_read_jsonl(path, handle))
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); mend or replace the file") from error


def _read_jsonl(path: Path, lines: Any) -> Iterator[Row]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: not valid JSON ({error.msg}); mend or remove the line") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: a JSON object is needed, not {type(row).__name__}")
        yield row


def _read_table(path: Path) -> list[Row]:
    """A parquet or csv file; csv columns get the types that their values show (a label `1` is a number)."""
    import pyarrow
    import pyarrow.csv
    import pyarrow.parquet

    try:
        if path.suffix == ".csv":
            options = pyarrow.csv.ParseOptions(newlines_in_values=True)
            return list(pyarrow.csv.read_csv(path, parse_options=options).to_pylist())
        return list(pyarrow.parquet.read_table(path).to_pylist())
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read ({' '.join(str(error).split())}); mend it or fetch it again") from error


def read_hub(name: str, location: Location, split: str) -> list[Row]:
    """Rows of one split from the Hugging Face hub (or its local cache)."""
    advice = f"pass --data-dir with a file {name}/{split}.jsonl"
    reason = hub.unreachable()
    if reason and not hub.offline():  # offline, the client looks into its cache and is done; else it would retry
        raise UserError(f"{name}: no local file, and the hub cannot be asked for {location.hub_id} ({reason}); {advice}")
    import datasets

    try:
        rows = datasets.load_dataset(location.hub_id, location.config, revision=location.revision, split=split)
    except Exception as error:  # the hub client raises many kinds; each means the same to the user
        why = f"{reason}, and it is not in the local cache" if reason else " ".join(str(error).split())[:200]
        raise UserError(f"{name}: no local file, and {location.hub_id} cannot be had from the hub ({why}); {advice}") from error
    return [dict(row) for row in rows]
