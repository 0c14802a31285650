"""A recipe: everything that a training run depends on, in one YAML file."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Literal

from mtllama.config import load_config
from mtllama.data.mixture import MixtureConfig
from mtllama.data.prompt import DEFAULT_FORMAT, find_format
from mtllama.model.load import Dtype


@dataclass(frozen=True)
class TrainConfig:
    """How the weights move."""

    examples: int
    """Examples drawn from the mixture in the whole run."""
    batch_size: int = 16
    """Examples per optimiser step, over all passes."""
    lr: float = 2e-5
    """Peak learning rate of AdamW."""
    warmup_ratio: float = 0.03
    """Part of the steps in which the learning rate rises from zero."""
    schedule: Literal["cosine", "constant"] = "cosine"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    max_length: int = 2048
    """Longest example in tokens; a longer prompt loses its middle, and is counted."""
    tokens_per_pass: int = 2048
    """Tokens in one forward and backward pass: bounds the memory of activations."""
    dtype: Dtype = "auto"
    """Compute dtype; the weights themselves are always trained in float32."""
    save_every: int = 100
    """Steps between checkpoints."""
    keep: int = 2
    """Checkpoints kept while the run goes on."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("examples", "batch_size", "max_length", "tokens_per_pass", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name} is {getattr(self, name)}; at least 1 is needed")
        if self.lr <= 0 or self.max_grad_norm <= 0:
            raise ValueError("train.lr and train.max_grad_norm must be positive")
        if not 0 <= self.warmup_ratio < 1:
            raise ValueError(f"train.warmup_ratio is {self.warmup_ratio}; it is a part of the run, from 0 to below 1")

    @property
    def num_steps(self) -> int:
        """Optimiser steps of the run; the last one may hold fewer examples."""
        return -(-self.examples // self.batch_size)


@dataclass(frozen=True)
class Recipe:
    """What is trained, on what, how, and where the result goes."""

    out: Path
    """Folder of the trained model. While the run goes on, its state is in `<out>.partial`."""
    train: TrainConfig
    model: str | None = None
    """Name, folder or hub id of the model to start from; or `base` and `delta`."""
    base: str | None = None
    delta: str | None = None
    name: str = "tuned"
    """What tables call the result, after the name of its base."""
    format: str = DEFAULT_FORMAT
    """Prompt format; it travels with the result as its chat template."""
    data: MixtureConfig = field(default_factory=MixtureConfig)

    def __post_init__(self) -> None:
        find_format(self.format)


def load_recipe(recipe: Path, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe from a YAML file, or one that is shipped, by its name (`quickstart`); `key=value` words win over it."""
    shipped = Path(str(resources.files("mtllama").joinpath("recipes", recipe.name + ".yaml")))
    return load_config(Recipe, shipped if not recipe.exists() and shipped.is_file() else recipe, overrides)
