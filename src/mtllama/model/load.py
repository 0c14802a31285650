"""A model that was found -> a model and its tokenizer in memory."""

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from mtllama import folders
from mtllama.data.prompt import DEFAULT_FORMAT, Format, find_format
from mtllama.errors import UserError
from mtllama.model.find import Dtype, ModelFolder, load_tokenizer
from mtllama.weights.restore import open_target
from mtllama.weights.shards import CheckpointReader


def pick_device() -> torch.device:
    """CUDA where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pick_dtype(dtype: Dtype, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the hardware multiplies it natively, else float32."""
    if dtype != "auto":
        return torch.float32 if dtype == "float32" else torch.bfloat16
    native = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else cpu_has_bf16()
    return torch.bfloat16 if native else torch.float32


def cpu_has_bf16() -> bool:
    """Whether this processor has bf16 matrix or dot-product instructions."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("processor", 2)[1]
    except (OSError, IndexError):
        return False
    return any(flag in flags.split() for flag in ("amx_bf16", "avx512_bf16", "bf16"))


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory, ready to compute."""

    source: ModelFolder
    model: Any
    tokenizer: Any
    format: Format
    dtype: torch.dtype
    max_length: int
    """Positions that the model was trained for; to train, no more than its sliding window, since segments are not windowed."""

    def end_ids(self) -> frozenset[int]:
        """Ids of which each ends an answer: the tokenizer's end marker, and those that the folder's generation_config.json names."""
        file = self.source.files / "generation_config.json"
        named = folders.read_json(file).get("eos_token_id") if file.is_file() else None
        ids = named if isinstance(named, list) else [named]
        return frozenset(token for token in (self.tokenizer.eos_token_id, *ids) if isinstance(token, int))

    def describe(self) -> dict[str, Any]:
        """Facts for manifests and tables."""
        manifest = folders.read_manifest(self.source.files) or {}
        return {
            "name": self.source.name,
            "folder": str(self.source.folder),
            "delta": str(self.source.delta) if self.source.delta else None,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "weights_sha256": weights_digest(self.source.folder, self.source.delta),
            "recipe": manifest.get("recipe"),
        }


def weights_digest(*sources: Path | None) -> str:
    """A digest of the weight files of a model's folder (and its delta's), so that a result names what was measured."""
    import hashlib

    digest = hashlib.sha256()
    for folder in filter(None, sources):
        for file in sorted(folder.glob("*.safetensors")) + sorted(folder.glob("*.bin")):
            digest.update(folders.sha256_file(file).encode())
    return digest.hexdigest()


