"""The training loop, top to bottom: examples -> packs -> loss on target tokens -> step -> checkpoint -> folder.

The loss of a step is the mean over all target tokens of its effective batch, however it is split into passes. The
head is multiplied with target rows only. Weights, gradients and moments are float32; matrix products run in the
compute dtype under autocast. Every rank takes its share of each step's examples, and holds its rows of everything (train/parallel.py).
"""

import contextlib
import json
import math
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from mtllama import config as configs
from mtllama import folders, hub
from mtllama.data.batching import Batch, pack
from mtllama.data.mixture import Draw, Mixture
from mtllama.data.prompt import Encoded, PromptEncoder
from mtllama.errors import UserError
from mtllama.model import adapter
from mtllama.model.convert import save_settings, save_tokenizer
from mtllama.model.find import Dtype, ModelFolder, find_model
from mtllama.model.fused import fuse, fuse_tables
from mtllama.model.load import LoadedModel, fill, load_model, pick_dtype
from mtllama.progress import progress, say
from mtllama.train import lora, state
from mtllama.train.flops import Flops, matmul_rate
from mtllama.train.journal import METRICS, SKIPPED, TENSORBOARD, Journal, Seen, sums
from mtllama.train.parallel import Ranks, whole
from mtllama.train.recipe import DATA, RECIPE, Recipe, TrainConfig
from mtllama.weights.shards import CheckpointReader, CheckpointWriter, TensorInfo, raw_bytes

HEAD_ROWS = 256
"""Target rows whose logits are held at a time: there may be as many as a pass has tokens, and a row is a vocabulary long."""
KEPT_GRADIENT = 2**23
"""Elements from which on a CPU a gradient is kept over the steps: so large ones never stay in the heap, and what comes anew from the
system costs ten times what it costs to fill it with zeros."""
COMPILED = "mtllama_segments_compiled"
"""Segment attention within compiled layers: it is given the batch, since they would be compiled anew for every length of a list."""
HOW = ("activation_checkpointing", "compile", "tokens_per_pass", "save_every", "keep", "tensorboard")
"""Keys of `train` that say how a run is computed and kept, not what comes out: they may change while it is not done; so may `parallel`."""
STEERING = ("lr", "warmup_ratio", "schedule", "weight_decay", "max_grad_norm", "dtype", "spike")
"""Keys that say how far a step goes, not what is read in it: they may change, too, and from which step on they did is kept."""
CHANGES = "changes.json"
"""The values of these by the first step that each were in force for."""


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


@dataclass
class Share:
    """What one rank did in one step."""

    totals: Totals = field(default_factory=Totals)
    seen: list[Seen] = field(default_factory=list)
    skipped: list[dict[str, Any]] = field(default_factory=list)
    interrupted: bool = False


class Objective(torch.nn.Module):
    """The losses of a batch as a module: its call is what weights are gathered for and freed behind, where they are sharded."""

    def __init__(self, model: Any, compute: torch.dtype) -> None:
        super().__init__()
        self.model, self.compute = model, compute
        fuse(model.get_decoder(), compute)
        fuse_tables(model, compute)

    def forward(self, batch: Batch) -> torch.Tensor:
        """As `target_losses`, with matrix products in the compute dtype."""
        with torch.autocast(next(self.parameters()).device.type, dtype=torch.bfloat16, enabled=self.compute == torch.bfloat16):
            return target_losses(self.model, batch)


