"""The training loop, top to bottom: examples -> packs -> loss on target tokens -> step -> checkpoint -> folder.

What a step is made of is drawn by train/draws.py, its loss is that of train/objective.py. Weights, gradients and moments are float32. Every
rank takes its share of each step's examples, and holds its rows of everything (train/parallel.py).
"""

import contextlib
import json
import math
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from mtllama import folders
from mtllama.data.mixture import Mixture
from mtllama.data.prompt import PromptEncoder
from mtllama.errors import UserError
from mtllama.model.find import ModelFolder, find_model
from mtllama.model.load import LoadedModel, fill, load_model, pick_dtype
from mtllama.progress import progress, say
from mtllama.train import lora, result, state, work
from mtllama.train.draws import Totals, draw
from mtllama.train.flops import Flops, matmul_rate
from mtllama.train.journal import SKIPPED, Journal, Seen, sums
from mtllama.train.objective import Objective, backward, compile_layers
from mtllama.train.parallel import Ranks, whole
from mtllama.train.recipe import RECIPE, Recipe, TrainConfig

KEPT_GRADIENT = 2**23
"""Elements from which on a CPU a gradient is kept over the steps: so large ones never stay in the heap, and what comes anew from the
system costs ten times what it costs to fill it with zeros."""


def run(recipe: Recipe, *, overwrite: bool = False, ranks: Ranks | None = None) -> Path:
    """Train by `recipe`; returns the folder of the result.

    The unfinished run lives in `<out>.partial`; the same recipe started again goes on from its last checkpoint, on any number
    of ranks, and one that is done is not done again. `overwrite`: a finished result is replaced, be it of this recipe or not.
    Every rank calls this (`parallel.joined`); none: this process alone.
    """
    train, folder = recipe.train, recipe.beside("partial")
    ranks = (ranks or Ranks()).by(recipe.parallel)
    mixture = Mixture(recipe.mixture)
    if not overwrite and ranks.once(lambda: work.is_done(recipe, mixture, folder)):
        say(f"{recipe.out} is the result of this recipe already; --overwrite trains anew")
        return recipe.out
    ranks.once(lambda: folders.require_new(recipe.out, overwrite=overwrite))
    for remark in mixture.remarks():
        say(f"mixture: {remark}")
    loaded, objective = _load(recipe, ranks)
    encoder = PromptEncoder(loaded.tokenizer, loaded.format, min(train.max_length, loaded.max_length))
    with folders.explained(folder), contextlib.ExitStack() as held:
        if ranks.first:
            held.enter_context(folders.locked(folder, (RECIPE,)))
        ranks.once(lambda: work.claim(folder, recipe, mixture, overwrite=overwrite))
        trained = [parameter for parameter in loaded.model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=train.lr, weight_decay=train.weight_decay, fused=True)
        start, kept = state.restore(folder / "checkpoints", loaded.model, optimizer, ranks)
        totals = Totals(**kept)
        if start:
            say(f"going on from step {start} of {train.num_steps}")
        ranks.once(lambda: work.note_changes(folder, train, objective.compute, start))
        with _enough_memory(folder):
            _steps(recipe, objective, optimizer, mixture, encoder, folder, start, totals, ranks)
        ranks.once(lambda: _account(folder, totals))
        return result.write(recipe, loaded, encoder, folder, totals, ranks, overwrite=overwrite)


