"""Deltas beside their peers: size and speed of coding, time and memory of applying, and a release of 7B shape.

    python benchmarks/delta.py --base smollm2-135m --target TUNED [--part size|apply|release ...]

size     bits a weight, and MB of restored weights a second, of the difference of two 16-bit checkpoints: each of our levels,
         ZipNN's and z4ai's deltas, lmzip's archive, zstandard of the XOR; and the entropies. Same tensors for all, two threads.
apply    a made-up fp16 LLaMA of 1.26 G weights: FastChat's apply_delta beside ours on the delta that it reads, on our own
         two kinds, and `cp` of base and delta with `sync`. Page cache warm; ours includes its checks and its own syncs.
release  a delta as MT-LLaMA's was published (two `.bin` shards of 10 and 3.5 GB, 32,001 rows) on a base of 7B shape, which it
         then is made of again as an exact delta: time and peak memory. Needs 48 GB in --work.

Each peer is installed into a virtual environment of its own under --peers at the first run. Every output is compared with the
target, and its differing weights counted. The inputs of `apply` and `release` stay in --work for the next run. The last line of
the output is one JSON document. What fails is said there, and the rest goes on.
"""

import argparse
import functools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from delta_peers import REPEATS, THREADS

os.environ["HF_HUB_OFFLINE"] = "1"

HERE = Path(__file__).resolve().parent
OURS = (sys.executable, "-m", "mtllama", "delta")
TORCH = f"torch=={metadata.version('torch').split('+')[0]}"
PEERS = {
    "zipnn": ("zipnn==0.5.4", TORCH),
    "lmzip": ("lmzip[zstd]==1.3.0",),
    "z4ai": ("z4ai==0.2.0",),
    "fastchat": ("fschat==0.2.36", "transformers<4.50", "accelerate", "sentencepiece", "protobuf", TORCH),
}
ITEMSIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
EXPONENT = {"BF16": (7, 255), "F16": (10, 31)}
"""Where the exponent stands in the pattern: shift and mask."""
BIN_SHARD, SAFETENSORS_SHARD = 10_000_000_000, 5_000_000_000


class FailedError(Exception):
    """A command that did not do its work; its last line of output."""


def say(text: str) -> None:
    print(text, flush=True)


# Files


