"""What `train.py` starts inside TRL's own environment: one SFTTrainer run, and what it did.

    PEER/bin/python train_peer.py JOB    JOB is a JSON file: the keys of `Job`

A line for every step goes to `metrics` when the step is done, which is how `train.py` takes the time; the result goes to `result`.
Everything that the job does not name is left at SFTTrainer's defaults (gradient checkpointing among them).
"""

import dataclasses
import json
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer


@dataclass(frozen=True)
class Job:
    model: str
    rows: str
    """JSON lines in the order of training: prompt, completion, input_ids, completion_mask."""
    metrics: str
    result: str
    out: str
    """Folder for the trained model."""
    packing: bool
    batch_size: int
    """Examples a step."""
    max_steps: int
    """Stop after so many steps, and leave no model; -1: the whole."""
    lr: float
    max_length: int
    max_grad_norm: float
    threads: int


class Counted(SFTTrainer):
    """SFTTrainer that counts what it is given."""

    tokens = targets = computed = 0
    loss = 0.0

    def training_step(self, model: Any, inputs: dict[str, Any], *arguments: Any, **options: Any) -> Any:
        mask = inputs.get("attention_mask")
        self.computed += inputs["input_ids"].numel()
        self.tokens += inputs["input_ids"].numel() if mask is None else int(mask.sum())
        self.targets += int((inputs["labels"] != -100).sum())
        loss = super().training_step(model, inputs, *arguments, **options)
        self.loss = float(loss)
        return loss


class Lines(TrainerCallback):
    """A line a step."""

    def __init__(self, path: str) -> None:
        self.path, self.trainer = path, None

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        counted = self.trainer
        assert counted is not None
        keys = {name: getattr(counted, name) for name in ("loss", "tokens", "targets", "computed")}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, **keys}) + "\n")


def packs_a_step(rows: list[dict[str, Any]], job: Job) -> int:
    """Packs that hold about as many examples as a step should: a pack is one row to SFTTrainer."""
    table = Dataset.from_list([{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in rows])
    packs = len(trl.pack_dataset(table, job.max_length, SFTConfig.packing_strategy))
    return max(1, round(job.batch_size * packs / len(rows)))


def same_ids(rows: list[dict[str, Any]], tokenizer: Any) -> int:
    """Rows whose ids SFTTrainer would have made itself of prompt and completion as text."""

    def made(row: dict[str, Any]) -> tuple[list[int], int]:
        prompt = tokenizer(row["prompt"])["input_ids"]
        whole = tokenizer(row["prompt"] + row["completion"] + tokenizer.eos_token)["input_ids"]
        common = next((place for place, pair in enumerate(zip(prompt, whole, strict=False)) if pair[0] != pair[1]), len(prompt))
        return whole, len(whole) - common

    return sum(made(row) == (row["input_ids"], sum(row["completion_mask"])) for row in rows)


@torch.no_grad()
def leak(trainer: SFTTrainer) -> dict[str, Any]:
    """How far the last example of a pack moves when the tokens of the first are others: 0 if no example sees another."""
    inputs = next(iter(trainer.get_train_dataloader()))
    inputs = {name: value for name, value in inputs.items() if name != "labels"}
    starts = (inputs["position_ids"][0] == 0).nonzero().flatten().tolist()
    if len(starts) < 2:
        return {"segments": len(starts)}
    decoder = trainer.accelerator.unwrap_model(trainer.model).get_decoder()
    before = decoder(**inputs, use_cache=False).last_hidden_state[0, starts[-1] :]
    ids = inputs["input_ids"].clone()
    ids[0, : starts[1]] = (ids[0, : starts[1]] + 1000) % 40000
    after = decoder(**{**inputs, "input_ids": ids}, use_cache=False).last_hidden_state[0, starts[-1] :]
    return {"segments": len(starts), "largest_change": float((after - before).abs().max()), "of": float(before.abs().max())}


def main() -> None:
    job = Job(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    torch.set_num_threads(job.threads)
    rows = [json.loads(line) for line in Path(job.rows).read_text(encoding="utf-8").splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    same = same_ids(rows, tokenizer)
    batch = packs_a_step(rows, job) if job.packing else job.batch_size
    config = SFTConfig(
        output_dir=job.out,
        model_init_kwargs={"dtype": "float32"},
        bf16=True,
        use_cpu=True,
        packing=job.packing,
        max_length=job.max_length,
        completion_only_loss=True,  # the default for text; ids must say it
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=1,
        num_train_epochs=1,
        max_steps=job.max_steps,
        learning_rate=job.lr,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=job.max_grad_norm,
        train_sampling_strategy="sequential",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    table = Dataset.from_list([{name: row[name] for name in ("input_ids", "completion_mask")} for row in rows])
    lines = Lines(job.metrics)
    trainer = Counted(model=job.model, args=config, train_dataset=table, processing_class=tokenizer, callbacks=[lines])
    lines.trainer = trainer
    trainer.train()
    model = trainer.model
    result = {
        "versions": {name: metadata.version(name) for name in ("trl", "transformers", "torch", "accelerate", "datasets", "tokenizers")},
        "python": sys.version.split()[0],
        "threads": torch.get_num_threads(),
        "rows_whose_text_gives_the_same_ids": same,
        "rows": len(rows),
        "weights": str(next(model.parameters()).dtype).removeprefix("torch."),
        "attention": model.config._attn_implementation,
        "rows_a_step": batch,
        "options": {
            name: getattr(config, name)
            for name in ("packing", "packing_strategy", "padding_free", "gradient_checkpointing", "loss_type", "completion_only_loss")
        }
        | {"padding_free": trainer.padding_free, "optim": str(config.optim.value if hasattr(config.optim, "value") else config.optim)}
        | {name: getattr(config, name) for name in ("adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay", "max_grad_norm")},
        "leak": leak(trainer) if job.packing else None,
        "job": dataclasses.asdict(job),
    }
    if job.max_steps < 0:
        trainer.save_model(job.out)
    Path(job.result).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