def _load(recipe: Recipe, ranks: Ranks) -> tuple[LoadedModel, Objective]:
    """The model, ready to train: whole, or (sharded) filled and divided part by part, so that no rank ever holds all of it."""

    def find() -> ModelFolder:
        return find_model(recipe.model, recipe.base, recipe.delta)

    source = ranks.once(find)  # one rank fetches or converts what has to be
    if not ranks.first:
        source = find()
    train, compute = recipe.train, pick_dtype(recipe.train.dtype, ranks.device)
    if recipe.lora and not recipe.lora.merge and source.delta:
        raise UserError("lora.merge=false needs a base in a folder; restore it first (mtllama delta apply), and give it as model")
    weights = compute if recipe.lora else torch.float32  # what is trained is float32 always
    loaded = load_model(source, format=recipe.format, train=True, weights=weights, empty=ranks.sharded)
    model = loaded.model
    if loaded.max_length < train.max_length:
        say(f"train.max_length is {train.max_length}, but the model reads {loaded.max_length} tokens; longer prompts lose their middle")
    fill_part = fill(loaded) if ranks.sharded else None
    if recipe.lora:
        lora.add(model, recipe.lora)
    objective = Objective(model, compute)  # which looks at what is trained
    if train.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    inner = set(model.get_decoder().layers)
    layers = [(f"{name}.", layer) for name, layer in model.named_modules() if layer in inner]
    if train.compile:
        compile_layers(model, [layer for _, layer in layers], ranks.device)
    for prefix, part in [*(layers if fill_part else ()), ("", model)]:
        if recipe.lora:
            lora.start(prefix, part, train.seed)
        if fill_part:
            fill_part(prefix, part)
            # Norms are computed with in float32 by one process, so they are gathered as they are, too.
            if prefix and (norms := [module for module in part.modules() if _is_norm(module)]):
                ranks.shard(norms, None)
            # Embedding and head are gathered as they are: what is looked up and added up over a step would suffer from rounding.
            ranks.shard(part if prefix else objective, compute if prefix else None)
    return loaded, objective


def _is_norm(module: torch.nn.Module) -> bool:
    """Whether all that a module has of its own is vectors: a bias stands beside a matrix."""
    own = list(module.parameters(recurse=False))
    return bool(own) and all(parameter.ndim == 1 for parameter in own)


def _account(folder: Path, totals: Totals) -> None:
    """Say what was not trained on as it stands; a run that found nothing to train on has no result."""
    why: Counter[str] = Counter()
    with open(folder / SKIPPED, encoding="utf-8") as lines:
        why.update(json.loads(line)["why"] for line in lines)
    reasons = f" ({'; '.join(f'{count}: {reason}' for reason, count in why.most_common())})" if why else ""
    skipped = f"{totals.skipped} of {totals.examples + totals.skipped} draws skipped{reasons}"
    if not totals.targets:
        folders.remove(folder)
        raise UserError(f"nothing was trained on: {skipped}; raise train.max_length, or choose other data (mtllama mix show has a look)")
    if totals.skipped or totals.cut:
        say(f"{skipped}, {totals.cut} prompts cut to train.max_length")


