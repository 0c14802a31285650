"""The result of a run: a normal Hugging Face folder that carries its prompt format, or an adapter's, with what tells how it came to be."""

import contextlib
import shutil
from pathlib import Path
from typing import Any

import torch

from mtllama import config as configs
from mtllama import folders, hub
from mtllama.data.prompt import PromptEncoder
from mtllama.model import adapter
from mtllama.model.convert import save_settings, save_tokenizer
from mtllama.model.find import Dtype
from mtllama.model.load import LoadedModel
from mtllama.train import lora
from mtllama.train.draws import Totals
from mtllama.train.journal import CUT, METRICS, SKIPPED, TENSORBOARD
from mtllama.train.parallel import Ranks, whole
from mtllama.train.recipe import CHANGES, DATA, Recipe
from mtllama.weights.shards import CheckpointReader, CheckpointWriter, TensorInfo, raw_bytes


def write(
    recipe: Recipe, loaded: LoadedModel, encoder: PromptEncoder, work: Path, totals: Totals, ranks: Ranks, *, overwrite: bool
) -> Path:
    """Write the result to the recipe's `out`, where it replaces what is there only if `overwrite`, and remove the working folder. All ranks."""
    from transformers import GenerationConfig

    model, tokenizer, format, source = loaded.model, loaded.tokenizer, loaded.format, loaded.source
    if not format.native:
        tokenizer.chat_template = format.chat_template(bos=bool(encoder.bos_ids))
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        stop_strings=[format.end] if format.end else None,
    )
    kept = recipe.lora is not None and not recipe.lora.merge
    with ranks.new_folder(recipe.out, overwrite=overwrite) as folder:
        if recipe.lora is None:
            _write_weights(model, _stored_dtype(source.folder, recipe.save_dtype), folder, ranks)
        else:
            known = recipe.model if recipe.model and hub.parse(recipe.model) and not Path(recipe.model).is_dir() else None
            lora.save(model, recipe.lora, known or str(source.folder.resolve()), folder if kept else work, ranks)
            if ranks.first and not kept:
                adapter.write_weights(source.folder, source.delta, adapter.read(work), folder)
        if ranks.first:
            if kept:
                model.generation_config.save_pretrained(folder)
                save_tokenizer(tokenizer, folder)
            else:
                save_settings(model, tokenizer, folder, _stored_dtype(source.folder, recipe.save_dtype))
            for file in (METRICS, SKIPPED, CUT):
                shutil.copyfile(work / file, folder / file)
            if (work / TENSORBOARD).is_dir():
                shutil.copytree(work / TENSORBOARD, folder / TENSORBOARD)
            changes = folders.read_json(work / CHANGES)
            folders.write_manifest(
                folder,
                "adapter" if kept else "model",
                name=f"{source.name} + {recipe.name}",
                base=source.name,
                format=format.name,
                recipe=configs.to_dict(recipe),
                **({"changes": changes} if len(changes) > 1 else {}),
                data=folders.read_json(work / DATA),
                totals={**vars(totals), "steps": recipe.train.num_steps},
                ranks=ranks.size,
            )
    if ranks.first:
        folders.remove(work)
    return recipe.out


def _stored_dtype(folder: Path, wanted: Dtype = "auto") -> torch.dtype:
    """The dtype that the result is stored in: the wanted one, or else that of the base's weights."""
    if wanted != "auto":
        return torch.float32 if wanted == "float32" else torch.bfloat16
    reader = CheckpointReader(folder)
    return next(reader.info(name).dtype for name in reader if reader.info(name).dtype.is_floating_point)


def _write_weights(model: Any, dtype: torch.dtype, folder: Path, ranks: Ranks) -> None:
    """Gather the weights one by one, so that no rank holds more than its rows and one tensor, and write them. All ranks."""
    infos = {name: TensorInfo(dtype, tuple(parameter.shape)) for name, parameter in model.named_parameters()}
    with contextlib.ExitStack() as stack:
        writer = stack.enter_context(CheckpointWriter(folder, infos)) if ranks.first else None
        for name, parameter in model.named_parameters():
            tensor = whole(parameter.detach().to(dtype))
            if writer:
                writer.begin(infos[name].num_bytes)
                writer.write(raw_bytes(tensor.cpu()))
                writer.end(name, infos[name])
