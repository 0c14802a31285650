"""Size and speed of the lossless difference at each level, against the entropies of the difference.

    python benchmarks/delta.py --base smollm2-135m --target TUNED

Reading and hashing are left out: only coding is timed, median of three runs. The last line of the output is one JSON document.
"""

import argparse
import json
import os
import platform
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from typing import Any

import numpy as np
import torch

from mtllama.model.find import find_model
from mtllama.weights import codec, kernels
from mtllama.weights.shards import CheckpointReader

REPEATS = 3


def entropy(counts: np.ndarray) -> float:
    """Bits that numbers with these counts need at least."""
    counts = counts[counts > 0].astype(np.float64)
    return float((counts * (np.log2(counts.sum()) - np.log2(counts))).sum())


def entropies(pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> dict[str, float]:
    """Of 16-bit weights: the share of equal ones, and bits a weight of order 0 and given the base's exponent."""
    counts = np.zeros((256, 1 << 16), np.int64)
    for base, target in pairs.values():
        bits, sign = codec._bits(base), codec._sign(base.dtype)
        shift, mask = codec._field(base.dtype)
        exponents = ((bits >> shift) & mask).astype(np.int64)
        keys = exponents << 16 | kernels.difference(bits, codec._bits(target), sign)
        counts += np.bincount(keys, minlength=counts.size).reshape(counts.shape)
    total = counts.sum()
    return {
        "weights": int(total),
        "equal": round(float(counts[:, 0].sum() / total), 4),
        "order_0": round(entropy(counts.sum(axis=0)) / total, 3),
        "given_exponent": round(sum(map(entropy, counts)) / total, 3),
    }


def measure(pairs: dict[str, tuple[torch.Tensor, torch.Tensor]], level: Any, workers: int) -> dict[str, float]:
    num_bytes = sum(target.nbytes for _, target in pairs.values())
    num_weights = sum(target.numel() for _, target in pairs.values())
    times: dict[str, list[float]] = {"encode": [], "decode": []}
    with ThreadPoolExecutor(workers) as pool:
        for _ in range(REPEATS + 1):  # the first compiles
            began = time.perf_counter()
            coded = {name: codec.encode(base, target, level, pool) for name, (base, target) in pairs.items()}
            times["encode"].append(time.perf_counter() - began)
            began = time.perf_counter()
            restored = {name: codec.decode(base, coded[name], name, pool) for name, (base, _) in pairs.items()}
            times["decode"].append(time.perf_counter() - began)
    for name, (_, target) in pairs.items():
        assert torch.equal(restored[name].view(torch.uint8), target.view(torch.uint8)), name
    speeds = {f"{what}_mb_per_second": round(num_bytes / statistics.median(found[1:]) / 1e6) for what, found in times.items()}
    return {"bits_per_weight": round(8 * sum(map(len, coded.values())) / num_weights, 3), **speeds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--target", required=True)
    arguments = parser.parse_args()
    base, target = (CheckpointReader(find_model(model).folder) for model in (arguments.base, arguments.target))
    pairs = {name: (base.tensor(name), target.tensor(name)) for name in target if name in base and base.info(name) == target.info(name)}
    result = {
        "benchmark": "delta",
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "compiled": kernels.loops() is not None,
        "versions": {name: metadata.version(name) for name in ("mtllama", "torch", "numpy", "zstandard")},
        "entropy": entropies({name: pair for name, pair in pairs.items() if pair[0].dtype.itemsize == 2}),
        "levels": {f"{level}, {n} threads": measure(pairs, level, n) for level in codec.LEVELS for n in (1, 2)},
    }
    for name, found in result["levels"].items():
        print(name, found)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
