"""A base and a LoRA adapter, in the form in which peft saves it -> the weights of the two together. Needs no peft."""

import hashlib
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mtllama import folders
from mtllama.errors import UserError
from mtllama.progress import progress
from mtllama.weights.restore import open_target
from mtllama.weights.shards import CheckpointReader, CheckpointWriter, TensorInfo, raw_bytes, small_files

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX, A, B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
"""peft names the factors of `NAME.weight` PREFIX + NAME + A, or B."""
_HARMLESS = {
    *("auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_type", "peft_version", "task_type"),
    *("r", "lora_alpha", "lora_dropout", "rank_pattern", "use_rslora", "target_modules", "exclude_modules"),
    *("layers_to_transform", "layers_pattern", "megatron_core", "qalora_group_size", "runtime_config"),
}
"""Settings of peft's that change nothing, or are followed here; whatever else is set makes it another thing than B x A."""


@dataclass(frozen=True)
class Adapter:
    """An adapter that was read: small enough to be held whole."""

    folder: Path
    base: str | None
    """Path or hub id of its base, as the one who saved it had it."""
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]]
    """A [rank, in] and B [out, rank] by the name of the weight that they change."""
    alpha: float
    rslora: bool

    def apply(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The weight with the adapter's product added in float32, rounded once."""
        if name not in self.factors:
            return weight
        a, b = self.factors[name]
        rank = a.shape[0] ** 0.5 if self.rslora else a.shape[0]
        return torch.addmm(weight.float(), b.float(), a.float(), alpha=self.alpha / rank).to(weight.dtype)


def read(folder: Path) -> Adapter:
    """Read an adapter folder; `UserError` for one that is not plain LoRA, or whose parts do not fit."""
    import safetensors.torch

    config: Any = folders.read_json(folder / CONFIG)
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise UserError(f"{folder / CONFIG} is not of a LoRA adapter; merge it with peft, and give the merged folder")
    fine = {"bias": "none", "init_lora_weights": (None, True, False, "gaussian")}
    for key, value in config.items():
        if key not in _HARMLESS and value and value not in (fine.get(key) or ()):
            raise UserError(f"{folder / CONFIG}: {key} is {value!r}, which only peft can merge; do so, and give the merged folder")
    try:
        tensors = safetensors.torch.load_file(folder / WEIGHTS)
    except Exception as error:  # the library raises many kinds for a missing or damaged file
        raise UserError(f"{folder / WEIGHTS} cannot be read ({' '.join(str(error).split())[:160]})") from error
    stems = {name.removesuffix(A).removesuffix(B) for name in tensors}
    factors = {}
    for stem in sorted(stems):
        pair = tensors.get(stem + A), tensors.get(stem + B)
        if not stem.startswith(PREFIX) or pair[0] is None or pair[1] is None or pair[0].shape[0] != pair[1].shape[1]:
            raise UserError(f"{folder / WEIGHTS}: {stem} is not a pair of LoRA factors; merge it with peft, and give the merged folder")
        factors[stem.removeprefix(PREFIX) + ".weight"] = pair
    return Adapter(folder, config.get("base_model_name_or_path"), factors, float(config["lora_alpha"]), bool(config.get("use_rslora")))


def write_weights(base: Path, delta: Path | None, adapter: Adapter, out: Path) -> None:
    """Write the weights of base (or the target of its delta) and adapter together into `out`, a tensor at a time."""
    infos: Mapping[str, TensorInfo]
    tensors: Iterable[tuple[str, torch.Tensor]]
    if delta:
        target = open_target(base, [delta])
        infos, tensors = target.infos, target.tensors()
    else:
        reader = CheckpointReader(base)
        infos, tensors = {name: reader.info(name) for name in reader}, ((name, reader.tensor(name)) for name in reader)
    for name, (a, b) in adapter.factors.items():
        if name not in infos or infos[name].shape != (b.shape[0], a.shape[1]):
            raise UserError(f"{adapter.folder} is not an adapter for {base}: its factors of {name} do not fit there")
    with CheckpointWriter(out, infos) as writer, progress("merge", len(infos)) as advance:
        for name, tensor in tensors:
            writer.begin(infos[name].num_bytes)
            writer.write(raw_bytes(adapter.apply(name, tensor)))
            writer.end(name, infos[name])
            advance()


def merged(base: Path, adapter: Adapter, place: Path, name: str) -> Path:
    """The model folder that base and adapter make, under `place`, written at the first call; `name` is what tables call it."""
    digest = hashlib.sha256()
    for own in (CONFIG, WEIGHTS):
        digest.update(folders.sha256_file(adapter.folder / own).encode())
    for file in sorted(file for file in base.iterdir() if file.suffix in (".safetensors", ".bin", ".json")):
        digest.update(f"{file.resolve()} {file.stat().st_size} {file.stat().st_mtime_ns}\n".encode())
    out = place / digest.hexdigest()[:24]
    if not out.is_dir():
        with folders.new_folder(out, overwrite=True) as folder:
            write_weights(base, None, adapter, folder)
            for file in [*small_files(base), *small_files(adapter.folder)]:  # the adapter's tokenizer and format win
                if file.name not in (CONFIG, folders.MANIFEST):
                    shutil.copyfile(file, folder / file.name)
            told = folders.read_manifest(adapter.folder) or {"format": (folders.read_manifest(base) or {}).get("format")}
            facts = {key: value for key, value in told.items() if key not in ("stage", "versions", "name")}
            folders.write_manifest(folder, "model", name=told.get("name") or name, **facts)
    return out
