"""Training beside TRL's SFTTrainer: real tokens a second, memory, quality, and how far each is from what the processor can do.

    python benchmarks/train.py --data P3 [--examples 400] [--peer-steps N] [--out FILE]

Three runs over the same examples of P3 in the same order, in bf16 with float32 weights, the same optimiser and learning rate:

ours           `mtllama train run` with a recipe whose data are these examples
sft            SFTTrainer with its defaults: padded batches, loss on the completion only
sft, packing   SFTTrainer with packing=True and its default strategy, as many packs a step as hold 8 examples on average. Packing
               puts the examples into another order

Real tokens are those of prompt, answer and end marker; padding is never counted. Time runs from the end of the first step to the end
of the last one, taken from outside by the lines that each run writes when a step is done: start-up, loading and saving are not in it.
A run that had much less than its cores is called disturbed: its speed says little, its quality stands. Memory is the resident peak of
the process up to its last step. Quality is the mean loss per target token on other rows of P3, computed here in float32 for the base and
for what each run left; weights that were stored in float32 (SFTTrainer's) are measured rounded to bfloat16 too, which is how the base
and ours are stored. The processor's own rate is that of the model's matrix products (forward, and both of the backward pass), taken
before and after the runs, and the floor is the examples' FLOPs at that rate.

TRL is installed into a virtual environment of its own under --peers at the first run. Its whole runs are slow: they are made once for
each set of versions, examples and processor, kept in --work, and not made again (--fresh: they are). With --peer-steps N
they are cut off after N steps: speed is measured beside ours, quality is that of a kept whole run, if there is one. --preload gives all
of them another allocator alike. The last line of the output is one JSON document.
"""

import argparse
import functools
import hashlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

HERE = Path(__file__).resolve().parent
VERSIONS = {name: metadata.version(name).split("+")[0] for name in ("torch", "transformers", "datasets", "tokenizers", "numpy")}
PEER = ("trl==1.16.0", *(f"{name}=={version}" for name, version in VERSIONS.items()))
BATCH_SIZE, LR, MAX_LENGTH, MAX_GRAD_NORM = 8, 2e-5, 1024, 1.0
HELD_OUT_FROM = 1_000_000
"""Index of the mixture from which the held-out rows are drawn."""
NAMES = ("ours", "sft", "sft, packing")
WIDTHS = (1000, 2000)
"""Rows of the matrix products that are timed."""
LAYERS = 8
"""Layers whose products are timed, each with weights of its own, so that they come from memory as in training."""
SAMPLES = 24
"""Times at least that each shape of product is taken."""
UNDISTURBED = 0.7
"""Part of its threads' time that a run must have had on the processor to be called undisturbed."""
POLL = 0.02
"""Seconds between two looks at a run."""


class FailedError(Exception):
    """What did not do its work, in one line."""


def say(text: str) -> None:
    print(text, flush=True)


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.replace("\r", "\n").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no output"


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


# Examples


@dataclass(frozen=True)
class Row:
    """One example, as text and as ids."""

    inputs: str
    targets: str
    prompt: str
    ids: list[int]
    num_target: int
    cut: bool

    def for_peer(self) -> dict[str, Any]:
        mask = [0] * (len(self.ids) - self.num_target) + [1] * self.num_target
        return {"prompt": self.prompt, "completion": " " + self.targets, "input_ids": self.ids, "completion_mask": mask}


def rows_of(data: Path, model: Path, num_examples: int, num_held_out: int) -> tuple[list[Row], list[Row]]:
    """The examples to train on, and others: two stretches of the mixture of all P3 rows in `data`, no row in both, none twice."""
    from mtllama.data.mixture import Mixture, MixtureConfig
    from mtllama.data.prompt import DEFAULT_FORMAT, PromptEncoder, find_format
    from mtllama.model.find import load_tokenizer

    mixture = Mixture(MixtureConfig(dir=data, templates="p3"))
    encoder = PromptEncoder(load_tokenizer(model), find_format(DEFAULT_FORMAT), MAX_LENGTH)
    seen: set[tuple[str, str]] = set()

    def stretch(start: int, count: int) -> Iterator[Row]:
        index, limit = start, start + 100 * count + 1000
        while count and index < limit:
            example = mixture[index]
            index += 1
            encoded = encoder.encode(example.inputs, example.targets) if example else None
            if example is None or encoded is None or (example.inputs, example.targets) in seen:
                continue
            seen.add((example.inputs, example.targets))
            count -= 1
            prompt = encoder.prompt_text(example.inputs)
            yield Row(example.inputs, example.targets, prompt, encoded.ids, encoded.num_target, encoded.cut)
        if count:
            raise FailedError(f"{data} holds too few rows of P3")

    return list(stretch(0, num_examples)), list(stretch(HELD_OUT_FROM, num_held_out))