def load_model(
    source: ModelFolder,
    *,
    dtype: Dtype = "auto",
    format: str | None = None,
    train: bool = False,
    weights: torch.dtype = torch.float32,
    empty: bool = False,
) -> LoadedModel:
    """Load a model for inference in `dtype`, or (`train`) with its weights as `weights` and segment attention for training.

    With a delta the target is restored in memory while loading; nothing is written to disk. `empty` (to train): the
    parameters take no memory and have no values until `fill` gives them some.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM

    from mtllama.model.attention import SEGMENTS

    device = pick_device()
    chosen = weights if train else pick_dtype(dtype, device)
    options = {"dtype": chosen, "attn_implementation": SEGMENTS if train else "sdpa"}
    missing: list[str] = []
    with _explained(source):
        if empty:
            config = AutoConfig.from_pretrained(source.files)
            with torch.device("meta"):
                model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._from_config(config, **options)
            for module in model.modules():  # what is computed, not stored: the rotary frequencies
                if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
                    model._init_weights(module.to_empty(device="cpu", recurse=False))
        elif source.delta:
            state = _restored(source)
            config = AutoConfig.from_pretrained(source.files)
            # The auto class insists on a path; the class that it would choose does not.
            model, info = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
                None, config=config, state_dict=state, output_loading_info=True, **options
            )
            missing = sorted(info["missing_keys"])
        else:
            model, info = AutoModelForCausalLM.from_pretrained(source.folder, local_files_only=True, output_loading_info=True, **options)
            missing = sorted(info["missing_keys"])
    _require(source, missing)
    _require_plain_head(source, model.config.get_text_config())
    tokenizer = load_tokenizer(source.files)
    largest = max(tokenizer.get_vocab().values(), default=0)
    rows = model.get_input_embeddings().weight.shape[0]
    if largest >= rows:
        raise UserError(f"{source.files}: token id {largest} lies outside the embedding of {rows} rows; the tokenizer is another model's")
    name = format or source.own_format() or DEFAULT_FORMAT
    length = positions(model.config, train=train)
    return LoadedModel(source, (model if empty else model.to(device)).train(train), tokenizer, find_format(name), chosen, length)


def positions(config: Any, *, train: bool) -> int:
    """Tokens that a model with this config reads, see `LoadedModel.max_length`."""
    length = int(getattr(config, "max_position_embeddings", 2048))
    return min(length, getattr(config, "sliding_window", None) or length) if train else length


_HEAD = {"logits_scaling": 1, "logit_scale": 1, "lm_head_multiplier": 1, "final_logit_softcapping": None}
"""Settings by which a model's logits are more than a product with its head's weights, and the values with which they are not:
Granite, Cohere, Falcon-H1, Gemma 2."""


def _require_plain_head(source: ModelFolder, config: Any) -> None:
    """The loss and the scores are computed on the rows that need them, by the head alone; whatever else a model does there would be lost."""
    for key, plain in _HEAD.items():
        value = getattr(config, key, plain)
        if value not in (plain, None):
            raise UserError(
                f"{source.files / 'config.json'}: {key} is {value}: {config.model_type} models change their logits, which is not supported"
            )


def fill(loaded: LoadedModel) -> Callable[[str, torch.nn.Module], None]:
    """A function that gives the empty parameters of a part (and its name in the model, with a dot behind it) their values, on the CPU.

    A folder is read tensor by tensor; the target of a delta is restored whole.
    """
    with _explained(loaded.source):
        stored = _restored(loaded.source) if loaded.source.delta else CheckpointReader(loaded.source.folder)
        read = stored.__getitem__ if isinstance(stored, dict) else stored.tensor
    _require(loaded.source, sorted(name for name, _ in loaded.model.named_parameters() if name not in stored))

    def fill_part(prefix: str, part: torch.nn.Module) -> None:
        for name, parameter in list(part.named_parameters()):
            if parameter.is_meta:
                with _explained(loaded.source):
                    value = read((prefix + name).replace(".base_layer.", ".")).to(loaded.dtype)  # an adapter stands around it
                if value.shape != parameter.shape:
                    shapes = f"{tuple(value.shape)}, not {tuple(parameter.shape)}"
                    raise UserError(f"{loaded.source.folder}: {prefix}{name} is {shapes} as its config.json has it; fetch it again")
                owner, _, last = name.rpartition(".")
                setattr(part.get_submodule(owner), last, torch.nn.Parameter(value, parameter.requires_grad))
        if not prefix:
            loaded.model.tie_weights()

    return fill_part


@contextlib.contextmanager
def _explained(source: ModelFolder) -> Iterator[None]:
    """What the libraries say of a folder that they cannot read, as one line."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, json.JSONDecodeError, SafetensorError) as error:
        raise UserError(f"{source.folder} cannot be loaded as a model ({' '.join(str(error).split())[:200]})") from error


def _restored(source: ModelFolder) -> dict[str, torch.Tensor]:
    assert source.delta is not None
    return dict(open_target(source.folder, [source.delta]).tensors())


def _require(source: ModelFolder, missing: list[str]) -> None:
    if missing:  # transformers would go on with random weights
        raise UserError(f"{source.folder} lacks {len(missing)} tensors that its config.json asks for, such as {missing[0]}; fetch it again")