def run(recipe: Recipe, *, overwrite: bool = False, ranks: Ranks | None = None) -> Path:
    """Train by `recipe`; returns the folder of the result.

    The unfinished run lives in `<out>.partial`; the same recipe started again goes on from its last checkpoint, on any number
    of ranks, and one that is done is not done again. `overwrite`: a finished result is replaced, be it of this recipe or not.
    Every rank calls this (`parallel.joined`); none: this process alone.
    """
    train, work = recipe.train, recipe.beside("partial")
    ranks = (ranks or Ranks()).by(recipe.parallel)
    mixture = Mixture(recipe.mixture)
    if not overwrite and ranks.once(lambda: _is_done(recipe, mixture, work)):
        say(f"{recipe.out} is the result of this recipe already; --overwrite trains anew")
        return recipe.out
    ranks.once(lambda: folders.require_new(recipe.out, overwrite=overwrite))
    for remark in mixture.remarks():
        say(f"mixture: {remark}")
    loaded, objective = _load(recipe, ranks)
    encoder = PromptEncoder(loaded.tokenizer, loaded.format, min(train.max_length, loaded.max_length))
    with folders.explained(work), contextlib.ExitStack() as held:
        if ranks.first:
            held.enter_context(folders.locked(work, (RECIPE,)))
        ranks.once(lambda: _claim(work, recipe, mixture, overwrite=overwrite))
        trained = [parameter for parameter in loaded.model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=train.lr, weight_decay=train.weight_decay, fused=True)
        start, kept = state.restore(work / "checkpoints", loaded.model, optimizer, ranks)
        totals = Totals(**kept)
        if start:
            say(f"going on from step {start} of {train.num_steps}")
        ranks.once(lambda: _note_changes(work, train, start))
        _steps(recipe, objective, optimizer, mixture, encoder, work, start, totals, ranks)
        ranks.once(lambda: _account(work, totals))
        return _finish(recipe, loaded, encoder, work, totals, ranks)


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
    objective, fill_part = Objective(model, compute), fill(loaded) if ranks.sharded else None
    if recipe.lora:
        lora.add(model, recipe.lora)
    if train.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    inner = set(model.get_decoder().layers)
    layers = [(f"{name}.", layer) for name, layer in model.named_modules() if layer in inner]
    if train.compile:
        _compile(model, [layer for _, layer in layers], ranks.device)
    for prefix, part in [*(layers if fill_part else ()), ("", model)]:
        if recipe.lora:
            lora.start(prefix, part, train.seed)
        if fill_part:
            fill_part(prefix, part)
            # Embedding and head are gathered as they are: what is looked up and added up over a step would suffer from rounding.
            ranks.shard(part if prefix else objective, compute if prefix else None)
    return loaded, objective


def _compile(model: Any, layers: list[torch.nn.Module], device: torch.device) -> None:
    """Compile the layers but for their attention: once for all lengths, in place of once for every number of segments."""
    from transformers import AttentionInterface

    from mtllama.model.attention import segment_attention

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def attend(*args: Any, segments: Batch, **kwargs: Any) -> Any:
        return segment_attention(*args, segments=segments.segments, **kwargs)

    if device.type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))):
        raise UserError("train.compile needs a C++ compiler on a CPU, and there is none; install g++, or set train.compile=false")
    AttentionInterface.register(COMPILED, attend)
    model.config._attn_implementation = COMPILED
    for layer in layers:
        layer.compile(dynamic=True)


def _is_done(recipe: Recipe, mixture: Mixture, work: Path) -> bool:
    """Whether the result is there, of this recipe and this data. What a kill left of the run that made it goes."""
    made = folders.read_manifest(recipe.out) or {}
    if "recipe" not in made or _what(made["recipe"]) != _what(configs.to_dict(recipe)) or made.get("data") != mixture.data():
        return False
    if work.is_dir():
        if not state.folder_of(work / "checkpoints", recipe.train.num_steps).is_dir():
            return False  # begun after it: to be gone on with
        with folders.locked(work, (RECIPE,)):
            folders.remove(work)
    return True


def _claim(work: Path, recipe: Recipe, mixture: Mixture, *, overwrite: bool) -> None:
    """Begin in the working folder, or check that the run in it is of the same recipe and the same data."""
    folders.require_new(recipe.out, overwrite=overwrite)  # whoever had the folder until now may be done
    wanted, data = configs.to_dict(recipe), mixture.data()
    if (work / RECIPE).is_file():
        if _what(folders.read_json(work / RECIPE), *STEERING) != _what(wanted, *STEERING):
            raise UserError(f"{work} holds an unfinished run of another recipe; remove it, or choose another out")
        before = folders.read_json(work / DATA) if (work / DATA).is_file() else data
        if changed := sorted(name for name in {*before, *data} if before.get(name) != data.get(name)):
            then, now = (marks.get(changed[0], "none of it") for marks in (before, data))
            raise UserError(
                f"{work}: the data of {changed[0]} is not what the run began with ({then} then, {now} now); "
                "bring it back, remove the folder to begin anew, or choose another out"
            )
    work.mkdir(parents=True, exist_ok=True)
    folders.write_json(work / RECIPE, wanted)  # first: it tells that the folder is ours
    folders.write_json(work / DATA, data)