def describe(rows: Sequence[Row]) -> dict[str, Any]:
    lengths = sorted(len(row.ids) for row in rows)
    return {
        "rows": len(rows),
        "tokens": sum(lengths),
        "targets": sum(row.num_target for row in rows),
        "median_tokens": statistics.median(lengths),
        "longest": lengths[-1],
        "cut_to_max_length": sum(row.cut for row in rows),
        "sha256": digest([row.ids for row in rows]),
    }


def in_order(folder: Path, rows: Sequence[Row]) -> dict[str, Any]:
    """Write `rows` as a data set which the mixture draws in their order; returns the recipe's section for it.

    The mixture shuffles the rows of a set, by their number alone: so where each number comes is seen from any rows.
    """
    from mtllama.data.mixture import Mixture, MixtureConfig

    config = {"dir": str(folder), "templates": "p3"}
    shutil.rmtree(folder, ignore_errors=True)
    lines = [{"inputs": row.inputs, "targets": row.targets} for row in rows]
    write_lines(folder / "examples.jsonl", lines)
    mixture = Mixture(MixtureConfig(dir=folder, templates="p3"))
    placed: list[dict[str, Any]] = [{}] * len(lines)
    for index, line in enumerate(lines):
        placed[mixture.draw(index).row] = line
    write_lines(folder / "examples.jsonl", placed)
    mixture = Mixture(MixtureConfig(dir=folder, templates="p3"))
    drawn = [mixture[index] for index in range(len(rows))]
    if [(each.inputs, each.targets) for each in drawn if each] != [(row.inputs, row.targets) for row in rows]:
        raise FailedError("the mixture does not draw the examples in their order")
    return config


# Runs


def watched(argv: Sequence[str | Path], metrics: Path, log: Path, threads: int, beside: dict[str, str]) -> dict[str, Any]:
    """Run a trainer with `beside` in its environment; when each of its steps ended (seconds since the epoch), and its memory.

    A step ends when its line appears in `metrics`: the file's own time of change says when, however late it is looked at.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), **beside}
    ends: list[float] = []
    last: list[dict[str, Any]] = []
    peak = peak_in_steps = size = 0
    processor_seconds, cpu = 0.0, []
    load, began = os.getloadavg()[0], time.time()
    with open(log, "wb") as output, subprocess.Popen([*map(str, argv)], stdout=output, stderr=output, env=environment) as process:
        try:
            status = None
            while status is None:
                status = process.poll()
                peak, processor_seconds = max(peak, resident_peak(process.pid)), used(process.pid) or processor_seconds
                try:
                    state = metrics.stat()
                except FileNotFoundError:  # not yet, or moved to the result
                    state = None
                if state and state.st_size != size:
                    content = metrics.read_text(encoding="utf-8")
                    lines = content.splitlines()
                    if content.endswith("\n") and len(lines) > len(ends):
                        cpu += [processor_seconds] * (len(lines) - len(ends))
                        ends += [state.st_mtime_ns / 1e9] * (len(lines) - len(ends))
                        last, peak_in_steps = [json.loads(line) for line in lines], peak
                        size = state.st_size
                time.sleep(POLL if status is None else 0)
        finally:
            if process.poll() is None:
                process.kill()
    if status:
        raise FailedError(f"{last_line(log.read_text(errors='replace'))} (all of it: {log})")
    if len(ends) < 2 or len(set(ends)) < len(ends):
        raise FailedError(f"{len(ends)} steps were seen in {metrics}, {len(set(ends))} of them apart; at least 2 are needed")
    return {
        "when": time.strftime("%Y-%m-%d %H:%M", time.localtime(began)),
        "load_before": round(load, 2),
        "start_to_first_step_seconds": round(ends[0] - began, 2),
        "ends": ends,
        "threads": threads,
        "cores_used": round((cpu[-1] - cpu[0]) / (ends[-1] - ends[0]), 2),
        "lines": last,
        "peak_mb": round(peak_in_steps / 1024),
        "peak_mb_with_saving": round(peak / 1024),
    }


def resident_peak(process: int) -> int:
    """KB; 0 if it is gone."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")), 0)


