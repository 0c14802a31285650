"""Where the rows of a data set are: local files, found by one file rule, or the Hugging Face hub.

The file rule: `[train/|eval/]<set>[/<config>]/[<config>.]<split>[.<note>].<jsonl|jsonl.gz|csv|parquet>`, where `<set>`
is the catalogue name or the hub id (its `/` a folder or `_`).
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtllama import hub
from mtllama.errors import UserError

Row = dict[str, Any]
SUFFIXES = (".jsonl", ".jsonl.gz", ".csv", ".parquet")
PARTS = ("train", "eval")
"""Folders of a data folder that may hold sets too."""


@dataclass(frozen=True)
class Location:
    """Where the rows of a data set may lie, on the hub and in a local folder."""

    hub_id: str
    config: str | None = None
    revision: str | None = None
    """Revision of the hub repository that holds parquet, where its main branch is a loading script."""
    local: tuple[str, ...] = ()
    """Further names of the local folder."""
    local_config: str | None = None
    """The config as it stands in local file names, where that differs from the hub's."""
    local_prefix: dict[str, str] | None = None
    """Column -> how its values begin in the rows of this set, where one local file holds several sub-sets."""
    hub_prefix: dict[str, str] | None = None
    """The same for the hub's rows."""
    splitless: bool = False
    """Local files carry no split in their name (XQuAD)."""


@dataclass(frozen=True)
class DataFile:
    """One local file of rows."""

    path: Path
    split: str
    note: str
    shared: bool = dataclasses.field(default=False, compare=False)
    """Whether it lies in a folder that other sub-sets share."""


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
    folders: dict[Path, tuple[str | None, bool]] = {}  # folder -> config that a file's name must carry; whether it is shared
    for root in (data_dir, *(data_dir / part for part in PARTS)):
        for each in sets:
            own = each == name or each in location.local
            shared = location.local_prefix is not None and each in location.local
            folders[root / each] = (None if own else config, shared)
            if config:
                folders[root / each / config] = folders[root / f"{each}_{config}"] = (None, False)
    for folder, (needed, shared) in folders.items():
        if not folder.is_dir():
            continue
        for path in sorted(folder.iterdir()):
            suffix = next((s for s in SUFFIXES if path.name.endswith(s)), None)
            if suffix is None or not path.is_file():
                continue
            stem = path.name.removesuffix(suffix).removesuffix("-00000-of-00001")  # as the hub names a file that is alone
            if config and (stem + ".").startswith(config + "."):
                stem = stem[len(config) + 1 :]
            elif config and (needed or _other_config(stem)):
                continue
            split, _, note = ("", "", stem) if location.splitless else stem.partition(".")
            yield DataFile(path, split, note, shared)


def _other_config(stem: str) -> bool:
    """Whether a file name begins with a config rather than a split, as `cb.validation` does."""
    first = stem.split(".")[0]
    return not first.startswith(("train", "validation", "test", "dev", "eval"))


def read_hub(name: str, location: Location, split: str) -> Sequence[Row]:
    """Rows of one split from the Hugging Face hub (or its local cache), memory-mapped."""
    advice = f"pass --data-dir with a file {name}/{split}.jsonl"
    reason = hub.unreachable()
    if reason and not hub.offline():  # offline, the client looks into its cache and is done; else it would retry
        raise UserError(f"{name}: no local file, and the hub cannot be asked for {location.hub_id} ({reason}); {advice}")
    import datasets

    config, files = location.config, None
    if location.revision:  # the hub's parquet copies of a repository that holds a script: a folder per config and split
        config, files = None, {split: f"{location.config or 'default'}/{split}/*.parquet"}
    try:
        rows = datasets.load_dataset(location.hub_id, config, data_files=files, revision=location.revision, split=split)
    except Exception as error:  # the hub client raises many kinds; each means the same to the user
        why = f"{reason}, and it is not in the local cache" if reason else " ".join(str(error).split())[:200]
        raise UserError(f"{name}: no local file, and {location.hub_id} cannot be had from the hub ({why}); {advice}") from error
    found: Sequence[Row] = rows
    return found
