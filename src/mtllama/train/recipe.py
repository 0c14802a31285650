"""A recipe: everything that a training run depends on, in one YAML file."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Literal

from mtllama import folders
from mtllama.config import load_config, override
from mtllama.data.mixture import MixtureConfig
from mtllama.data.prompt import DEFAULT_FORMAT, find_format
from mtllama.errors import UserError
from mtllama.model.find import Dtype

RECIPE, DATA, CHANGES = "recipe.json", "data.json", "changes.json"
"""In the folder of a run that is not done: its recipe, what its data was when it began, and the values of `train` that changed on the way
by the first step that each were in force for."""


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
    """Compute dtype; what is trained is always kept in float32."""
    activation_checkpointing: bool = False
    """Compute the inside of a layer anew in the backward pass in place of keeping it: less memory, a third more work."""
    compile: bool = False
    """Compile the decoder layers (torch.compile); the first steps take longer by as long as that takes. Not together with
    activation_checkpointing, under which torch does not compile layers that call what it cannot, as segment attention."""
    spike: float = 20.0
    """A step whose gradient norm is that many times the median of those before is passed over, as one is whose loss is no number;
    three in a row end the run. 0: spikes are taken as they come."""
    tensorboard: bool = False
    """Write the figures of metrics.jsonl for TensorBoard, too (`pip install 'mtllama[tensorboard]'`)."""
    save_every: int = 100
    """Steps between checkpoints."""
    keep: int = 2
    """Checkpoints kept while the run goes on."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("examples", "batch_size", "max_length", "tokens_per_pass", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name} is {getattr(self, name)}; at least 1 is needed")
        for name in ("lr", "warmup_ratio", "weight_decay", "max_grad_norm", "spike"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"train.{name} is {getattr(self, name)}; a finite number is needed")
        if self.spike and self.spike <= 1:
            raise ValueError(f"train.spike is {self.spike}; a factor above 1 is needed, or 0 for none")
        if self.lr <= 0 or self.max_grad_norm <= 0:
            raise ValueError("train.lr and train.max_grad_norm must be positive")
        if self.weight_decay < 0:
            raise ValueError(f"train.weight_decay is {self.weight_decay}; it cannot be negative")
        if self.compile and self.activation_checkpointing:
            raise ValueError("train.compile and train.activation_checkpointing do not go together; set one of them to false")
        if not 0 <= self.warmup_ratio < 1:
            raise ValueError(f"train.warmup_ratio is {self.warmup_ratio}; it is a part of the run, from 0 to below 1")

    @property
    def num_steps(self) -> int:
        """Optimiser steps of the run; the last one may hold fewer examples."""
        return -(-self.examples // self.batch_size)

    def indices(self, step: int) -> range:
        """Positions in the mixture that the step with this number (from 0) is made of."""
        return range(step * self.batch_size, min((step + 1) * self.batch_size, self.examples))


@dataclass(frozen=True)
class ParallelConfig:
    """How the processes of a run share the work (train/parallel.py). Their number is the launcher's to say."""

    strategy: Literal["auto", "none", "ddp", "fsdp"] = "auto"
    """`fsdp`: each rank keeps its rows of weights, gradients and moments; `ddp`: each keeps all of them; `auto`: fsdp where there
    are several ranks, else none."""
    cpu_offload: bool = False
    """With fsdp: weights, gradients and moments lie in the memory of the CPU between uses."""

    def __post_init__(self) -> None:
        if self.cpu_offload and self.strategy in ("none", "ddp"):
            raise ValueError(f"parallel.cpu_offload goes with parallel.strategy fsdp, not {self.strategy}")


@dataclass(frozen=True)
class LoraConfig:
    """Train low-rank adapters in place of the weights (train/lora.py); the base stays as it is, in the compute dtype."""

    rank: int = 16
    alpha: float = 32.0
    """The product of the two factors counts alpha / rank."""
    dropout: float = 0.0
    """Of what goes into the adapters."""
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Last parts of the names of the matrices that get one."""
    merge: bool = True
    """The result is a normal model folder with the product added; else it is an adapter folder as peft reads it."""

    def __post_init__(self) -> None:
        if self.rank < 1 or not 0 < self.alpha < math.inf or not self.targets:
            raise ValueError("lora.rank must be at least 1, lora.alpha positive, and lora.targets must name a matrix")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout is {self.dropout}; from 0 to below 1 is needed")


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
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    save_dtype: Dtype = "auto"
    """Dtype of the result's weights; `auto`: that of the base (so adapters that are merged always). What is trained is float32: narrower, it is rounded."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    lora: LoraConfig | None = None
    """None: all weights are trained."""

    def __post_init__(self) -> None:
        find_format(self.format)
        if self.lora and self.save_dtype != "auto":
            raise ValueError("save_dtype is for models whose weights are all trained; with lora the result has the dtype of its base")
        if not self.out.resolve().name:
            raise ValueError(f"out is {self.out}; a folder that has a name is needed")

    def beside(self, kind: str) -> Path:
        """The folder `<out>.<kind>`, for what is not the result."""
        out = self.out.resolve()  # "." has no name
        return out.with_name(f"{out.name}.{kind}")


def load_recipe(recipe: Path, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe that is shipped, by its name (`quickstart`), or from a YAML file or the folder of a run (by its full path, if it has such a name).

    `key=value` words win over it.
    """
    shipped = {file.name.removesuffix(".yaml"): Path(str(file)) for file in resources.files("mtllama").joinpath("recipes").iterdir()}
    if str(recipe) in shipped:
        return load_config(Recipe, shipped[str(recipe)], overrides)
    if recipe.is_dir():
        return _recipe_of_run(recipe, overrides)
    if not recipe.exists():
        raise UserError(f"no recipe {recipe}: neither a file, nor the folder of a run, nor a name ({', '.join(sorted(shipped))})")
    return load_config(Recipe, recipe, overrides)


def _recipe_of_run(folder: Path, overrides: Sequence[str]) -> Recipe:
    """What a training run was made by, whether it is done or not."""
    for file, key in ((folder / folders.MANIFEST, "recipe"), (folder / RECIPE, None)):
        values = folders.read_json(file) if file.is_file() else {}
        values = values.get(key) if key else values
        if values:
            return override(Recipe, values, str(file), overrides)
    raise UserError(f"{folder} is not the folder of a training run ({folders.MANIFEST} or {RECIPE} with a recipe is needed)")