def _steps(
    recipe: Recipe,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    mixture: Mixture,
    encoder: PromptEncoder,
    folder: Path,
    start: int,
    totals: Totals,
    ranks: Ranks,
) -> None:
    train = recipe.train
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    flops, peak = Flops.of(objective.model), sum(ranks.gather(matmul_rate(ranks.device, objective.compute)))
    with contextlib.ExitStack() as stack:
        advance = stack.enter_context(progress("train", train.num_steps, done=start))
        interrupted = stack.enter_context(_interrupts())
        if ranks.first:
            journal = Journal(folder, start, spike=train.spike, tensorboard=train.tensorboard)
            stack.callback(journal.close)
        for step in range(start, train.num_steps):
            began = time.monotonic()
            torch.manual_seed(lora.seed_of(train.seed, step, ranks.rank))  # dropout is a function of the step, too
            drawing, mine = draw(train, mixture, encoder, step, ranks)
            losses = backward(objective, [each.encoded for each in mine], train.tokens_per_pass, ranks)  # [num_examples] sums
            ranks.sum_gradients(trained)
            norm = float(whole(torch.nn.utils.clip_grad_norm_(trained, train.max_grad_norm)))
            ours = [
                Seen(**each.origin, family=each.family, tokens=len(each.encoded.ids), targets=each.encoded.num_target, loss=loss)
                for each, loss in zip(mine, losses.tolist(), strict=True)
            ]
            parts, stops = zip(*ranks.gather((ours, interrupted())), strict=True)
            seen = sorted((each for part in parts for each in part), key=lambda each: each.index)
            num_targets = sum(each.targets for each in seen)
            loss = sum(each.loss for each in seen) / num_targets if num_targets else None
            doubt = ranks.once(lambda loss=loss, norm=norm: journal.doubt(loss, norm))  # type: ignore[misc]
            if doubt is None and num_targets:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(train, step)
                optimizer.step()
            _clear(trained)
            seconds = time.monotonic() - began
            drawing.add_to(totals)
            totals.seconds += seconds
            lengths = [each.tokens for each in seen]
            speed = sum(lengths) / seconds
            line = {
                "step": step + 1,
                "loss": loss,
                "lr": learning_rate(train, step),
                "grad_norm": norm if num_targets else None,
                "tokens": totals.tokens,
                "targets": totals.targets,
                "tokens_per_second": round(speed, 1),
                "mfu": round(flops.step(lengths, num_targets) / seconds / peak, 4),
                "families": sums(seen, "family"),
                "tasks": sums(seen, "task"),
            }
            if ranks.first and (remark := journal.write(line, seen, drawing.skipped, drawing.cut, doubt)):
                say(remark)
            said = "nothing to train on" if loss is None else f"loss {loss:.3f}"
            advance(note=f"{said}, {speed:.0f} tokens/s,")
            # After the last step, too: the result may take long to write, or the disk be full.
            due = (step + 1) % train.save_every == 0 or step + 1 == train.num_steps
            if due or any(stops):
                state.save(folder / "checkpoints", step + 1, objective.model, optimizer, vars(totals), train.keep, ranks)
            if any(stops):
                raise UserError(
                    f"interrupted after step {step + 1} of {train.num_steps}; kept in {folder}: the same command goes on from there"
                )


@contextlib.contextmanager
def _enough_memory(folder: Path) -> Iterator[None]:
    """What says that there was too little memory becomes one line that says what to do."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error):
            raise UserError(
                f"out of memory ({' '.join(str(error).split())[:120]}); give the same command with a lower train.tokens_per_pass, or with "
                f"train.activation_checkpointing=true: it goes on from the last checkpoint in {folder} (mtllama train plan tells what is needed)"
            ) from error
        raise


def _clear(parameters: list[torch.nn.Parameter]) -> None:
    """Forget the gradients of a step; those that would go back to the system and be taken again from it are kept, filled with zeros."""
    for parameter in parameters:
        if parameter.grad is not None and parameter.device.type == "cpu" and parameter.numel() > KEPT_GRADIENT:
            parameter.grad.zero_()
        else:
            parameter.grad = None


def learning_rate(train: TrainConfig, step: int) -> float:
    """Linear warm-up, then a cosine to zero (or constant)."""
    warmup = max(1, round(train.warmup_ratio * train.num_steps))
    if step < warmup:
        return train.lr * (step + 1) / warmup
    if train.schedule == "constant":
        return train.lr
    done = (step - warmup + 1) / max(1, train.num_steps - warmup + 1)
    return train.lr * 0.5 * (1 + math.cos(math.pi * done))


@contextlib.contextmanager
def _interrupts() -> Iterator[Any]:
    """Ctrl-C and TERM end the run between two steps, after a checkpoint; a second Ctrl-C ends it at once.

    A second TERM does not: where a cluster ends a job, its scheduler sends one to every process, and torchrun hands on its own.
    """
    asked = False

    def handler(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not asked:
            say("stopping after this step (Ctrl-C again: at once)")
        asked = True

    try:
        old = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals are not ours to take
        old = {}
    try:
        yield lambda: asked
    finally:
        for number, previous in old.items():
            signal.signal(number, previous)
