"""The training loop, top to bottom: examples -> packs -> loss on target tokens -> step -> checkpoint -> folder.

The loss of a step is the mean over all target tokens of its effective batch, however it is split into passes. The
head is multiplied with target rows only. Weights, gradients and moments are float32; matrix products run in the
compute dtype under autocast.
"""

import contextlib
import json
import math
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F

from mtllama import config as configs
from mtllama import folders
from mtllama.data.batching import Batch, pack
from mtllama.data.mixture import Mixture
from mtllama.data.prompt import Encoded, PromptEncoder
from mtllama.errors import UserError
from mtllama.model.convert import save_checkpoint
from mtllama.model.find import find_model
from mtllama.model.load import LoadedModel, load_model, pick_dtype
from mtllama.progress import progress, say
from mtllama.train import state
from mtllama.train.recipe import RECIPE, Recipe, TrainConfig
from mtllama.weights.shards import CheckpointReader

METRICS, SKIPPED = "metrics.jsonl", "skipped.jsonl"


@dataclass
class Totals:
    """Counts over the run so far; they travel with the checkpoints."""

    examples: int = 0
    tokens: int = 0
    """Real tokens read, padding not counted."""
    targets: int = 0
    cut: int = 0
    """Prompts that lost their middle to fit into max_length."""
    skipped: int = 0
    """Draws that gave nothing to train on: no template applies, or the answer alone is too long."""
    seconds: float = 0.0


def run(recipe: Recipe, *, overwrite: bool = False) -> Path:
    """Train by `recipe`; returns the folder of the result.

    The unfinished run lives in `<out>.partial`; the same recipe started again goes on from its last checkpoint.
    """
    out, train = recipe.out, recipe.train
    folders.require_new(out, overwrite=overwrite)
    work = out.with_name(out.name + ".partial")
    mixture = Mixture(recipe.mixture)
    for remark in mixture.remarks():
        say(f"mixture: {remark}")
    torch.manual_seed(train.seed)
    loaded = load_model(find_model(recipe.model, recipe.base, recipe.delta), format=recipe.format, train=True)
    encoder = PromptEncoder(loaded.tokenizer, loaded.format, min(train.max_length, loaded.max_length))
    with folders.explained(work):
        _claim(work, recipe, overwrite=overwrite)
        optimizer = torch.optim.AdamW(loaded.model.parameters(), lr=train.lr, weight_decay=train.weight_decay, fused=True)
        start, kept = state.restore(work / "checkpoints", loaded.model, optimizer)
        totals = Totals(**kept)
        if start:
            say(f"going on from step {start} of {train.num_steps}")
        _rewind(work / METRICS, start)
        _rewind(work / SKIPPED, start)
        _steps(recipe, loaded, optimizer, mixture, encoder, work, start, totals)
        return _finish(recipe, loaded, encoder, work, totals)


def _claim(work: Path, recipe: Recipe, *, overwrite: bool) -> None:
    """Make the working folder, or check that the one there is of the same recipe."""
    wanted = json.loads(json.dumps(configs.to_dict(recipe)))
    if (work / RECIPE).is_file() and not overwrite:
        if folders.read_json(work / RECIPE) != wanted:
            raise UserError(f"{work} holds an unfinished run of another recipe; remove it, pass --overwrite, or choose another out")
        return
    shutil.rmtree(work, ignore_errors=True)
    (work / "checkpoints").mkdir(parents=True)
    folders.write_json(work / RECIPE, wanted)


def _rewind(file: Path, step: int) -> None:
    """Drop lines of steps that will be taken again (a last line that a kill cut short among them)."""
    if file.is_file():
        kept = []
        for line in file.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
        folders.write_text(file, "".join(kept))