def read(folder: Path) -> dict[str, tuple[str, np.ndarray]]:
    """Dtype and bit patterns (mapped, not read) of each tensor of a safetensors checkpoint."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        header.pop("__metadata__", None)
        data = np.memmap(path, np.uint8, "r", offset=8 + size) if path.stat().st_size > 8 + size else np.empty(0, np.uint8)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            dtype = entry["dtype"]
            found[name] = dtype, data[begin:end].view(f"u{ITEMSIZES[dtype]}").reshape(entry["shape"])
    return found


def write_safetensors(path: Path, arrays: dict[str, tuple[str, tuple[int, ...], Any]]) -> None:
    """(dtype, shape, patterns or a function that makes them) by name; one tensor in memory at a time."""
    header, offset = {}, 0
    for name, (dtype, shape, _) in arrays.items():
        end = offset + int(np.prod(shape)) * ITEMSIZES[dtype]
        header[name], offset = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}, end
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, _, content in arrays.values():
            patterns = content() if callable(content) else content
            file.write(np.ascontiguousarray(patterns).reshape(-1).view(np.uint8).data)


def shards(shapes: dict[str, tuple[int, ...]], max_bytes: int) -> list[dict[str, tuple[int, ...]]]:
    """Tensors of 2 bytes a weight in order, in groups of at most `max_bytes`."""
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in shapes.items():
        if groups[-1] and size + 2 * int(np.prod(shape)) > max_bytes:
            groups.append({})
            size = 0
        groups[-1][name] = shape
        size += 2 * int(np.prod(shape))
    return groups


def write_index(folder: Path, stem: str, suffix: str, groups: list[dict[str, tuple[int, ...]]]) -> list[Path]:
    """The index of a checkpoint in shards, and the paths of its shards."""
    files = [f"{stem}-{number:05d}-of-{len(groups):05d}.{suffix}" for number in range(1, len(groups) + 1)]
    total = sum(2 * int(np.prod(shape)) for group in groups for shape in group.values())
    names = {name: file for file, group in zip(files, groups, strict=True) for name in group}
    index = {"metadata": {"total_size": total}, "weight_map": names}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index, indent=1))
    return [folder / file for file in files]


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")


def num_bytes(folder: Path, pattern: str = "*") -> int:
    return sum(path.stat().st_size for path in folder.rglob(pattern) if path.is_file())


def warm(*folders: Path) -> None:
    """Read every file once, so that the page cache has what fits into it."""
    buffer = bytearray(1 << 23)
    for folder in folders:
        for path in folder.rglob("*"):
            if path.is_file():
                with open(path, "rb", buffering=0) as file:
                    while file.readinto(buffer):
                        pass


def require_space(folder: Path, needed: float, what: str) -> None:
    free = shutil.disk_usage(folder).free
    say(f"{what}: {needed / 1e9:.0f} GB needed in {folder}, {free / 1e9:.0f} GB free")
    if free < needed:
        raise FailedError(f"{what} needs {needed / 1e9:.0f} GB in --work, of which {free / 1e9:.0f} GB are free")


# Commands


def peer(peers: Path, name: str) -> str:
    """The Python of a peer's environment, which is made if it is not there as it should be."""
    folder, wanted = peers / name, "\n".join(PEERS[name])
    python, marker = folder / "bin" / "python", folder / "installed"
    if not marker.is_file() or marker.read_text() != wanted:
        say(f"{name}: installing {' '.join(PEERS[name])} into {folder}")
        shutil.rmtree(folder, ignore_errors=True)
        for step in ([sys.executable, "-m", "venv", str(folder)], [str(python), "-m", "pip", "install", "--quiet", *PEERS[name]]):
            done = subprocess.run(step, capture_output=True, text=True)
            if done.returncode:
                raise FailedError(f"not installed: {last_line(done.stderr)}")
        marker.write_text(wanted)
    return str(python)


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.replace("\r", "\n").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no output"


