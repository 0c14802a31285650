"""What `evaluate.py` starts inside lm-eval's own environment: its `hf` model, which does the sets that it is told to, one at a time.

    PEER/bin/python evaluate_peer.py JOB    JOB is a JSON file: the keys of `Job`

A line on standard input is the name of a set; a line of JSON on standard output is what it took and gave. The first line, before any
input, says that the model is loaded and the first item of the first set is done.
"""

import contextlib
import json
import os
import resource
import sys
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Job:
    model: str
    sets: str
    """A JSON file: name -> kind ("score" or "generate") and items."""
    dtype: str
    threads: int
    batch_size: int
    max_new_tokens: int
    stop: list[str]


def measured(work: Any) -> dict[str, Any]:
    """What `work` gives, its seconds, seconds of processor time, and the resident peak of the process while it ran."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    began, cpu = time.perf_counter(), time.process_time()
    results = work()
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    lines = Path("/proc/self/status").read_text().splitlines() if Path("/proc/self/status").exists() else []
    peak = next((int(line.split()[1]) for line in lines if line.startswith("VmHWM")), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return {"seconds": seconds, "cpu_seconds": cpu, "peak_mb": round(peak / 1024), "results": results}


def serve(sets: dict[str, Any], do: Any, about: dict[str, Any], out: Any) -> None:
    """Do the first item, say so, then every set whose name comes in."""

    def answer(result: dict[str, Any]) -> None:
        out.write(json.dumps(result) + "\n")
        out.flush()

    first = next(iter(sets.values()))
    do(first["kind"], first["items"][:1])
    answer(about)
    for line in sys.stdin:
        each = sets[line.strip()]
        answer(measured(lambda each=each: do(each["kind"], each["items"])))


def main() -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the libraries print is no answer
    job = Job(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    sets = json.loads(Path(job.sets).read_text(encoding="utf-8"))

    import torch
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    torch.set_num_threads(job.threads)
    model = HFLM(pretrained=job.model, dtype=job.dtype, device="cpu", batch_size=job.batch_size)

    def do(kind: str, items: list[dict[str, Any]]) -> list[Any]:
        if kind == "score":
            pairs = [(("", ""), item["prompt"], answer) for item in items for answer in item["answers"]]
            sums = iter([score for score, _ in model._loglikelihood_tokens(pairs, disable_tqdm=True)])
            return [[next(sums) for _ in item["answers"]] for item in items]
        options = {"until": job.stop, "max_gen_toks": job.max_new_tokens, "do_sample": False}
        requests = [Instance("generate_until", {}, (item["text"], options), number) for number, item in enumerate(items)]
        texts: list[str] = model.generate_until(requests, disable_tqdm=True)
        return texts

    versions = {name: metadata.version(name) for name in ("lm_eval", "transformers", "torch", "tokenizers", "accelerate")}
    serve(sets, do, {"versions": versions, "attention": model.model.config._attn_implementation, "dtype": str(model.model.dtype)}, out)


if __name__ == "__main__":
    main()
