"""What a run will need, before anything is paid for: memory of a rank by part, tokens, FLOPs, hours.

The model is built without memory of its own (torch's fake tensors) from its config, and one pass is traced: what autograd
keeps is counted, not guessed, for every architecture that can be trained. Nothing is downloaded but config and tokenizer.
"""

import contextlib
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from mtllama.data.batching import Batch, pack
from mtllama.data.mixture import Mixture
from mtllama.data.prompt import Encoded, PromptEncoder, find_format
from mtllama.errors import UserError
from mtllama.model.find import find_model, load_tokenizer
from mtllama.model.load import pick_device, pick_dtype, positions
from mtllama.train import lora
from mtllama.train.flops import Flops
from mtllama.train.loop import KEPT_GRADIENT
from mtllama.train.objective import HEAD_ROWS, Objective
from mtllama.train.parallel import strategy
from mtllama.train.recipe import Recipe

SAMPLE = 512
"""Examples whose lengths are looked at."""
MEAN_TOKENS = 226
"""Tokens of an example where the data is not at hand: the mean over 3,000 draws of T0's mixture (docs/scaling.md)."""
MEAN_TARGETS = 37
"""Target tokens of it."""
CONSTANT = {"cpu": 650e6, "cuda": 1.5e9}
"""Bytes that the libraries take themselves: measured on CPUs; on GPUs the usual size of a context and its work spaces."""
SLACK = 1.08
"""The allocator's share: what is freed and not yet used again. Measured on CPUs, in runs of a few steps."""
HEAP_GROWTH = {"cpu": 1.5}
"""What glibc's heap holds beyond that after hundreds of steps whose lengths differ, as a part of what a step takes and gives back (it breaks
into pieces that do not fit what comes next). Fitted to two runs of `smollm2-135m-p3`: 8.1 GB resident after 127 steps, 9.7 GB after 175."""
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "huggyllama/llama-7b": ("llama", {}),  # LlamaConfig's defaults are LLaMA-7B
    "meta-llama/Llama-3.1-8B": (
        "llama",
        {"vocab_size": 128256, "intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072},
    ),
}
"""Architectures of the shipped recipes' models, for when the hub cannot be asked."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank at the worst moment of a step, by what they hold."""

    weights: float
    gradients: float
    moments: float
    casts: float
    """Copies in the compute dtype, and the layer that is gathered from all ranks."""
    activations: float
    logits: float
    """Logits of target rows, their probabilities and gradients."""
    libraries: float
    standing: float = 0.0
    """How much of the gradients is there when the largest pass begins: no part of its own."""
    heap: float = 0.0
    """What the allocator of a CPU comes to hold beyond the rest, over many steps."""

    def parts(self) -> dict[str, float]:
        """Bytes by what they hold."""
        return {name: num for name, num in vars(self).items() if name != "standing"}

    @property
    def needed(self) -> float:
        """All but the growth of the heap, as a run of a few steps shows it. In the first pass of a step gradients grow as activations
        shrink, and the larger of the two counts; in later passes, and where gradients are kept over the steps, they are there already.
        """
        held = self.weights + self.moments + self.casts + self.standing
        return (held + max(self.gradients - self.standing, self.activations + self.logits)) * SLACK + self.libraries

    @property
    def peak(self) -> float:
        """All of it."""
        return self.needed + self.heap


@dataclass(frozen=True)
class Plan:
    """What a run will need."""

    parameters: int
    trained: int
    embedding: int
    memory: Memory
    """Of the device."""
    peak: float
    host: float
    """Bytes that are kept in the memory of the CPU in place of a GPU's, for one rank."""
    examples: int
    steps: int
    tokens: float
    targets: float
    flops: float
    """Of the whole run, over all ranks."""
    ranks: int
    remarks: tuple[str, ...]

    def hours(self, tokens_per_second: float) -> float:
        """At so many tokens a second, over all ranks."""
        return self.tokens / tokens_per_second / 3600

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        return asdict(self)


