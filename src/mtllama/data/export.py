"""A mixture as files for other trainers: shards of prompt/completion and messages, the same bytes for any number of workers."""

import json
import multiprocessing
import multiprocessing.connection
import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mtllama import config, folders
from mtllama.data.mixture import Mixture
from mtllama.data.prompt import Format
from mtllama.errors import UserError
from mtllama.progress import progress, say

FileFormat = Literal["parquet", "jsonl"]
SETTINGS = "export.json"
"""What an unfinished export is of."""
ROW_GROUP = 1_000
"""Rows that are held in memory at a time."""


@dataclass(frozen=True)
class ExportConfig:
    """How much of a mixture is written, and how."""

    num_examples: int
    """Draws; those to which no prompt applies are left out and counted."""
    file_format: FileFormat = "parquet"
    shard_size: int = 50_000
    """Draws in one file."""

    def __post_init__(self) -> None:
        for name in ("num_examples", "shard_size"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}; at least 1 is needed")
        if self.file_format not in ("parquet", "jsonl"):
            raise UserError(f"--format is {self.file_format!r}; choose parquet or jsonl")

    @property
    def shards(self) -> list[tuple[str, range]]:
        """Name and indices of every file."""
        starts = range(0, self.num_examples, self.shard_size)
        return [
            (
                f"train-{number:05d}-of-{len(starts):05d}.{self.file_format}",
                range(start, min(start + self.shard_size, self.num_examples)),
            )
            for number, start in enumerate(starts)
        ]


def export(mixture: Mixture, format: Format, settings: ExportConfig, out: Path, *, workers: int = 1, overwrite: bool = False) -> Path:
    """Write a mixture into the folder `out`; cut off, the same call goes on with the shards that are missing.

    The unfinished export lives in `<out>.partial`.
    """
    if workers < 1:
        raise UserError(f"--workers is {workers}; at least 1 is needed")
    if format.native:
        raise UserError("the format native belongs to a checkpoint; export another one, or let the trainer template the messages column")
    folders.require_new(out, overwrite=overwrite)
    for remark in mixture.remarks():
        say(f"mixture: {remark}")
    work = out.with_name(out.name + ".partial")
    with folders.explained(work), folders.locked(work, (SETTINGS, folders.LOCK)):
        kind = {"mixture": config.to_dict(mixture.config), "format": format.name, **config.to_dict(settings), "data": mixture.data()}
        _claim(work, kind, overwrite=overwrite)
        missing = [(name, indices) for name, indices in settings.shards if not (work / f"{name}.json").is_file()]
        if len(missing) < len(settings.shards):
            say(f"going on: {len(settings.shards) - len(missing)} of {len(settings.shards)} shards are there")
        with progress("export", len(settings.shards), done=len(settings.shards) - len(missing)) as advance:
            jobs = [(work, name, indices, settings.file_format) for name, indices in missing]
            if workers == 1 or len(jobs) < 2:
                for job in jobs:
                    _write_shard(mixture, format, *job)
                    advance()
            else:
                _in_workers(mixture, format, jobs, min(workers, len(jobs)), advance)
        return _finish(mixture, format, settings, work, out)


def _claim(work: Path, wanted: dict[str, Any], *, overwrite: bool) -> None:
    if (work / SETTINGS).is_file() and not overwrite:
        if folders.read_json(work / SETTINGS) != json.loads(json.dumps(wanted)):
            raise UserError(
                f"{work} holds an unfinished export of another kind, or of other data; remove it, pass --overwrite, or choose another --out"
            )
        return
    for file in work.iterdir():
        if file.name != folders.LOCK:
            file.unlink()
    folders.write_json(work / SETTINGS, wanted)


_state: tuple[Mixture, Format]
"""What a worker process reads from."""


def _start(mixture: Mixture, format: Format, goes_on: "multiprocessing.connection.Connection") -> None:
    global _state
    _state = mixture, format
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_die_with, args=(parent.sentinel, goes_on), daemon=True).start()


def _die_with(sentinel: int, goes_on: "multiprocessing.connection.Connection") -> None:
    """A worker whose parent was killed would else wait for work for ever, one whose parent was stopped would write the shards it has begun."""
    multiprocessing.connection.wait([sentinel, goes_on])
    os._exit(1)


def _work(*job: Any) -> None:
    _write_shard(*_state, *job)