def _what(recipe: dict[str, Any], *but: str) -> dict[str, Any]:
    """The part of a recipe that decides what comes out, but for these keys of `train`."""
    train = {key: value for key, value in recipe.get("train", {}).items() if key not in (*HOW, *but)}
    return {**recipe, "train": train, "parallel": None}


def _note_changes(work: Path, train: TrainConfig, start: int) -> None:
    """Keep which values the steps from here on are done with, and say so where they are others than before."""
    now = {key: getattr(train, key) for key in STEERING}
    before = folders.read_json(work / CHANGES) if (work / CHANGES).is_file() else []
    before = [each for each in before if each["from_step"] <= start]  # later steps are done again
    was = before[-1]["train"] if before else now
    if odd := [f"train.{key}={now[key]} (was {was[key]})" for key in STEERING if now[key] != was[key]]:
        say(f"from step {start + 1} on with {', '.join(odd)}")
    folders.write_json(work / CHANGES, before if before and not odd else [*before, {"from_step": start + 1, "train": now}])


def _account(work: Path, totals: Totals) -> None:
    """Say what was not trained on as it stands; a run that found nothing to train on has no result."""
    why: Counter[str] = Counter()
    with open(work / SKIPPED, encoding="utf-8") as lines:
        why.update(json.loads(line)["why"] for line in lines)
    reasons = f" ({'; '.join(f'{count}: {reason}' for reason, count in why.most_common())})" if why else ""
    skipped = f"{totals.skipped} of {totals.examples + totals.skipped} draws skipped{reasons}"
    if not totals.targets:
        folders.remove(work)
        raise UserError(f"nothing was trained on: {skipped}; raise train.max_length, or choose other data (mtllama mix show has a look)")
    if totals.skipped or totals.cut:
        say(f"{skipped}, {totals.cut} prompts cut to train.max_length")