def disturbed(run: dict[str, Any]) -> bool:
    """Whether others on the machine took so much of it that the run's speed says little."""
    return bool(run["cores_used"] < UNDISTURBED * run["threads"])


def used(process: int) -> float:
    """Seconds of processor time; 0 if it is gone."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def steps_of(run: dict[str, Any]) -> list[dict[str, Any]]:
    """Each step but the first: its seconds, and what it counted."""
    found = []
    for number in range(1, len(run["ends"])):
        before, line = run["lines"][number - 1], run["lines"][number]
        counts = {name: line[name] - before[name] for name in ("tokens", "targets", "computed") if name in line}
        found.append({"seconds": run["ends"][number] - run["ends"][number - 1], **counts})
    return found


def speed(run: dict[str, Any]) -> dict[str, Any]:
    steps = steps_of(run)
    seconds, tokens = sum(step["seconds"] for step in steps), sum(step["tokens"] for step in steps)
    found = {
        "tokens_per_second": round(tokens / seconds, 1),
        "seconds_per_step": round(seconds / len(steps), 3),
        "median_seconds_per_step": round(statistics.median(step["seconds"] for step in steps), 3),
        "steps_timed": len(steps),
        "tokens_timed": tokens,
        "targets_timed": sum(step["targets"] for step in steps),
        "seconds_timed": round(seconds, 2),
    }
    if "computed" in steps[0]:
        found["padding"] = round(1 - tokens / sum(step["computed"] for step in steps), 3)
    return found


@dataclass(frozen=True)
class Bench:
    """What the runs share."""

    model: Path
    train: list[Row]
    held_out: list[Row]
    work: Path
    python: Callable[[], str]
    """The peer's interpreter; the first call may install it."""
    threads: int
    settings: tuple[str, ...]
    """`key=value` for our recipe."""
    peer_steps: int
    fresh: bool
    environment: dict[str, str]
    """What every run has beside the benchmark's own: its allocator."""

    def recipe(self) -> dict[str, Any]:
        return {
            "model": str(self.model),
            "name": "benchmark",
            "out": str(self.work / "ours" / "out"),
            "mixture": in_order(self.work / "ours" / "data", self.train),
            "train": {
                "examples": len(self.train),
                "batch_size": BATCH_SIZE,
                "lr": LR,
                "warmup_ratio": 0.0,
                "schedule": "constant",
                "weight_decay": 0.0,
                "max_grad_norm": MAX_GRAD_NORM,
                "max_length": MAX_LENGTH,
                "dtype": "bfloat16",
                "save_every": len(self.train) + 1,  # neither side writes checkpoints
            },
        }

    def ours(self, *, quality: bool) -> dict[str, Any]:
        import yaml

        folder = self.work / "ours"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        recipe, out = self.recipe(), folder / "out"
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
        command: list[str | Path] = [sys.executable, "-m", "mtllama", "train", "run", folder / "recipe.yaml", *self.settings]
        run = watched(command, out.with_name("out.partial") / "metrics.jsonl", folder / "log", self.threads, self.environment)
        self._counted(run)
        result = {"run": run, "about": {"recipe": {**recipe["train"], "mixture": "the examples in their order"}, "set": self.settings}}
        if quality:
            result["held_out"] = held_out_loss(out, self.held_out)
        shutil.rmtree(out)
        return result

    def peer(self, *, packing: bool, quality: bool) -> dict[str, Any]:
        """Speed, and quality where the whole was run or a whole run is kept."""
        kept = self._kept(packing)
        if kept.is_file() and not self.fresh:
            whole: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
            say(f"a whole run of {whole['run']['when']} is kept in {kept}")
            if self.peer_steps < 0:
                return {**whole, "kept": True}
        else:
            whole = {}
        folder = self.work / ("packing" if packing else "sft")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_lines(folder / "rows.jsonl", [row.for_peer() for row in self.train])
        job = {
            "model": str(self.model),
            "packing": packing,
            "batch_size": BATCH_SIZE,
            "max_steps": self.peer_steps,
            "lr": LR,
            "max_length": MAX_LENGTH,
            "max_grad_norm": MAX_GRAD_NORM,
            "threads": self.threads,
            "rows": str(folder / "rows.jsonl"),
            **{name: str(folder / name) for name in ("metrics", "result", "out")},
        }
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        command: list[str | Path] = [self.python(), HERE / "train_peer.py", folder / "job.json"]
        run = watched(command, folder / "metrics", folder / "log", self.threads, self.environment)
        about = json.loads((folder / "result").read_text(encoding="utf-8"))
        about.pop("job")
        result = {"run": run, "about": about}
        if self.peer_steps < 0:
            self._counted(run)
            result["held_out"] = held_out_loss(folder / "out", self.held_out)
            kept.write_text(json.dumps(result), encoding="utf-8")
        elif quality and "held_out" in whole:
            result["held_out"] = {**whole["held_out"], "of_the_run_of": whole["run"]["when"]}
        shutil.rmtree(folder / "out", ignore_errors=True)
        return result

    def _kept(self, packing: bool) -> Path:
        rows = [[row.ids for row in part] for part in (self.train, self.held_out)]
        settings = [
            packing,
            BATCH_SIZE,
            LR,
            MAX_LENGTH,
            MAX_GRAD_NORM,
            self.threads,
            processor(),
            *([self.environment] if self.environment else []),
        ]
        return self.work / f"kept-{digest(PEER, rows, settings)}.json"

    def _counted(self, run: dict[str, Any]) -> None:
        """Every run must have seen all tokens once, and trained on all targets."""
        wanted = describe(self.train)
        line = run["lines"][-1]
        for name in ("tokens", "targets"):
            if line[name] != wanted[name]:
                raise FailedError(f"the run counted {line[name]} {name}; the examples have {wanted[name]}")