def _in_workers(mixture: Mixture, format: Format, jobs: list[tuple[Any, ...]], workers: int, advance: Callable[..., None]) -> None:
    """Spawned, not forked: the parent holds threads of Arrow and of the tokenizers."""
    context = multiprocessing.get_context("spawn")
    goes_on, held = context.Pipe(duplex=False)  # the workers see its end when what is held here is closed
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(mixture, format, goes_on)) as pool:
        futures = [pool.submit(_work, *job) for job in jobs]
        try:
            for future in as_completed(futures):
                future.result()
                advance()
        except BaseException:
            held.close()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _write_shard(mixture: Mixture, format: Format, work: Path, name: str, indices: range, file_format: FileFormat) -> None:
    """Write one shard and, when it is whole, its counts."""
    counts: Counter[str] = Counter()
    partial = work / f".{name}.{os.getpid()}.partial"
    rows = _rows(mixture, format, indices, counts)
    _write_parquet(partial, rows) if file_format == "parquet" else _write_jsonl(partial, rows)
    folders.sync(partial)
    partial.replace(work / name)
    by_task = dict(sorted(counts.items()))
    written = counts.total()
    digest = folders.sha256_file(work / name)
    folders.write_json(work / f"{name}.json", {"rows": written, "skipped": len(indices) - written, "sha256": digest, "tasks": by_task})


def _rows(mixture: Mixture, format: Format, indices: range, counts: Counter[str]) -> Iterator[dict[str, Any]]:
    for index in indices:
        draw = mixture.draw(index)
        if draw.example is None:
            continue
        counts[draw.task] += 1
        inputs, targets = draw.example.inputs, draw.example.targets
        yield {
            "index": index,
            "task": draw.task,
            "template": draw.template,
            "row": draw.row,
            "prompt": format.prompt_text(inputs),
            "completion": f" {targets}{format.end or ''}",
            "messages": [{"role": "user", "content": inputs}, {"role": "assistant", "content": targets}],
        }


def _write_jsonl(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    with open(path, "w", encoding="utf-8") as handle:
        for row in rows:
            handle.write(json.dumps(row, ensure_ascii=False) + "\n")


def _write_parquet(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    texts = [(name, pa.string()) for name in ("prompt", "completion")]
    schema = pa.schema(
        [
            ("index", pa.int64()),
            ("task", pa.string()),
            ("template", pa.string()),
            ("row", pa.int64()),
            *texts,
            ("messages", pa.list_(message)),
        ]
    )
    with pyarrow.parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        group: list[dict[str, Any]] = []
        for row in rows:
            group.append(row)
            if len(group) == ROW_GROUP:
                writer.write_table(pa.Table.from_pylist(group, schema))
                group = []
        if group:
            writer.write_table(pa.Table.from_pylist(group, schema))


def _finish(mixture: Mixture, format: Format, settings: ExportConfig, work: Path, out: Path) -> Path:
    tasks: Counter[str] = Counter()
    shards = []
    for name, _ in settings.shards:
        facts = folders.read_json(work / f"{name}.json")
        tasks.update(facts.pop("tasks"))
        shards.append({"file": f"data/{name}", **facts})
    with folders.new_folder(out, overwrite=True) as folder:
        (folder / "data").mkdir()
        for name, _ in settings.shards:
            _link(work / name, folder / "data" / name)
        folders.write_text(folder / "README.md", _readme(format, settings))
        folders.write_manifest(
            folder,
            "export",
            mixture=config.to_dict(mixture.config),
            format=format.name,
            **config.to_dict(settings),
            rows=tasks.total(),
            skipped=settings.num_examples - tasks.total(),
            tasks=dict(sorted(tasks.items())),
            files=shards,
            remarks=mixture.remarks(),
        )
    folders.remove(work)
    return out


def _link(source: Path, target: Path) -> None:
    """A second name for a file, so that nothing is lost or held twice if the last step is cut off; a copy where disks differ."""
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)


def _readme(format: Format, settings: ExportConfig) -> str:
    suffix = settings.file_format
    return f"""---
configs:
- config_name: default
  data_files: data/train-*.{suffix}
---
# A prompted mixture

{settings.num_examples} draws of a multi-task mixture, in order. What it was made of, and the hash of every file: `mtllama.json`.

| column | is |
|---|---|
| `index` | position in the mixture |
| `task`, `template`, `row` | data set, prompt, number of the row in its file |
| `prompt`, `completion` | text in the format `{format.name}`: the loss belongs on the completion{", and an EOS behind it" if format.end is None else ", which holds the end marker"} |
| `messages` | the same as a chat, for trainers that apply the model's chat template |

```python
from datasets import load_dataset

rows = load_dataset("{suffix.replace("jsonl", "json")}", data_files="data/train-*.{suffix}", split="train")
rows.select_columns(["prompt", "completion"])  # TRL: SFTTrainer(train_dataset=...), loss on the completion by default
rows.select_columns(["messages"])  # TRL and others, as a chat
```

axolotl:

```yaml
datasets:
  - path: data
    ds_type: {suffix.replace("jsonl", "json")}
    type: chat_template
    field_messages: messages
```

LLaMA-Factory, in `dataset_info.json`:

```json
{{"mixture": {{"file_name": "data", "formatting": "sharegpt", "columns": {{"messages": "messages"}},
  "tags": {{"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}}}}}}
```
"""
