"""A run that is not done: its records on disk, block by block, so that a killed run goes on where it was, on any number of ranks.

A block is some rows of a task through all its templates. What a model says of one depends on nothing outside it, so the numbers
of a run that was cut off, or shared among ranks, are those of one that was not. A block counts when all its records are there.
"""

import contextlib
import json
import os
import shutil
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

from mtllama import folders
from mtllama.errors import UserError
from mtllama.evaluate.items import Item
from mtllama.evaluate.protocols import Kind, Record

RECORDS, SETTINGS = "records.jsonl", "settings.json"
_APART = 0.05
"""Nat, in the mean over tokens."""
_PATIENCE = timedelta(days=7)
"""How long a rank waits for the others; one that fails is noticed by the launcher, which ends them all."""

Key = tuple[str, str, int, str]
"""Task, template, row and kind of a record."""


@dataclass(frozen=True)
class Ranks:
    """This process and those beside it, started by `torchrun`: each asks its share of the blocks, the first writes the results."""

    rank: int = 0
    size: int = 1

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.size > 1:
            import torch.distributed as dist

            dist.barrier()


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """The ranks that a launcher started, or this process alone. To be entered before the model is loaded: it takes this rank's GPU."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Ranks()
        return
    import torch
    import torch.distributed as dist

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("gloo", timeout=_PATIENCE)  # nothing is exchanged but "I am here"
    try:
        yield Ranks(dist.get_rank(), size)
    finally:
        dist.destroy_process_group()


@dataclass(frozen=True)
class Block:
    """What is asked in one go, and kept or lost as a whole."""

    kind: Kind
    items: Sequence[Item]

    @cached_property
    def keys(self) -> list[tuple[Key, str]]:
        """The keys of its records, and the digests of what they are asked."""
        return [((item.task, item.template, item.row, self.kind), item.sha256) for item in self.items]


class Journal:
    """The unfinished run in the folder `work`; only one process, or the ranks of one run, at a time."""

    def __init__(self, work: Path, settings: dict[str, Any], blocks: Sequence[Block], ranks: Ranks, *, overwrite: bool) -> None:
        """Take up what is in the folder, or begin anew. Other settings are refused, unless `overwrite`."""
        self.work, self.blocks, self.ranks = work, blocks, ranks
        self._own = work / (RECORDS if ranks.rank == 0 else f"records.{ranks.rank}.jsonl")
        with folders.explained(work):
            self._held = contextlib.ExitStack()
            if ranks.rank == 0:
                with contextlib.ExitStack() as held:
                    held.enter_context(folders.locked(work, (SETTINGS, folders.LOCK)))
                    self._claim(json.loads(json.dumps(settings)), overwrite=overwrite)
                    self._held = held.pop_all()
            ranks.wait()
            if not (work / SETTINGS).is_file():
                raise UserError(f"rank {ranks.rank} does not see {work}: --out must be on a file system that all machines share")
            self.done = self._read()

    @property
    def mine(self) -> list[Block]:
        """The blocks that are this rank's to ask."""
        return [block for number, block in enumerate(self.blocks) if number % self.ranks.size == self.ranks.rank]

    def left(self) -> list[Block]:
        """Those of them that it still has to ask."""
        return [block for block in self.mine if not self._whole(block, self.done)]

    def append(self, records: Sequence[Record]) -> None:
        """Keep the records of a block."""
        with folders.explained(self._own), open(self._own, "a", encoding="utf-8") as handle:
            handle.write("".join(json_line(record) for record in records))
            handle.flush()
            os.fsync(handle.fileno())

    def records(self) -> list[Record]:
        """All records, in the order of the blocks; every block must have been asked."""
        found = self._read()
        return [found[key] for block in self.blocks for key, _ in block.keys]

    def close(self, *, remove: bool) -> None:
        """Let go of the folder; `remove` it where its records stand elsewhere now."""
        if remove:
            folders.remove(self.work)
        self._held.close()

    def _claim(self, settings: dict[str, Any], *, overwrite: bool) -> None:
        if overwrite:
            for file in self.work.iterdir():
                if file.name != folders.LOCK:
                    shutil.rmtree(file) if file.is_dir() else file.unlink()
        if (self.work / SETTINGS).is_file():
            before = folders.read_json(self.work / SETTINGS)
            odd = [name for name in {**before, **settings} if not _same(before.get(name), settings.get(name))]
            if odd:
                was, now = (json.dumps(each.get(odd[0]), ensure_ascii=False)[:80] for each in (before, settings))
                raise UserError(
                    f"{self.work} holds an unfinished run with another {' and another '.join(odd)} ({odd[0]}: {was}, now {now}); "
                    "give the settings it began with, pass --overwrite, or choose another --out"
                )
        else:
            folders.write_json(self.work / SETTINGS, settings)
        # What a kill left of a block goes, and with it a line that was cut off: the files grow by whole lines again.
        found = self._read()
        whole = [block for block in self.blocks if self._whole(block, found)]
        folders.write_text(self.work / RECORDS, "".join(json_line(found[key]) for block in whole for key, _ in block.keys))
        for file in self.work.glob("records.*.jsonl"):
            file.unlink()

    def _read(self) -> dict[Key, Record]:
        found: dict[Key, Record] = {}
        for file in (self.work / RECORDS, *sorted(self.work.glob("records.*.jsonl"))):
            if file.is_file():
                with open(file, encoding="utf-8", errors="replace") as lines:
                    found.update({_key(record): record for record in _whole_lines(lines)})
        return found

    def _whole(self, block: Block, found: dict[Key, Record]) -> bool:
        return all(key in found and found[key]["sha256"] == sha256 for key, sha256 in block.keys)


def _same(before: Any, now: Any) -> bool:
    """Whether a setting is the same; numbers may be as far apart as those that a server computes of one model twice, in 16 bits."""
    lists = isinstance(before, list) and isinstance(now, list) and len(before) == len(now) > 0
    if not lists or not all(isinstance(value, float) for value in (*before, *now)):
        return bool(before == now)
    return statistics.fmean(abs(a - b) for a, b in zip(before, now, strict=True)) <= _APART


def json_line(record: Record) -> str:
    """A record as a line of the file."""
    return json.dumps(record, ensure_ascii=False) + "\n"


def _key(record: Record) -> Key:
    return record["task"], record["template"], record["row"], record["kind"]


def _whole_lines(lines: Iterable[str]) -> Iterator[Record]:
    """The records that can be read; what cannot is asked again."""
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):
            if line.endswith("\n"):
                yield json.loads(line)