def peer_python(peers: Path, name: str, packages: Sequence[str]) -> str:
    """The Python of a peer's environment, which is made if it is not there as it should be."""
    folder, wanted = peers / name, "\n".join(packages)
    python, marker = folder / "bin" / "python", folder / "installed"
    if not marker.is_file() or marker.read_text() != wanted:
        say(f"installing {' '.join(packages)} into {folder}")
        shutil.rmtree(folder, ignore_errors=True)
        for step in ([sys.executable, "-m", "venv", str(folder)], [str(python), "-m", "pip", "install", "--quiet", *packages]):
            done = subprocess.run(step, capture_output=True, text=True)
            if done.returncode:
                raise FailedError(f"not installed: {last_line(done.stderr)}")
        marker.write_text(wanted)
    return str(python)


def held_out_loss(folder: Path, rows: Sequence[Row]) -> dict[str, Any]:
    """Mean cross-entropy (nat) per target token, of the weights as they are stored and rounded to bfloat16."""
    import torch
    import torch.nn.functional as F
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    stored = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("dtype")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()

    def loss() -> float:
        """Computed in float32, one row at a time."""
        total = 0.0
        for row in rows:
            ids = torch.tensor(row.ids)
            hidden = model.get_decoder()(input_ids=ids[None], use_cache=False).last_hidden_state[0, -row.num_target - 1 : -1]
            logits = model.get_output_embeddings()(hidden)
            total += float(F.cross_entropy(logits, ids[-row.num_target :], reduction="sum"))
        return total / sum(row.num_target for row in rows)

    with torch.inference_mode():
        found = {"stored_as": stored, "loss": loss()}
        if stored != "bfloat16":
            for parameter in model.parameters():
                parameter.copy_(parameter.bfloat16())
        return {**found, "loss_in_bfloat16": found["loss"] if stored == "bfloat16" else loss()}


# What the processor can do