def _steps(
    recipe: Recipe,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    mixture: Mixture,
    encoder: PromptEncoder,
    work: Path,
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
            journal = Journal(work, start, spike=train.spike, tensorboard=train.tensorboard)
            stack.callback(journal.close)
        for step in range(start, train.num_steps):
            began = time.monotonic()
            torch.manual_seed(lora.seed_of(train.seed, step, ranks.rank))  # dropout is a function of the step, too
            share = Share()
            examples, draws = _draw(train, mixture, encoder, step, share, ranks)
            losses = _backward(objective, examples, train.tokens_per_pass, ranks)  # [num_examples] sums
            ranks.sum_gradients(trained)
            norm = float(whole(torch.nn.utils.clip_grad_norm_(trained, train.max_grad_norm)))
            share.seen = [
                Seen(index, draw.task, draw.family, draw.template, draw.row, len(example.ids), example.num_target, loss)
                for (index, draw), example, loss in zip(draws, examples, losses.tolist(), strict=True)
            ]
            share.interrupted = interrupted()
            shares = ranks.gather(share)
            seen = [each for share in shares for each in share.seen]
            num_targets = sum(each.targets for each in seen)
            loss = sum(each.loss for each in seen) / num_targets if num_targets else None
            doubt = ranks.once(lambda loss=loss, norm=norm: journal.doubt(loss, norm))  # type: ignore[misc]
            if doubt is None and num_targets:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(train, step)
                optimizer.step()
            _clear(trained)
            seconds = time.monotonic() - began
            for each in shares:
                for name, count in vars(each.totals).items():
                    setattr(totals, name, getattr(totals, name) + count)
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
            if ranks.first:
                skipped = sorted((each for share in shares for each in share.skipped), key=lambda each: each["index"])
                if remark := journal.write(line, seen, skipped, doubt):
                    say(remark)
            said = "nothing to train on" if loss is None else f"loss {loss:.3f}"
            advance(note=f"{said}, {speed:.0f} tokens/s,")
            # After the last step, too: the result may take long to write, or the disk be full.
            due = (step + 1) % train.save_every == 0 or step + 1 == train.num_steps
            stop = any(each.interrupted for each in shares)
            if due or stop:
                state.save(work / "checkpoints", step + 1, objective.model, optimizer, vars(totals), train.keep, ranks)
            if stop:
                raise UserError(
                    f"interrupted after step {step + 1} of {train.num_steps}; kept in {work}: the same command goes on from there"
                )


def _clear(parameters: list[torch.nn.Parameter]) -> None:
    """Forget the gradients of a step; those that would go back to the system and be taken again from it are kept, filled with zeros."""
    for parameter in parameters:
        if parameter.grad is not None and parameter.device.type == "cpu" and parameter.numel() > KEPT_GRADIENT:
            parameter.grad.zero_()
        else:
            parameter.grad = None


def _draw(
    train: TrainConfig, mixture: Mixture, encoder: PromptEncoder, step: int, share: Share, ranks: Ranks
) -> tuple[list[Encoded], list[tuple[int, Draw]]]:
    """This rank's examples of one step, and where in the mixture each is from; what was skipped and why goes into its share.

    The positions in the mixture are a function of the step alone, and the ranks take them in turn.
    """
    examples, kept, totals = [], [], share.totals
    indices = train.indices(step)[ranks.rank :: ranks.size]
    draws = [mixture.draw(index) for index in indices]
    encodings = iter(encoder.encode_batch([(draw.example.inputs, draw.example.targets) for draw in draws if draw.example]))
    for index, draw in zip(indices, draws, strict=True):
        encoded = next(encodings) if draw.example else None
        if encoded is None:
            totals.skipped += 1
            why = "its answer alone is longer than train.max_length" if draw.example else "no prompt applies"
            share.skipped.append(
                {"step": step + 1, "index": index, "task": draw.task, "template": draw.template, "row": draw.row, "why": why}
            )
            continue
        examples.append(encoded)
        kept.append((index, draw))
        totals.examples += 1
        totals.tokens += len(encoded.ids)
        totals.targets += encoded.num_target
        totals.cut += encoded.cut
    return examples, kept


def _backward(objective: Objective, examples: list[Encoded], tokens_per_pass: int, ranks: Ranks) -> torch.Tensor:
    """Gradients of the mean loss of the effective batch, over all ranks; returns the summed loss of each of this rank's. [num_examples]"""
    losses = torch.zeros(len(examples))
    batches = list(pack(examples, tokens_per_pass))
    plans = ranks.gather((sum(example.num_target for example in examples), len(batches)))
    scale = ranks.loss_scale / max(1, sum(num_targets for num_targets, _ in plans))
    # Each pass is one of every rank's: those that have fewer add some that weigh nothing.
    idle = [next(pack([Encoded([0, 0], 1, cut=False)], 2))] * (max(passes for _, passes in plans) - len(batches))
    for batch, weight in [*((batch, scale) for batch in batches), *((batch, 0.0) for batch in idle)]:
        token_losses = objective(batch)  # [num_target]
        torch.autograd.backward(token_losses.sum() * weight)
        if weight:
            losses.index_add_(0, batch.owners, token_losses.detach().float().cpu())
    return losses


def target_losses(model: Any, batch: Batch) -> torch.Tensor:
    """Cross-entropy (nat) of every target token. [num_target]"""
    device = next(model.parameters()).device
    segments = batch if model.config._attn_implementation == COMPILED else batch.segments
    hidden = (
        model.get_decoder()(input_ids=batch.ids.to(device), position_ids=batch.positions.to(device), segments=segments, use_cache=False)
    ).last_hidden_state  # [1, seq, hidden]
    rows, targets = hidden[0, batch.predict.to(device)], batch.targets.to(device)  # [num_target, hidden], [num_target]
    head = model.get_output_embeddings()

    def losses(rows: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(head(rows).float(), targets, reduction="none")

    if len(rows) <= HEAD_ROWS:
        return losses(rows, targets)
    parts = zip(torch.split(rows, HEAD_ROWS), torch.split(targets, HEAD_ROWS), strict=True)
    return torch.cat([cast(torch.Tensor, checkpoint(losses, *part, use_reentrant=False)) for part in parts])


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


def _stored_dtype(folder: Path, wanted: Dtype = "auto") -> torch.dtype:
    """The dtype that the result is stored in: the wanted one, or else that of the base's weights."""
    if wanted != "auto":
        return torch.float32 if wanted == "float32" else torch.bfloat16
    reader = CheckpointReader(folder)
    return next(reader.info(name).dtype for name in reader if reader.info(name).dtype.is_floating_point)


def _finish(recipe: Recipe, loaded: LoadedModel, encoder: PromptEncoder, work: Path, totals: Totals, ranks: Ranks) -> Path:
    """Write the result as a normal Hugging Face folder that carries its prompt format, or as an adapter's. All ranks."""
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
    with ranks.new_folder(recipe.out, overwrite=True) as folder:
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
            for file in (METRICS, SKIPPED):
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
