"""The mixture: a pure function of (settings, seed, index) -> Example, on Grain.

Every data set is shuffled and covered once before it repeats; a row's templates take turns, so all templates of a
data set have the same share. Data sets are mixed by their rates.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import grain

from mtllama.errors import UserError
from mtllama.tasks.catalog import Rows, catalog, data_folder, find_tasks, load_rows
from mtllama.tasks.template import Example

T0_CAP = 500_000


@dataclass(frozen=True)
class MixtureConfig:
    """Which data sets, at which rates."""

    dir: Path | None = None
    """`sampler` for the embedded data, a folder, or none for the hub."""
    tasks: dict[str, float] | tuple[str, ...] | None = None
    """Names of training sets, or a weight for each; none means every training set that is there."""
    rule: Literal["t0-code", "weights"] = "t0-code"
    """`t0-code`: rate = rows x templates, where a set of over 500,000 rows counts 500,000 // templates for each of
    its templates; `weights`: the given weights are the shares."""
    split: str = "train"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rule == "weights" and not isinstance(self.tasks, dict):
            raise ValueError("data.rule=weights needs data.tasks as a mapping of names to weights")
        if self.rule != "weights" and isinstance(self.tasks, dict):
            raise ValueError(
                f"data.tasks gives weights, which data.rule={self.rule} does not use; set data.rule=weights, or list the names"
            )
        if self.tasks is not None and not self.tasks:
            raise ValueError("data.tasks is empty; name at least one data set, or leave the key out to take every one that is there")
        if self.seed < 0:
            raise ValueError(f"data.seed is {self.seed}; 0 or more is needed")
        for name, weight in (self.tasks if isinstance(self.tasks, dict) else {}).items():
            if not 0 < weight < float("inf"):
                raise ValueError(f"data.tasks.{name} is {weight}; a positive number is needed")


@dataclass(frozen=True)
class Rate:
    """One data set's part of a mixture."""

    rows: Rows
    rate: float
    share: float


class Mixture:
    """Random access to the endless stream of examples: `mixture[index]`.

    An element is None where no template applies to the drawn row.
    """

    def __init__(self, config: MixtureConfig) -> None:
        self.config = config
        parts = [(rows, _rate(rows, config)) for rows in _load(config)]
        total = sum(rate for _, rate in parts)
        self.rates = tuple(Rate(rows, rate, rate / total) for rows, rate in parts)
        self.num_rows = sum(len(part.rows.rows) for part in self.rates)
        streams = [
            grain.MapDataset.range(len(part.rows.rows))
            .seed(config.seed + 7919 * position)
            .shuffle()
            .repeat()
            .map_with_index(_Renderer(part.rows, config.seed))
            for position, part in enumerate(self.rates)
        ]
        self._mixed = grain.MapDataset.mix(streams, weights=[part.share for part in self.rates])

    def __getitem__(self, index: int) -> Example | None:
        example: Example | None = self._mixed[index]
        return example

    def family(self, task: str) -> str:
        """The family of a data set of this mixture."""
        return catalog()[task].family


class _Renderer(grain.transforms.MapWithIndex):  # type: ignore[misc]
    """(position in the set's stream, row number) -> Example; every pass takes the row's next template."""

    def __init__(self, rows: Rows, seed: int) -> None:
        self.rows, self.seed = rows, seed

    def map_with_index(self, index: int, element: int) -> Example | None:
        prompts = self.rows.task.prompts
        first = element + index // len(self.rows.rows)
        for offset in range(len(prompts)):
            template = prompts[(first + offset) % len(prompts)]
            example = self.rows.render(int(element), template, seed=self.seed)
            if example is not None:
                return example
        return None


def _load(config: MixtureConfig) -> list[Rows]:
    folder = data_folder(config.dir)
    if config.tasks is not None:
        tasks = find_tasks(config.tasks)
        for task in tasks:
            if task.role != "train":
                raise UserError(f"{task.name} is held out for evaluation ({task.role}); take it out of data.tasks")
        return [load_rows(task, folder, config.split) for task in tasks]
    if folder is None:
        raise UserError("data.dir is none: name the data sets to fetch from the hub in data.tasks")
    found = []
    for task in (task for task in catalog().values() if task.role == "train"):
        try:
            found.append(load_rows(task, folder, config.split))
        except UserError as error:
            if "no file for the split" not in str(error):
                raise
    if not found:
        raise UserError(f"no training set with a split {config.split} in {folder}; see: mtllama tasks list")
    return found


def _rate(rows: Rows, config: MixtureConfig) -> float:
    if config.rule == "weights":
        assert isinstance(config.tasks, Mapping)
        return config.tasks[rows.task.name]
    size, num_templates = len(rows.rows), len(rows.task.prompts)
    return float(size * num_templates if size <= T0_CAP else T0_CAP // num_templates * num_templates)