def linears(model: Path) -> tuple[list[tuple[int, int]], list[tuple[int, int]], Any]:
    """Shapes of the linear layers of all blocks, of the first LAYERS blocks, and the config."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model)
    with torch.device("meta"):
        decoder = AutoModelForCausalLM.from_config(config).get_decoder()
    modules = ((name, module) for name, module in decoder.named_modules() if isinstance(module, torch.nn.Linear))
    found = [(name, (module.out_features, module.in_features)) for name, module in modules]
    first = [shape for name, shape in found if int(name.split(".")[1]) < LAYERS]
    return [shape for _, shape in found], first, config


def products(shapes: Sequence[tuple[int, int]], width: int, dtype: Any) -> dict[str, float]:
    """GFLOP/s of y = x W^T and of the two products of its backward pass, over layers of these shapes.

    Each shape counts with the shortest time that was seen of it, so that others on the machine do not lower its rate.
    """
    import torch
    import torch.nn.functional as F

    weights = [torch.randn(shape, dtype=dtype) * 0.02 for shape in shapes]
    inputs = {size: torch.randn(width, size, dtype=dtype) for size in {size for _, size in shapes}}
    grads = {size: torch.randn(width, size, dtype=dtype) for size in {size for size, _ in shapes}}
    ways: dict[str, Callable[[Any], Any]] = {
        "forward": lambda weight: F.linear(inputs[weight.shape[1]], weight),
        "backward_input": lambda weight: grads[weight.shape[0]].mm(weight),
        "backward_weight": lambda weight: grads[weight.shape[0]].t().mm(inputs[weight.shape[1]]),
    }
    flops = 2 * width * sum(out * size for out, size in shapes)
    best = {}
    with torch.inference_mode():
        for name, way in ways.items():
            shortest: dict[tuple[int, int], float] = {}
            for _ in range(-(-SAMPLES // min(shapes.count(shape) for shape in shapes))):
                for shape, weight in zip(shapes, weights, strict=True):
                    began = time.perf_counter()
                    way(weight)
                    shortest[shape] = min(shortest.get(shape, float("inf")), time.perf_counter() - began)
            best[name] = sum(shortest[shape] for shape in shapes)
    return {name: round(flops / seconds / 1e9, 1) for name, seconds in best.items()}


def machine(model: Path, targets_a_step: int) -> dict[str, Any]:
    """GFLOP/s of the processor, by dtype and number of rows: the blocks' products, and the head's on the targets of a step."""
    import torch

    _, first, config = linears(model)
    found: dict[str, Any] = {}
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        found[name] = {f"blocks, {width} tokens": products(first, width, dtype) for width in WIDTHS}
        found[name][f"head, {targets_a_step} targets"] = products([(config.vocab_size, config.hidden_size)], targets_a_step, dtype)
        say(f"matrix products in {name}, GFLOP/s: {found[name]}")
    return found


def faster(one: Any, other: Any) -> Any:
    """The larger of two rates, throughout."""
    return {name: faster(one[name], other[name]) for name in one} if isinstance(one, dict) else max(one, other)


def needed(model: Path, rows: Sequence[Row]) -> dict[str, float]:
    """GFLOP of one forward and backward pass over `rows`: the head on targets only, causal attention within each example."""
    shapes, _, config = linears(model)
    width = config.num_attention_heads * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    tokens, targets = sum(len(row.ids) for row in rows), sum(row.num_target for row in rows)
    return {
        "blocks": 6 * tokens * sum(out * size for out, size in shapes) / 1e9,
        "head": 6 * targets * config.vocab_size * config.hidden_size / 1e9,
        # Two products of length x length / 2 forward, four backward.
        "attention": 6 * config.num_hidden_layers * width * sum(len(row.ids) ** 2 for row in rows) / 1e9,
    }


def floor(rates: dict[str, Any], flops: dict[str, float], tokens: int) -> dict[str, dict[str, float]]:
    """Seconds that the matrix products alone need, and the tokens a second that they alone would allow, by dtype."""
    found = {}
    for name, each in rates.items():
        # The three products are of the same size.
        overall = {what: statistics.harmonic_mean(list(rate.values())) for what, rate in each.items()}
        blocks = max(rate for what, rate in overall.items() if what.startswith("blocks"))
        head = next(rate for what, rate in overall.items() if what.startswith("head"))
        seconds = (flops["blocks"] + flops["attention"]) / blocks + flops["head"] / head
        found[name] = {
            "gflops": round(sum(flops.values()) / seconds, 1),
            "seconds": round(seconds, 2),
            "tokens_per_second": round(tokens / seconds, 1),
        }
    return found


def hardware() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    flags = next((line.split() for line in info.read_text().splitlines() if line.startswith("flags")), []) if info.is_file() else []
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "bf16_instructions": [flag for flag in ("amx_bf16", "avx512_bf16") if flag in flags],
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": platform.platform(),
        "load_before": [round(load, 2) for load in os.getloadavg()],
    }


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    models = {line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")}
    return ", ".join(sorted(models)) or platform.processor() or platform.machine()


# All


def allocator(library: str | None, settings: str | None) -> dict[str, str]:
    """The environment of runs that use another allocator. One that cannot be loaded would else be passed over with a warning in a log."""
    if library is None:
        if settings is not None:
            raise FailedError("--malloc-conf is for the allocator of --preload")
        return {}
    environment = {"LD_PRELOAD": library, **({} if settings is None else {"MALLOC_CONF": settings})}
    tried = subprocess.run([sys.executable, "-c", ""], capture_output=True, text=True, env={**os.environ, **environment})
    if tried.returncode or tried.stderr.strip():
        raise FailedError(f"--preload {library}: {last_line(tried.stderr)}")
    return environment


def summary(results: Sequence[dict[str, Any]], flops_floor: dict[str, dict[str, float]]) -> dict[str, Any]:
    """One contestant: the median of its runs; what is no speed is that of the run nearest to it."""
    done = [result for result in results if "failed" not in result]
    if not done:
        return dict(results[0])
    speeds = [speed(result["run"]) for result in done]
    names = ("tokens_per_second", "seconds_per_step", "median_seconds_per_step")
    medians = {name: round(statistics.median(each[name] for each in speeds), 3) for name in names}
    rate = medians["tokens_per_second"]
    middle = min(range(len(done)), key=lambda place: abs(speeds[place]["tokens_per_second"] - rate))
    chosen, limit = done[middle], flops_floor["bfloat16"]["tokens_per_second"]
    losses = [line["loss"] for line in chosen["run"]["lines"]]
    return {
        **speeds[middle],
        **medians,
        "runs": [each["tokens_per_second"] for each in speeds],
        "fraction_of_bf16_floor": round(rate / limit, 3),
        "peak_mb": max(result["run"]["peak_mb"] for result in done),
        "peak_mb_with_saving": max(result["run"]["peak_mb_with_saving"] for result in done),
        "start_to_first_step_seconds": chosen["run"]["start_to_first_step_seconds"],
        "held_out": next((result["held_out"] for result in done if "held_out" in result), None),
        "first_and_last_training_loss": [round(losses[0], 4), round(losses[-1], 4)],
        "when": chosen["run"]["when"],
        "load_before": chosen["run"]["load_before"],
        "cores_used": chosen["run"]["cores_used"],
        "disturbed": disturbed(chosen["run"]),
        "kept": chosen.get("kept", False),
        "about": chosen["about"],
    }


def compare(results: dict[str, list[dict[str, Any]]], found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Ours against each peer."""
    ours, ratios = found["ours"], {}
    if "failed" in ours:
        return {}
    for name in NAMES[1:]:
        each = found[name]
        if "failed" in each:
            continue
        ratio: dict[str, Any] = {
            "disturbed": ours["disturbed"] or each["disturbed"],
            "times_the_tokens_per_second": round(ours["tokens_per_second"] / each["tokens_per_second"], 2),
            "times_the_memory": round(ours["peak_mb"] / each["peak_mb"], 3),
        }
        if ours["held_out"] and each["held_out"]:
            for key in ("loss", "loss_in_bfloat16"):
                ratio[f"held_out_{key}_above_by"] = round(ours["held_out"][key] / each["held_out"][key] - 1, 5)
        if name == "sft":  # its steps are of the same examples as ours
            own, other = (next(result["run"] for result in results[of] if "failed" not in result) for of in ("ours", name))
            common = min(len(own["ends"]), len(other["ends"])) - 1
            taken = [sum(step["seconds"] for step in steps_of(run)[:common]) for run in (own, other)]
            ratio["times_as_fast_on_the_same_steps"] = round(taken[1] / taken[0], 2)
            pairs = zip(own["lines"], other["lines"], strict=False)
            ratio["largest_difference_of_a_training_loss"] = round(max(abs(a["loss"] - b["loss"]) for a, b in pairs), 5)
        ratios[name] = ratio
    return ratios


