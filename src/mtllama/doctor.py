"""What this machine has, what is missing, and what to do about it."""

import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mtllama import hub

Verdict = Literal["ok", "note", "bad"]
MARKS = {"ok": "ok  ", "note": "note", "bad": "BAD "}


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report."""

    verdict: Verdict
    what: str
    value: str
    advice: str = ""


def run() -> None:
    """Print all findings."""
    for finding in examine():
        advice = f"  -> {finding.advice}" if finding.advice else ""
        print(f"{MARKS[finding.verdict]}  {finding.what:<12} {finding.value}{advice}", flush=True)


def examine() -> Iterator[Finding]:
    """Look at everything that the jobs of this package depend on."""
    yield _python()
    yield from _torch()
    yield from _allocator()
    yield _memory()
    yield from _disk()
    yield _hub()
    yield _base_model()


def _python() -> Finding:
    return Finding("ok", "Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def _torch() -> Iterator[Finding]:
    import torch

    from mtllama.model.load import cpu_has_bf16

    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            yield Finding("ok", "GPU", f"{properties.name}, {properties.total_memory / 1e9:.0f} GB, CUDA {torch.version.cuda}")
    elif torch.version.cuda:
        yield Finding(
            "note",
            "GPU",
            f"none, though torch is a CUDA build ({torch.version.cuda})",
            "check the driver with nvidia-smi, or install a CPU build of torch",
        )
    else:
        yield Finding(
            "note", "GPU", "none; everything runs on the CPU", "fine for the quickstart; a 7B model wants a GPU and a CUDA build of torch"
        )
    yield Finding("ok", "torch", f"{torch.__version__}, {torch.get_num_threads()} threads")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if torch.get_num_threads() > cores:
        yield Finding("note", "threads", f"{torch.get_num_threads()} threads on {cores} cores", f"set OMP_NUM_THREADS={cores}")
    flags = _cpu_flags()
    names = [
        name
        for flag, name in (("amx_bf16", "AMX bf16"), ("avx512_bf16", "AVX-512 bf16"), ("avx512f", "AVX-512"), ("avx2", "AVX2"))
        if flag in flags
    ]
    if cpu_has_bf16():
        yield Finding("ok", "CPU", ", ".join(names))
    else:
        yield Finding(
            "note",
            "CPU",
            f"{', '.join(names) or platform.processor() or 'no vector extension known'}; no bf16 instructions",
            "computes in float32, which is slower",
        )


def _cpu_flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return set()
    return {flag for line in text.splitlines() if line.startswith("flags") for flag in line.split()}


def _allocator() -> Iterator[Finding]:
    """Which one serves tensors on CPUs: with glibc's a long run of training gets slower and larger (docs/training.md)."""
    try:
        loaded = Path("/proc/self/maps").read_text(encoding="utf-8")
    except OSError:
        return  # not Linux
    if found := next((name for name in ("tcmalloc", "jemalloc", "mimalloc") if f"lib{name}" in loaded), None):
        yield Finding("ok", "allocator", found)
    elif platform.libc_ver()[0] == "glibc":
        yield Finding(
            "note",
            "allocator",
            "glibc's",
            "for hours of training on a CPU install libtcmalloc-minimal4 and set LD_PRELOAD=libtcmalloc_minimal.so.4",
        )


def _memory() -> Finding:
    import psutil

    memory = psutil.virtual_memory()
    value = f"{memory.available / 1e9:.1f} GB free of {memory.total / 1e9:.1f} GB"
    if memory.available < 6e9:
        return Finding("note", "memory", value, "the quickstart wants about 6 GB; close something, or lower train.tokens_per_pass")
    return Finding("ok", "memory", value)


def _disk() -> Iterator[Finding]:
    from mtllama.model.find import home

    for what, path in (("disk here", Path.cwd()), ("disk cache", home())):
        there = next(p for p in (path, *path.parents) if p.exists())
        free = shutil.disk_usage(there).free
        value = f"{free / 1e9:.1f} GB free at {path}"
        if not os.access(there, os.W_OK):
            yield Finding(
                "bad",
                what,
                f"{path} cannot be written",
                "set MTLLAMA_HOME to a folder that can" if what == "disk cache" else "change to another folder",
            )
        elif free < 6e9:
            yield Finding("note", what, value, "the quickstart wants about 6 GB while it trains")
        else:
            yield Finding("ok", what, value)


def _hub() -> Finding:
    if reason := hub.unreachable():
        return Finding("note", "hub", reason, "fine for the quickstart; models and data must be local, and HF_HUB_OFFLINE=1 saves the wait")
    return Finding("ok", "hub", "reachable")


def _base_model() -> Finding:
    from mtllama.model import convert
    from mtllama.model.find import is_converted, named_path

    if is_converted(convert.NAME):
        return Finding("ok", "base model", f"{convert.DESCRIPTION} at {named_path(convert.NAME)}")
    if convert.find_gguf():
        return Finding("ok", "base model", f"{convert.NAME} is installed; it is converted when first used")
    return Finding("bad", "base model", f"{convert.NAME} is not installed", f"run: mtllama models fetch {convert.NAME}")