def plan(recipe: Recipe, *, ranks: int = 1, device: torch.device | None = None) -> Plan:
    """Plan a run of the recipe on `ranks` processes, each with a device of this kind (default: what is here)."""
    device = device or pick_device()
    remarks: list[str] = []
    config, files = _config(recipe, remarks)
    train = recipe.train
    longest = min(train.max_length, positions(config, train=True))
    lengths, longest, mean, mean_targets = _examples(recipe, files, longest, remarks)
    away = (
        device.type != "cpu" and not torch.cuda.is_available()
    )  # a GPU that is not here multiplies bfloat16, as all do that one trains on
    compute = torch.bfloat16 if away and train.dtype == "auto" else pick_dtype(train.dtype, device)
    sharded = strategy(recipe.parallel, ranks) == "fsdp"
    share = ranks if sharded else 1
    largest = _largest_pass(-(-train.batch_size // ranks), longest, train.tokens_per_pass)
    model, kept = _trace(recipe, config, largest, compute, device)
    parameters = list(model.parameters())
    total = sum(parameter.numel() for parameter in parameters)
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    layers = model.get_decoder().layers
    matrices = sum(parameter.numel() for parameter in layers.parameters() if parameter.ndim == 2)
    head = model.get_output_embeddings().weight.numel()
    narrow = compute.itemsize if compute != torch.float32 else 0
    if sharded:  # one layer is there in the compute dtype, the next one comes; embedding and head are gathered as they are
        rest = total - sum(parameter.numel() for parameter in layers.parameters())
        # Adapters' bases are in the compute dtype, and so gathered; of a head that is trained there is a copy in it, too.
        casts = 2 * matrices / len(layers) * (narrow or 4) + (rest * compute.itemsize if recipe.lora else rest * 4 + head * narrow)
    else:
        # With adapters the base is in the compute dtype already; on a CPU a head that is trained is cast slice by slice.
        casts = 0 if recipe.lora else (matrices + (0 if device.type == "cpu" else head)) * narrow
    frozen = (compute.itemsize if recipe.lora else 4) * (total - trained)
    rows = min(sum(example.num_target for example in largest), HEAD_ROWS)
    large = [each.numel() for each in parameters if each.requires_grad and each.numel() > KEPT_GRADIENT and device.type == "cpu"]
    several = -(-train.batch_size // ranks) * longest > max(train.tokens_per_pass, longest)
    memory = Memory(
        weights=(4 * trained + frozen) / share,
        gradients=4 * trained / share,
        moments=8 * trained / share,
        casts=casts,
        activations=kept,
        logits=3.0 * 4 * rows * model.config.vocab_size,
        libraries=CONSTANT.get(device.type, CONSTANT["cuda"]),
        standing=4 * (trained if several else sum(large)) / share,
    )
    returned = memory.gradients + memory.casts + memory.activations + memory.logits
    memory, host = replace(memory, heap=HEAP_GROWTH.get(device.type, 0.0) * returned), 0.0
    if recipe.parallel.cpu_offload and device.type != "cpu":
        host = memory.weights + memory.gradients + memory.moments
        # Rows come to the device as they are kept, in float32, to be cast there.
        coming = 4 * sum(parameter.numel() for parameter in layers.parameters()) / len(layers) / share
        memory = replace(memory, weights=0.0, gradients=0.0, standing=0.0, moments=0.0, casts=memory.casts + coming)
    flops = Flops.of(model)
    one = flops.step(lengths, 0) / len(lengths) + flops.step([], 1) * mean_targets
    return Plan(
        total,
        trained,
        model.get_input_embeddings().weight.numel(),
        memory,
        memory.peak,
        host,
        train.examples,
        train.num_steps,
        train.examples * mean,
        train.examples * mean_targets,
        train.examples * one,
        ranks,
        tuple(remarks),
    )


def _config(recipe: Recipe, remarks: list[str]) -> tuple[Any, Any]:
    """The model's config, and the folder of its tokenizer if there is one."""
    from transformers import AutoConfig

    try:
        files = find_model(recipe.model, recipe.base, recipe.delta, weights=False).files
    except UserError as error:
        kind, settings = SHAPES.get(recipe.model or "", (None, {}))
        if kind is None:
            raise
        remarks.append(f"{error}; its shape is known")
        return AutoConfig.for_model(kind, **settings), None
    try:
        return AutoConfig.from_pretrained(files, local_files_only=True), files
    except Exception as error:  # the library raises many kinds for a config that it cannot read
        raise UserError(f"{files}/config.json cannot be read ({' '.join(str(error).split())[:160]})") from error


def _examples(recipe: Recipe, files: Any, longest: int, remarks: list[str]) -> tuple[list[int], int, float, float]:
    """Lengths of some examples of the run, that of the longest to be expected, the mean number of their tokens, and of their targets."""
    train = recipe.train
    try:
        if files is None:
            raise UserError("there is no tokenizer to count with")
        encoder = PromptEncoder(load_tokenizer(files), find_format(recipe.format), longest)
        mixture = Mixture(recipe.mixture)
        draws = [mixture.draw(index) for index in range(min(train.examples, SAMPLE))]
        found = [each for each in encoder.encode_batch([(d.example.inputs, d.example.targets) for d in draws if d.example]) if each]
        if not found:
            raise UserError("none of the first draws gives an example")
    except UserError as error:
        remarks.append(f"an example is taken to have {MEAN_TOKENS} tokens, {MEAN_TARGETS} of them trained on: {error}")
        tokens = min(MEAN_TOKENS, longest)
        return [tokens], longest, tokens, min(MEAN_TARGETS, tokens - 1)
    num, lengths = len(draws), [len(each.ids) for each in found]
    return lengths, max(lengths), sum(lengths) / num, sum(each.num_target for each in found) / num


def _largest_pass(num_examples: int, longest: int, tokens_per_pass: int) -> list[Encoded]:
    """The largest pass that a rank can meet, with so many examples a step: all of them are as long as the longest, and trained on throughout.

    The worst moment of a run is not that of its average step: one example in a hundred thousand is met sooner or later.
    """
    tokens = min(num_examples * longest, max(tokens_per_pass, longest))
    lengths = [longest] * (tokens // longest) + [tokens % longest] * (tokens % longest > 1)
    return [Encoded([0] * length, length - 1, cut=False) for length in lengths]


def _materialize(model: Any) -> None:
    """Put tensors of the current mode, on the CPU, in the places of those on `meta`; what is tied stays so."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, old in tensors.items():
                if old is not None:
                    if id(old) not in made:
                        new = torch.empty(old.shape, dtype=old.dtype)
                        made[id(old)] = torch.nn.Parameter(new, old.requires_grad) if isinstance(old, torch.nn.Parameter) else new
                    tensors[name] = made[id(old)]


def _trace(recipe: Recipe, config: Any, examples: list[Encoded], compute: torch.dtype, device: torch.device) -> tuple[Any, float]:
    """A model without memory, and the bytes that autograd keeps of a pass over these examples."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    from mtllama.model.attention import SEGMENTS, forget_masks

    train = recipe.train
    batch = next(pack(examples, sum(len(example.ids) for example in examples)))
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"{config.model_type} is no causal language model of transformers")
    with torch.device("meta"):
        model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._from_config(
            config,
            attn_implementation=SEGMENTS if device.type == "cpu" else "sdpa",  # our attention on CPUs keeps more than that on GPUs
            dtype=compute if recipe.lora else torch.float32,
        )
    if recipe.lora:
        lora.add(model, recipe.lora)
    with contextlib.ExitStack() as stack:
        stack.callback(forget_masks)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        _materialize(model)
        model.train()
        full = _kept(model, batch, compute)
        if not train.activation_checkpointing:
            return model, full
        model.gradient_checkpointing_enable({"use_reentrant": False})
        # In the backward pass, one layer at a time is there in full.
        return model, _kept(model, batch, compute) + full / config.num_hidden_layers


def _kept(model: Any, batch: Batch, compute: torch.dtype) -> float:
    """Bytes that autograd keeps of a pass; the weights and their copies in the compute dtype not counted."""
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    shapes = {tuple(sorted(parameter.shape)) for parameter in model.parameters() if parameter.ndim == 2}
    kept: dict[int, tuple[torch.Tensor, int]] = {}  # the tensors too, so that no storage is taken for another one's

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        is_copy = tensor.dtype == compute != torch.float32 and tuple(sorted(tensor.shape)) in shapes
        if storage._cdata not in own and not is_copy:
            kept[storage._cdata] = tensor, storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        Objective(model, compute)(batch)
    return float(sum(num for _, num in kept.values()))