def attempt(name: str, job: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A run, or why there is none."""
    try:
        result = job()
    except FailedError as error:
        say(f"{name}: {error}")
        return {"failed": str(error)}
    taken = speed(result["run"])
    loss = f", held-out loss {result['held_out']['loss']:.4f}" if "held_out" in result else ""
    say(
        f"{name}: {taken['tokens_per_second']} real tokens/s, {taken['seconds_per_step']} s a step, "
        f"{result['run']['cores_used']} cores used{' (disturbed by others)' if disturbed(result['run']) else ''}, peak {result['run']['peak_mb']} MB{loss}"
    )
    return result


def main() -> None:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mtllama-benchmarks"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="P3's rows, as for mixture.templates=p3")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--examples", type=int, default=400, metavar="N")
    parser.add_argument("--held-out", type=int, default=200, metavar="N", help="rows of the quality comparison")
    parser.add_argument("--threads", type=int, default=2, metavar="N")
    parser.add_argument("--repeat", type=int, default=1, metavar="N", help="runs of each, in turns; whole runs of the peers are made once")
    parser.add_argument("--peer-steps", type=int, default=-1, metavar="N", help="cut the peers off after so many steps (at least 2)")
    parser.add_argument("--only", choices=NAMES, action="append", help="may be repeated; default: all")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="wins over our recipe; may be repeated")
    parser.add_argument(
        "--preload", metavar="LIB", help="an allocator, as libjemalloc.so.2, put before the C library's in every run (LD_PRELOAD)"
    )
    parser.add_argument("--malloc-conf", metavar="TEXT", help="its settings (MALLOC_CONF)")
    parser.add_argument("--fresh", action="store_true", help="do not use kept runs of the peers")
    parser.add_argument("--peers", type=Path, default=cache / "peers", metavar="DIR", help="the peers' environments (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=cache / "work" / "train", metavar="DIR", help="default: %(default)s")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the JSON document there")
    arguments = parser.parse_args()
    if arguments.peer_steps in (0, 1) or arguments.examples <= BATCH_SIZE or min(arguments.held_out, arguments.repeat) < 1:
        parser.error(f"--peer-steps must be 2 or more, --examples more than {BATCH_SIZE}, --held-out and --repeat 1 or more")
    try:
        environment = allocator(arguments.preload, arguments.malloc_conf)
    except FailedError as error:
        parser.error(str(error))

    import torch

    from mtllama.model.find import find_model

    torch.set_num_threads(arguments.threads)
    about, model = hardware(), find_model(arguments.model).folder
    train, held_out = rows_of(arguments.data, model, arguments.examples, arguments.held_out)
    data = {"train": describe(train), "held_out": describe(held_out)}
    say(f"examples: {data}")
    targets_a_step = round(data["train"]["targets"] * BATCH_SIZE / len(train))
    rates, flops = machine(model, targets_a_step), needed(model, train)
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    base = held_out_loss(model, held_out)
    say(f"base: held-out loss {base['loss']:.4f}")
    python = functools.cache(functools.partial(peer_python, arguments.peers.resolve(), "trl", PEER))
    settings, peer_steps = tuple(arguments.set), max(arguments.peer_steps, -1)
    bench = Bench(model, train, held_out, work, python, arguments.threads, settings, peer_steps, arguments.fresh, environment)
    jobs: dict[str, Callable[..., dict[str, Any]]] = {
        "ours": bench.ours,
        "sft": functools.partial(bench.peer, packing=False),
        "sft, packing": functools.partial(bench.peer, packing=True),
    }
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in NAMES}
    for number in range(arguments.repeat):
        for name in arguments.only or NAMES:
            whole_peer = name != "ours" and bench.peer_steps < 0
            if not (number and whole_peer):
                job = functools.partial(jobs[name], quality=number == 0)
                results[name].append(attempt(name, job))
    rates = faster(rates, machine(model, targets_a_step))
    limit = floor(rates, flops, data["train"]["tokens"])
    say(f"floor of matrix products alone: {limit}")
    found = {name: summary(results[name] or [{"failed": "not asked for"}], limit) for name in NAMES}
    result = {
        "benchmark": "train",
        "hardware": about,
        "python": platform.python_version(),
        "versions": {"mtllama": metadata.version("mtllama"), **VERSIONS},
        "peer": list(PEER),
        "threads": arguments.threads,
        "environment": environment,
        "model": arguments.model,
        "setting": {
            "batch_size": BATCH_SIZE,
            "lr": LR,
            "schedule": "constant, no warm-up",
            "weight_decay": 0.0,
            "max_grad_norm": MAX_GRAD_NORM,
            "max_length": MAX_LENGTH,
            "dtype": "bfloat16 compute, float32 weights",
            "optimiser": "AdamW, fused",
        },
        "data": data,
        "base": base,
        "products_gflops": rates,
        "gflop": {name: round(value, 1) for name, value in flops.items()},
        "floor": limit,
        "results": found,
        "ratios": compare(results, found),
    }
    text = json.dumps(result)
    if arguments.out:
        arguments.out.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