def inside(python: str, *arguments: str | Path | int) -> dict[str, Any]:
    """A job of delta_peers.py, in the environment of `python`."""
    done = subprocess.run([python, str(HERE / "delta_peers.py"), *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise FailedError(last_line(done.stderr))
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def run(log: Path, *argv: str | Path) -> dict[str, Any]:
    """Seconds and peak memory of a command, and the last line that it wrote; written data is synced before and after."""
    os.sync()
    done = subprocess.run(
        [sys.executable, "-S", str(HERE / "delta_peers.py"), "command", str(log), *map(str, argv)],
        capture_output=True,
        text=True,
        check=True,
    )
    began = time.perf_counter()
    os.sync()
    return {
        **json.loads(done.stdout),
        "sync_after_seconds": time.perf_counter() - began,
        "output": last_line(log.read_text(errors="replace")),
    }


def ours(log: Path, *arguments: str | Path) -> dict[str, Any]:
    """One of our own commands; an error if it fails."""
    found = run(log, *OURS, *arguments)
    if found["status"]:
        raise FailedError(found["output"])
    return found


def median(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Of several runs of a command."""
    return {
        "seconds": round(statistics.median(each["seconds"] for each in runs), 2),
        "cpu_seconds": round(statistics.median(each["cpu_seconds"] for each in runs), 2),
        "peak_mb": round(max(each["peak_mb"] for each in runs)),
        "sync_after_seconds": round(statistics.median(each["sync_after_seconds"] for each in runs), 2),
        "all_seconds": [round(each["seconds"], 2) for each in runs],
    }


def differing(found: Path, wanted: Path) -> dict[str, int]:
    """How many weights of a checkpoint are not those that are wanted, bit for bit."""
    ours, theirs = read(found), read(wanted)
    return {
        "weights_differing": sum(
            int(np.count_nonzero(ours[name][1] != patterns)) for name, (_, patterns) in theirs.items() if name in ours
        ),
        "tensors_missing": len(theirs.keys() - ours.keys()),
        "tensors_more": len(ours.keys() - theirs.keys()),
    }


# size


def entropy(counts: np.ndarray) -> float:
    """Bits that numbers with these counts need at least."""
    counts = counts[counts > 0].astype(np.float64)
    if not len(counts):
        return 0.0
    return float((counts * (np.log2(counts.sum()) - np.log2(counts))).sum())


def entropies(base: dict[str, tuple[str, np.ndarray]], target: dict[str, tuple[str, np.ndarray]]) -> dict[str, Any]:
    """Share of equal weights; bits a weight of their difference in the order of the numbers, of order 0 and given the base's exponent."""
    (dtype,) = {dtype for dtype, _ in base.values()}
    shift, mask = EXPONENT[dtype]
    counts = np.zeros((mask + 1, 1 << 16), np.int64)
    for name, (_, patterns) in base.items():
        before, after = (np.asarray(each).reshape(-1) for each in (patterns, target[name][1]))
        change = ordered(after) - ordered(before)
        keys = ((before >> shift) & mask).astype(np.int64) << 16 | change
        counts += np.bincount(keys, minlength=counts.size).reshape(counts.shape)
    total = int(counts.sum())
    return {
        "dtype": dtype,
        "weights": total,
        "equal": round(float(counts[:, 0].sum() / total), 4),
        "order_0": round(entropy(counts.sum(axis=0)) / total, 3),
        "given_exponent": round(sum(map(entropy, counts)) / total, 3),
    }


def ordered(patterns: np.ndarray) -> np.ndarray:
    """Patterns of 16-bit floats -> numbers in the same order, modulo 2^16."""
    return patterns ^ np.where(patterns >> 15, np.uint16(0xFFFF), np.uint16(0x8000))


def pair(base: str, target: str, work: Path) -> Path:
    """Two checkpoints of one safetensors file each, with the 16-bit tensors that base and target share, in one order."""
    from mtllama.model.find import find_model

    folders = [find_model(model).folder for model in (base, target)]
    before, after = map(read, folders)
    names = [
        name for name in after if name in before and (before[name][0], before[name][1].shape) == (after[name][0], after[name][1].shape)
    ]
    names = [name for name in names if after[name][0] in EXPONENT]
    for side, folder, tensors in zip(("base", "target"), folders, (before, after), strict=True):
        path = work / side
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        write_safetensors(
            path / "model.safetensors", {name: (tensors[name][0], tensors[name][1].shape, tensors[name][1]) for name in names}
        )
        shutil.copyfile(folder / "config.json", path / "config.json")
    return work


def ours_codec(level: str, base: dict[str, tuple[str, np.ndarray]], target: dict[str, tuple[str, np.ndarray]]) -> dict[str, Any]:
    """Coding alone, in memory. THE ONE PLACE HERE that knows the codec from the inside: a change of its interface belongs here."""
    from concurrent.futures import ThreadPoolExecutor

    from mtllama.weights import codec
    from mtllama.weights.shards import DTYPES

    tensors = {name: (DTYPES[dtype], patterns.shape, np.array(patterns).reshape(-1)) for name, (dtype, patterns) in base.items()}
    targets = {name: np.array(patterns).reshape(-1) for name, (_, patterns) in target.items()}

    def encode(name: str, pool: ThreadPoolExecutor) -> tuple[list[bytes], bytes]:
        dtype, shape, before = tensors[name]
        after, parts = targets[name], codec.slices(before.size)
        encoder = codec.Encoder(dtype, shape, level)
        for _ in range(encoder.passes):
            encoder.learn(pool.map(lambda part: encoder.look(part, before[part], after[part]), parts))
        coded = list(pool.map(lambda part: encoder.code(part, before[part], after[part]), parts))
        return coded, encoder.foot(list(map(len, coded)))

    def decode(made: dict[str, tuple[list[bytes], bytes]], pool: ThreadPoolExecutor) -> dict[str, np.ndarray]:
        out = {name: np.empty_like(before) for name, (_, _, before) in tensors.items()}

        def one(name: str, decoder: codec.Decoder, part: slice, data: bytes) -> None:
            out[name][part] = decoder.decode(part, tensors[name][2][part], memoryview(data))

        calls = []
        for name, (coded, foot) in made.items():
            dtype, shape, before = tensors[name]
            decoder = codec.Decoder(dtype, shape, foot[: -codec.FOOT_SIZE], sum(map(len, coded)))
            calls += [pool.submit(one, name, decoder, part, data) for part, data in zip(codec.slices(before.size), coded, strict=True)]
        for call in calls:
            call.result()
        return out

    encoding, decoding = [], []
    with ThreadPoolExecutor(THREADS) as pool:
        for _ in range(REPEATS + 1):  # the first compiles
            began = time.perf_counter()
            made = {name: encode(name, pool) for name in tensors}
            encoding.append(time.perf_counter() - began)
            began = time.perf_counter()
            restored = decode(made, pool)
            decoding.append(time.perf_counter() - began)
    assert all(np.array_equal(restored[name], targets[name]) for name in targets), "the restored tensors differ"
    return {
        "bytes": sum(sum(map(len, coded)) + len(foot) for coded, foot in made.values()),
        "encode_seconds": statistics.median(encoding[1:]),
        "decode_seconds": statistics.median(decoding[1:]),
        "runs": REPEATS,
    }


def ours_commands(level: str, models: Path, work: Path) -> dict[str, Any]:
    """The two commands: starting, reading, hashing, checking, writing and syncing included."""
    delta, out, log = work / "delta", work / "restored", work / "log"
    runs: dict[str, list[dict[str, Any]]] = {"make": [], "apply": []}
    for _ in range(REPEATS + 1):
        for path in (delta, out):
            shutil.rmtree(path, ignore_errors=True)
        common = ["--base", models / "base", "--workers", str(THREADS), "--out"]
        runs["make"].append(ours(log, "make", *common, delta, "--target", models / "target", "--level", level))
        runs["apply"].append(ours(log, "apply", *common, out, "--delta", delta))
        assert not any(differing(out, models / "target").values()), f"level {level}: the restored model differs"
    found = {name: median(each[1:]) for name, each in runs.items()}
    return {"bytes": num_bytes(delta, "*.safetensors"), "manifest_bytes": num_bytes(delta, "*.json"), **found}


def size(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    from mtllama.weights.codec import LEVELS

    models = pair(arguments.base, arguments.target, work)
    base, target = (read(models / side) for side in ("base", "target"))
    limits = entropies(base, target)
    say(f"entropy: {limits}")
    weights, megabytes = limits["weights"], 2 * limits["weights"] / 1e6

    def coding(found: dict[str, Any]) -> dict[str, Any]:
        return {
            "bits_per_weight": round(8 * found["bytes"] / weights, 3),
            "encode_mb_per_second": round(megabytes / found["encode_seconds"], 1),
            "decode_mb_per_second": round(megabytes / found["decode_seconds"], 1),
            "runs": found["runs"],
            **({"version": found["version"]} if "version" in found else {}),
        }

    def commands(found: dict[str, Any]) -> dict[str, Any]:
        speeds = {f"{name}_mb_per_second": round(megabytes / found[name]["seconds"], 1) for name in ("make", "apply")}
        return {"bits_per_weight": round(8 * found["bytes"] / weights, 3), **speeds, **found}

    jobs: dict[str, Any] = {}
    for level in LEVELS:
        jobs[f"ours, {level}, coding"] = lambda level=level: coding(ours_codec(level, base, target))
        jobs[f"ours, {level}, commands"] = lambda level=level: commands(ours_commands(level, models, work))
    for codec in ("zipnn", "lmzip", "z4ai", "zstd-3", "zstd-19"):

        def of_peer(codec: str = codec) -> dict[str, Any]:
            python = peer(arguments.peers, codec) if codec in PEERS else sys.executable
            return coding(
                inside(python, "code", codec, *(models / side / "model.safetensors" for side in ("base", "target")), work / codec)
            )

        jobs[codec] = of_peer
    results = {name: attempt(name, job) for name, job in jobs.items()}
    shutil.rmtree(work)
    ratios = {}
    for level in LEVELS:
        own = results[f"ours, {level}, coding"].get("bits_per_weight")
        if own:
            others = {name: results[name]["bits_per_weight"] for name in ("zipnn", "lmzip", "z4ai") if "bits_per_weight" in results[name]}
            ratios[level] = {
                "times_entropy_given_exponent": round(own / limits["given_exponent"], 3),
                **{f"smaller_than_{name}": round(1 - own / other, 3) for name, other in others.items()},
            }
    return {"entropy": limits, "results": results, "ratios": ratios}


# apply


def llama(hidden: int, intermediate: int, layers: int, rows: int, *, inv_freq: int = 0) -> dict[str, tuple[int, ...]]:
    """Shapes of a LLaMA without grouped queries, in the order in which such checkpoints are saved."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (rows, hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}self_attn.{part}_proj.weight": (hidden, hidden) for part in "qkvo"}
        if inv_freq:
            shapes[f"{prefix}self_attn.rotary_emb.inv_freq"] = (inv_freq,)
        shapes |= {f"{prefix}mlp.{part}_proj.weight": (intermediate, hidden) for part in ("gate", "up")}
        shapes[f"{prefix}mlp.down_proj.weight"] = (hidden, intermediate)
        shapes |= {f"{prefix}{part}_layernorm.weight": (hidden,) for part in ("input", "post_attention")}
    return {**shapes, "model.norm.weight": (hidden,), "lm_head.weight": (rows, hidden)}


def config(shapes: dict[str, tuple[int, ...]], heads: int, **more: Any) -> dict[str, Any]:
    """config.json of a model of these shapes."""
    rows, hidden = shapes["lm_head.weight"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": shapes["model.layers.0.mlp.up_proj.weight"][0],
        "num_attention_heads": heads,
        "num_hidden_layers": sum(name.endswith("self_attn.q_proj.weight") for name in shapes),
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-06,
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "use_cache": True,
        "vocab_size": rows,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **more,
    }


def normal(seed: tuple[int, ...], shape: tuple[int, ...], std: float) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal(shape, np.float32)
    values *= np.float32(std)
    return values


WEIGHT_STD, UPDATE_STD, SMALL_UPDATE_STD = 0.02, 3e-4, 1e-4
TOKENIZER = {
    "tokenizer_class": "LlamaTokenizer",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "add_bos_token": True,
    "add_eos_token": False,
    "legacy": True,
    "clean_up_tokenization_spaces": False,
}
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def made(work: Path, build: Any, **about: Any) -> Path:
    """The folder `inputs`, built once for what `about` says."""
    folder, marker = work / "inputs", work / "inputs" / "made.json"
    if not marker.is_file() or json.loads(marker.read_text()) != about:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        build(folder)
        write_json(marker, about)
        os.sync()
    return folder


def build_apply(folder: Path, python: str) -> None:
    """base and target (safetensors), and published: their fp16 difference in `.bin` shards, as FastChat's make_delta leaves it."""
    require_space(folder, 18e9, "apply")
    shapes = llama(2048, 5632, 22, 32000)
    number = {name: index for index, name in enumerate(shapes)}

    def base(name: str) -> np.ndarray:
        values = normal((number[name], 0), shapes[name], WEIGHT_STD)
        return (values + 1 if len(shapes[name]) == 1 else values).astype(np.float16)

    def target(name: str) -> np.ndarray:
        return (base(name) + normal((number[name], 1), shapes[name], UPDATE_STD)).astype(np.float16)

    def difference(name: str) -> np.ndarray:
        return target(name) - base(name)

    about, groups = config(shapes, 32), shards(shapes, 2_000_000_000)
    for side, make in (("base", base), ("target", target)):
        say(f"apply: writing {side}")
        (folder / side).mkdir()
        for path, group in zip(write_index(folder / side, "model", "safetensors", groups), groups, strict=True):
            write_safetensors(path, {name: ("F16", shape, functools.partial(make, name)) for name, shape in group.items()})
        write_json(folder / side / "config.json", about)
    say("apply: writing published")
    published, raw = folder / "published", folder / "raw"
    published.mkdir()
    for path, group in zip(write_index(published, "pytorch_model", "bin", groups), groups, strict=True):
        write_safetensors(raw, {name: ("F16", shape, functools.partial(difference, name)) for name, shape in group.items()})
        header = 8 + int.from_bytes(raw.open("rb").read(8), "little")
        save_bin(path, dict(zip(group, split(raw, header, group), strict=True)))
        raw.unlink()
    write_json(published / "config.json", about)
    write_json(published / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})
    write_json(published / "tokenizer_config.json", TOKENIZER)
    write_json(published / "special_tokens_map.json", SPECIAL)
    inside(python, "tokenizer", published / "tokenizer.model", 32000)


def split(path: Path, offset: int, group: dict[str, tuple[int, ...]]) -> Iterator[np.ndarray]:
    """The tensors of a raw file, mapped."""
    for shape in group.values():
        yield np.memmap(path, np.float16, "c", offset, shape)
        offset += 2 * int(np.prod(shape))


def save_bin(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """`torch.save` of mapped arrays: it writes from the map, so that no shard is ever in memory."""
    import torch

    torch.save({name: torch.from_numpy(array) for name, array in arrays.items()}, path)


def apply(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    python = peer(arguments.peers, "fastchat")
    inputs = made(work, functools.partial(build_apply, python=python), part="apply", weights=1.26, update=UPDATE_STD)
    base, target, published = (inputs / name for name in ("base", "target", "published"))
    bits, add, out, log = (work / name for name in ("bits", "add", "out", "log"))
    ours_apply = [*OURS, "apply", "--base", base, "--out", out, "--delta"]
    ours_make = [*OURS, "make", "--base", base, "--target", target, "--mode"]
    fastchat = ["--base-model-path", base, "--target-model-path", out, "--delta-path", published]
    # name -> command, what it reads, what it writes
    jobs: dict[str, tuple[list[Any], list[Path], Path]] = {
        "fastchat": ([python, "-m", "fastchat.model.apply_delta", *fastchat], [base, published], out),
        "ours, published delta": ([*ours_apply, published], [base, published], out),
        "ours, make bits": ([*ours_make, "bits", "--out", bits], [base, target], bits),
        "ours, make add": ([*ours_make, "add", "--out", add], [base, target], add),
        "ours, bits": ([*ours_apply, bits], [base, bits], out),
        "ours, add": ([*ours_apply, add], [base, add], out),
        "cp and sync": (["sh", "-c", f"mkdir '{out}' && cp -r '{base}' '{published}' '{out}' && sync"], [base, published], out),
    }
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in jobs}
    results: dict[str, dict[str, Any]] = {}
    for number in range(arguments.runs):
        for name, (argv, reads, writes) in jobs.items():
            shutil.rmtree(writes, ignore_errors=True)
            if results.get(name, {}).get("failed") or not all(path.is_dir() for path in reads):
                results.setdefault(name, {"failed": "there is no delta to apply"})
                continue
            warm(*reads)
            found = run(log, *argv)
            say(f"{name}: {found}")
            runs[name].append(found)
            if number == 0:
                results[name] = outcome(name, found, writes, target)
            if writes == out:
                shutil.rmtree(out, ignore_errors=True)
    for name, each in runs.items():
        if each:
            results[name] |= median(each)
    for path in (bits, add):
        shutil.rmtree(path, ignore_errors=True)
    return {"weights": sum(patterns.size for _, patterns in read(target).values()), "results": results, "ratios": apply_ratios(results)}


def outcome(name: str, found: dict[str, Any], out: Path, target: Path) -> dict[str, Any]:
    """What a command left: how far it is from the target, or how large it is."""
    result: dict[str, Any] = {"failed" if name.startswith("ours") else "ended_with": found["output"]} if found["status"] else {}
    if name == "cp and sync" or not out.is_dir():
        return result
    if name.startswith("ours, make"):
        return {**result, "output": found["output"], "bytes": num_bytes(out, "*.safetensors")}
    return {**result, **differing(out, target)}


def apply_ratios(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    seconds = {name: result["seconds"] for name, result in results.items() if "failed" not in result and "seconds" in result}
    ratios = {}
    for name in ("ours, published delta", "ours, bits", "ours, add"):
        if name in seconds:
            ratios[f"{name}: times faster than fastchat"] = round(seconds["fastchat"] / seconds[name], 2)
            ratios[f"{name}: times cp and sync"] = round(seconds[name] / seconds["cp and sync"], 2)
    return ratios


# release


def block(seed: int, std: float) -> np.ndarray:
    """Numbers for the largest tensor. Every other one has the first of them: that is quickly made, and quickly checked."""
    return normal((seed,), (32001 * 4096,), std).astype(np.float16)


def build_release(folder: Path, python: str) -> None:
    """A base as a newer transformers saves LLaMA-7B, and a delta as MT-LLaMA's."""
    shapes = llama(4096, 11008, 32, 32000)
    base, raw, published = block(0, WEIGHT_STD), folder / "raw", folder / "published"
    groups = shards(shapes, SAFETENSORS_SHARD)
    (folder / "base").mkdir()
    for path, group in zip(write_index(folder / "base", "model", "safetensors", groups), groups, strict=True):
        say(f"release: writing {path.name} of the base")
        write_safetensors(path, {name: ("F16", shape, base[: int(np.prod(shape))]) for name, shape in group.items()})
    write_json(folder / "base" / "config.json", config(shapes, 32))
    del base
    block(1, SMALL_UPDATE_STD).tofile(raw)
    shapes = llama(4096, 11008, 32, 32001, inv_freq=64)
    groups = shards(shapes, BIN_SHARD)
    inv_freq = (10000 ** (-np.arange(64) / 64)).astype(np.float16)
    published.mkdir()
    for path, group in zip(write_index(published, "pytorch_model", "bin", groups), groups, strict=True):
        say(f"release: writing {path.name} of the delta")
        arrays = {name: np.memmap(raw, np.float16, "c", 0, shape) for name, shape in group.items()}
        save_bin(path, {name: inv_freq.copy() if name.endswith("inv_freq") else array for name, array in arrays.items()})
    raw.unlink()
    ids = {"bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 32000}
    write_json(published / "config.json", config(shapes, 32, **ids, transformers_version="4.28.1"))
    write_json(published / "generation_config.json", ids)
    tokens = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "[UNK]"}
    write_json(published / "added_tokens.json", {"[PAD]": 32000})
    write_json(published / "special_tokens_map.json", {**tokens, "pad_token": "[PAD]"})
    write_json(published / "tokenizer_config.json", {**TOKENIZER, **tokens, "model_max_length": 2048, "padding_side": "right"})
    inside(python, "tokenizer", published / "tokenizer.model", 32000)


def check_release(out: Path) -> dict[str, int]:
    """Weights of a restored 7B model that are not fp16(base + delta), the base's missing row taken as zero."""
    delta = block(1, SMALL_UPDATE_STD)
    whole = (block(0, WEIGHT_STD) + delta).view(np.uint16)
    new = (np.float16(0) + delta).view(np.uint16)  # a sum has no -0 where the base has 0
    found, shapes = read(out), llama(4096, 11008, 32, 32001)
    wrong = 0
    for name, shape in shapes.items():
        if name not in found or found[name][1].shape != shape:
            wrong += int(np.prod(shape))
            continue
        patterns, old = found[name][1].reshape(-1), 32000 * shape[1] if shape[0] == 32001 else int(np.prod(shape))
        wrong += int(np.count_nonzero(patterns[:old] != whole[:old]))
        wrong += int(np.count_nonzero(patterns[old:] != new[old : patterns.size]))
    return {"weights_differing": wrong, "tensors_more": len(found.keys() - shapes.keys())}


def release(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    work.mkdir(parents=True, exist_ok=True)
    there = num_bytes(work / "inputs")
    require_space(work, 48e9 - there, "release")
    python = peer(arguments.peers, "fastchat")
    inputs = made(work, functools.partial(build_release, python=python), part="release", update=SMALL_UPDATE_STD)
    base, published = inputs / "base", inputs / "published"
    restored, bits, log = (work / name for name in ("restored", "bits", "log"))
    for path in (restored, bits):
        shutil.rmtree(path, ignore_errors=True)
    results = {}

    def step(name: str, *argv: str | Path) -> None:
        found = run(log, *argv)
        say(f"{name}: {found}")
        results[name] = ({"failed": found["output"]} if found["status"] else {}) | median([found])

    ours_apply = [*OURS, "apply", "--base", base, "--out", restored, "--delta"]
    step("apply published", *ours_apply, published)
    if restored.is_dir():
        results["apply published"] |= check_release(restored)
        step("make bits", *OURS, "make", "--mode", "bits", "--base", base, "--target", restored, "--out", bits)
        shutil.rmtree(restored)
    if bits.is_dir():
        results["make bits"]["bytes"] = num_bytes(bits, "*.safetensors")
        step("apply bits", *ours_apply, bits)
    if restored.is_dir():
        results["apply bits"] |= check_release(restored)
    for path in (restored, bits):
        shutil.rmtree(path, ignore_errors=True)
    shards_of = {side: [path.stat().st_size for path in sorted((inputs / side).glob(f"*.{suffix}"))] for side, suffix in FILES.items()}
    return {"shard_bytes": shards_of, "results": results}


FILES = {"base": "safetensors", "published": "bin"}


# All


def attempt(name: str, job: Any) -> dict[str, Any]:
    """The result of a job, or why there is none."""
    try:
        result: dict[str, Any] = job()
    except (FailedError, AssertionError, AttributeError, ImportError, TypeError) as error:
        result = {"failed": str(error)}
    say(f"{name}: {result}")
    return result


def hardware(work: Path) -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    models = {line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")}
    return {
        "processor": ", ".join(sorted(models)) or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": platform.platform(),
        "disk_gb": round(shutil.disk_usage(work).total / 1e9),
        "load_before": [round(load, 2) for load in os.getloadavg()],
    }


def main() -> None:
    parts = {"size": size, "apply": apply, "release": release}
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mtllama-benchmarks"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=list(parts), action="append", help="may be repeated; default: all")
    parser.add_argument("--base", default="smollm2-135m", metavar="MODEL")
    parser.add_argument("--target", metavar="MODEL", help="a fine-tune of the base, for part size")
    parser.add_argument("--peers", type=Path, default=cache / "peers", metavar="DIR", help="the peers' environments (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=cache / "work", metavar="DIR", help="inputs and outputs (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=REPEATS, metavar="N", help="runs of each command of part apply (default: %(default)s)")
    arguments = parser.parse_args()
    chosen = arguments.part or list(parts)
    if "size" in chosen and not arguments.target:
        parser.error("part size needs --target")
    arguments.work, arguments.peers = arguments.work.resolve(), arguments.peers.resolve()
    arguments.work.mkdir(parents=True, exist_ok=True)
    result = {
        "benchmark": "delta",
        "hardware": hardware(arguments.work),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("mtllama", "torch", "numpy", "zstandard", "safetensors", "numba")},
        "peers": {name: list(packages) for name, packages in PEERS.items()},
        "threads": THREADS,
    }
    for part in chosen:
        (arguments.work / part).mkdir(exist_ok=True)
        result[part] = attempt(part, functools.partial(parts[part], arguments, arguments.work / part))
    print(json.dumps(result))


def version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