def _steps(
    recipe: Recipe,
    loaded: LoadedModel,
    optimizer: torch.optim.Optimizer,
    mixture: Mixture,
    encoder: PromptEncoder,
    work: Path,
    start: int,
    totals: Totals,
) -> None:
    train, model = recipe.train, loaded.model
    compute = pick_dtype(train.dtype, next(model.parameters()).device)
    with progress("train", train.num_steps, done=start) as advance, _interrupts() as interrupted:
        for step in range(start, train.num_steps):
            began = time.monotonic()
            before = Totals(**vars(totals))
            examples, families, skipped = _draw(train, mixture, encoder, step, totals)
            losses = _backward(model, examples, compute, train.tokens_per_pass)  # [num_examples] sums
            norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), train.max_grad_norm))
            num_targets = sum(example.num_target for example in examples)
            loss = float(losses.sum()) / max(1, num_targets)
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise UserError(
                    f"step {step}: loss {loss}, gradient norm {norm}; lower train.lr (now {train.lr:g}) or set train.dtype=float32"
                )
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(train, step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
            totals.seconds += time.monotonic() - began
            speed = (totals.tokens - before.tokens) / (totals.seconds - before.seconds)
            line = {
                "step": step + 1,
                "loss": loss,
                "lr": learning_rate(train, step),
                "grad_norm": norm,
                "tokens": totals.tokens,
                "targets": totals.targets,
                "tokens_per_second": round(speed, 1),
                "families": _by_family(families, examples, losses),
            }
            for file, lines in ((METRICS, [line]), (SKIPPED, skipped)):
                with open(work / file, "a", encoding="utf-8") as handle:
                    handle.writelines(json.dumps(each) + "\n" for each in lines)
            advance(note=f"loss {loss:.3f}, {speed:.0f} tokens/s,")
            due = (step + 1) % train.save_every == 0 and step + 1 < train.num_steps
            if due or interrupted():
                state.save(work / "checkpoints", step + 1, model, optimizer, vars(totals), train.keep)
            if interrupted():
                raise UserError(
                    f"interrupted after step {step + 1} of {train.num_steps}; kept in {work}: the same command goes on from there"
                )


def _draw(
    train: TrainConfig, mixture: Mixture, encoder: PromptEncoder, step: int, totals: Totals
) -> tuple[list[Encoded], list[str], list[dict[str, Any]]]:
    """The examples of one step, their families, and what was skipped and why.

    The position in the mixture is a function of the step alone.
    """
    examples, families, skipped = [], [], []
    indices = train.indices(step)
    draws = [mixture.draw(index) for index in indices]
    encodings = iter(encoder.encode_batch([(draw.example.inputs, draw.example.targets) for draw in draws if draw.example]))
    for index, draw in zip(indices, draws, strict=True):
        encoded = next(encodings) if draw.example else None
        if encoded is None:
            totals.skipped += 1
            why = "its answer alone is longer than train.max_length" if draw.example else "no prompt applies"
            skipped.append({"step": step + 1, "index": index, "task": draw.task, "template": draw.template, "row": draw.row, "why": why})
            continue
        examples.append(encoded)
        families.append(draw.family)
        totals.examples += 1
        totals.tokens += len(encoded.ids)
        totals.targets += encoded.num_target
        totals.cut += encoded.cut
    return examples, families, skipped


def _backward(model: Any, examples: list[Encoded], compute: torch.dtype, tokens_per_pass: int) -> torch.Tensor:
    """Gradients of the effective batch's mean loss; returns each example's summed loss. [num_examples]"""
    device = next(model.parameters()).device
    num_targets = sum(example.num_target for example in examples)
    losses = torch.zeros(len(examples))
    for batch in pack(examples, tokens_per_pass):
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=compute == torch.bfloat16):
            token_losses = target_losses(model, batch)  # [num_target]
        torch.autograd.backward(token_losses.sum() / num_targets)
        losses.index_add_(0, batch.owners, token_losses.detach().float().cpu())
    return losses


def target_losses(model: Any, batch: Batch) -> torch.Tensor:
    """Cross-entropy (nat) of every target token. [num_target]"""
    device = next(model.parameters()).device
    hidden = (
        model.get_decoder()(
            input_ids=batch.ids.to(device), position_ids=batch.positions.to(device), segments=batch.segments, use_cache=False
        )
    ).last_hidden_state  # [1, seq, hidden]
    rows = hidden[0, batch.predict.to(device)]  # [num_target, hidden]
    logits = model.get_output_embeddings()(rows).float()  # [num_target, vocab]
    return F.cross_entropy(logits, batch.targets.to(device), reduction="none")


def learning_rate(train: TrainConfig, step: int) -> float:
    """Linear warm-up, then a cosine to zero (or constant)."""
    warmup = max(1, round(train.warmup_ratio * train.num_steps))
    if step < warmup:
        return train.lr * (step + 1) / warmup
    if train.schedule == "constant":
        return train.lr
    done = (step - warmup + 1) / max(1, train.num_steps - warmup + 1)
    return train.lr * 0.5 * (1 + math.cos(math.pi * done))


def _by_family(families: list[str], examples: list[Encoded], losses: torch.Tensor) -> dict[str, dict[str, float]]:
    sums: dict[str, list[float]] = {}
    for family, example, loss in zip(families, examples, losses.tolist(), strict=True):
        entry = sums.setdefault(family, [0.0, 0])
        entry[0] += loss
        entry[1] += example.num_target
    return {family: {"loss": loss / count, "targets": count} for family, (loss, count) in sorted(sums.items())}


@contextlib.contextmanager
def _interrupts() -> Iterator[Any]:
    """Ctrl-C and TERM end the run between two steps, after a checkpoint; a second Ctrl-C ends it at once."""
    asked = False

    def handler(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        say("stopping after this step (Ctrl-C again: at once)")

    try:
        old = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals are not ours to take
        old = {}
    try:
        yield lambda: asked
    finally:
        for number, previous in old.items():
            signal.signal(number, previous)


def _stored_dtype(folder: Path) -> torch.dtype:
    """The dtype that the base's weights are stored in; the result is stored in the same."""
    reader = CheckpointReader(folder)
    return next(reader.info(name).dtype for name in reader if reader.info(name).dtype.is_floating_point)


def _finish(recipe: Recipe, loaded: LoadedModel, encoder: PromptEncoder, work: Path, totals: Totals) -> Path:
    """Write the result as a normal Hugging Face folder that carries its prompt format."""
    from transformers import GenerationConfig

    model, tokenizer, format = loaded.model, loaded.tokenizer, loaded.format
    if not format.native:
        tokenizer.chat_template = format.chat_template(bos=bool(encoder.bos_ids))
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        stop_strings=[format.end] if format.end else None,
    )
    model.to(_stored_dtype(loaded.source.folder))
    with folders.new_folder(recipe.out, overwrite=True) as folder:
        save_checkpoint(model, tokenizer, folder)
        for file in (METRICS, SKIPPED):
            shutil.copyfile(work / file, folder / file)
        folders.write_manifest(
            folder,
            "model",
            name=f"{loaded.source.name} + {recipe.name}",
            base=loaded.source.name,
            format=format.name,
            recipe=configs.to_dict(recipe),
            totals={**vars(totals), "steps": recipe.train.num_steps},
        )
    shutil.rmtree(work)
    return recipe.out
