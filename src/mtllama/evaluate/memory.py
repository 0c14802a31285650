"""Whether a model fits into memory, said before minutes are spent on loading it."""

from pathlib import Path

import torch

from mtllama.errors import UserError
from mtllama.model.find import Dtype, ModelFolder
from mtllama.model.load import pick_device, pick_dtype
from mtllama.weights.shards import CheckpointReader

_MEMINFO, _CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


def require_memory(source: ModelFolder, dtype: Dtype) -> None:
    """Refuse a model whose weights alone, in the dtype that they are loaded in, are more than the memory that is free."""
    device = pick_device()
    chosen = pick_dtype(dtype, device)
    reader = CheckpointReader(source.folder)
    needed = sum(reader.info(name).size for name in reader) * chosen.itemsize
    free = free_memory(device)
    if free is not None and needed > free:
        smaller = "pass --dtype bfloat16, " if chosen is torch.float32 else ""
        where = "the memory of the GPU" if device.type == "cuda" else "memory"
        raise UserError(
            f"{source.name} does not fit into {where}: its weights take {needed / 1e9:.1f} GB in {str(chosen).removeprefix('torch.')}, "
            f"{free / 1e9:.1f} GB are free; {smaller}free some, or use a larger machine"
        )


def free_memory(device: torch.device) -> int | None:
    """Bytes that can be had: of the GPU, or of the machine within the bounds of this process's container. None: not known."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    found = []
    for line in _lines(_MEMINFO):
        if line.startswith("MemAvailable:"):
            found.append(int(line.split()[1]) * 1024)
    bound = "".join(_lines(_CGROUP / "memory.max")).strip()
    if bound.isdigit():
        used = sum(int(line.split()[1]) for line in _lines(_CGROUP / "memory.stat") if line.startswith("anon "))  # caches give way
        found.append(max(0, int(bound) - used))
    return min(found, default=None)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
