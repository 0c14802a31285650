"""A model that was found -> a model and its tokenizer in memory."""

import json
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
    """Positions that the model was trained for."""

    def describe(self) -> dict[str, Any]:
        """Facts for manifests and tables."""
        manifest = folders.read_manifest(self.source.files) or {}
        return {
            "name": self.source.name,
            "folder": str(self.source.folder),
            "delta": str(self.source.delta) if self.source.delta else None,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "weights_sha256": weights_digest(self.source),
            "recipe": manifest.get("recipe"),
        }


def weights_digest(source: ModelFolder) -> str:
    """A short digest of the weight files (and the delta's), so that a result names what was measured."""
    import hashlib

    digest = hashlib.sha256()
    for folder in filter(None, (source.folder, source.delta)):
        for file in sorted(folder.glob("*.safetensors")) + sorted(folder.glob("*.bin")):
            digest.update(folders.sha256_file(file).encode())
    return digest.hexdigest()


def load_model(source: ModelFolder, *, dtype: Dtype = "auto", format: str | None = None, train: bool = False) -> LoadedModel:
    """Load a model for inference, or (`train`) with fp32 weights and segment attention for training.

    With a delta the target is restored in memory while loading; nothing is written to disk.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM

    from mtllama.model.attention import SEGMENTS

    device = pick_device()
    chosen = torch.float32 if train else pick_dtype(dtype, device)
    options = {"dtype": chosen, "attn_implementation": SEGMENTS if train else "sdpa", "output_loading_info": True}
    try:
        if source.delta:
            state = dict(open_target(source.folder, [source.delta]).tensors())
            config = AutoConfig.from_pretrained(source.files)
            # The auto class insists on a path; the class that it would choose does not.
            model, info = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(None, config=config, state_dict=state, **options)
        else:
            model, info = AutoModelForCausalLM.from_pretrained(source.folder, local_files_only=True, **options)
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, json.JSONDecodeError, SafetensorError) as error:
        raise UserError(f"{source.folder} cannot be loaded as a model ({' '.join(str(error).split())[:200]})") from error
    if missing := sorted(info["missing_keys"]):  # transformers would go on with random weights
        raise UserError(f"{source.folder} lacks {len(missing)} tensors that its config.json asks for, such as {missing[0]}; fetch it again")
    tokenizer = load_tokenizer(source.files)
    largest = max(tokenizer.get_vocab().values(), default=0)
    rows = model.get_input_embeddings().weight.shape[0]
    if largest >= rows:
        raise UserError(f"{source.files}: token id {largest} lies outside the embedding of {rows} rows; the tokenizer is another model's")
    name = format or source.own_format() or DEFAULT_FORMAT
    length = int(getattr(model.config, "max_position_embeddings", 2048))
    return LoadedModel(source, model.to(device).train(train), tokenizer, find_format(name), chosen, length)
