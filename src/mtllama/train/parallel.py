"""The ranks of a run: processes that train one model together, started by `torchrun` or `accelerate launch`.

Each knows its number from the environment (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT). They talk by gloo on CPUs and
by NCCL on GPUs. Only the first one prints and writes what is not sharded. Where one fails, all end: it says why in one line, the
others end without a word, none waits for it.
"""

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import HashStore, PrefixStore, rendezvous  # type: ignore[attr-defined]
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from mtllama import folders
from mtllama.errors import UserError
from mtllama.model.load import pick_device
from mtllama.progress import console
from mtllama.train.recipe import ParallelConfig

T = TypeVar("T")

TIMEOUT = timedelta(minutes=30)
"""How long a rank waits for another: longer than anything that one rank does alone (fetching a model, looking through a mixture's
rows). A rank that ends, in whatever way, is noticed at once; this is for one that hangs."""
POLL = 0.5
"""Seconds between two looks for a rank that has failed."""
FAILED = "failed"
"""Key under which the first rank that fails leaves its number."""


@dataclass(frozen=True)
class Ranks:
    """This process and those beside it. What says "all ranks" must be called by all of them, in the same order."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=pick_device)
    strategy: Literal["none", "ddp", "fsdp"] = "none"
    cpu_offload: bool = False

    @property
    def first(self) -> bool:
        """Whether this is the one that prints and writes."""
        return self.rank == 0

    @property
    def sharded(self) -> bool:
        """Whether each rank holds its rows only."""
        return self.strategy == "fsdp"

    def by(self, config: ParallelConfig) -> "Ranks":
        """The same ranks, sharing the work as a recipe has it."""
        chosen = strategy(config, self.size)
        if chosen == "fsdp" and not dist.is_initialized():  # sharding over one rank, to offload, say
            dist.init_process_group("gloo" if self.device.type == "cpu" else "cpu:gloo,cuda:nccl", store=HashStore(), rank=0, world_size=1)
        return replace(self, strategy=chosen, cpu_offload=config.cpu_offload)

    def gather(self, value: T) -> list[T]:
        """The value of every rank, in their order. All ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def once(self, action: Callable[[], T]) -> T:
        """What `action` gives on the first rank; the others wait for it. All ranks."""
        return self.gather(action() if self.first else None)[0]  # type: ignore[return-value]

    @contextlib.contextmanager
    def new_folder(self, path: Path, *, overwrite: bool = False) -> Iterator[Path]:
        """`folders.new_folder` for many: each writes files of its own and syncs them, then the first renames the folder. All ranks."""
        if self.first:
            with folders.new_folder(path, overwrite=overwrite) as folder:
                self.gather(folder)
                yield folder
                self.gather(None)
        else:
            folder = self.gather(None)[0]  # type: ignore[assignment]
            if not folder.is_dir():
                raise UserError(f"rank {self.rank} does not see {folder.parent}: `out` must be on a file system that all machines share")
            yield folder
            self.gather(None)
        self.gather(None)

    @cached_property
    def _mesh(self) -> DeviceMesh:
        return init_device_mesh(self.device.type, (self.size,))

    def shard(self, part: torch.nn.Module | list[torch.nn.Module], compute: torch.dtype | None) -> None:
        """Keep this rank's rows of the part's parameters; they are gathered in `compute` (None: as they are) when the part is called (of
        several, which are gathered together: the first), and freed behind it. Gradients are averaged over the ranks in float32. Parts
        within it that are sharded stay apart. All ranks.
        """
        fully_shard(
            part,
            mesh=self._mesh,
            # Inputs are not cast: as with one rank, autocast does it for matrix products alone, and the residual stream stays float32.
            mp_policy=MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False),
            offload_policy=CPUOffloadPolicy() if self.cpu_offload and self.device.type != "cpu" else OffloadPolicy(),
        )

    @property
    def loss_scale(self) -> float:
        """What a loss must be multiplied with so that gradients come out summed over the ranks, not averaged."""
        return float(self.size if self.sharded else 1)

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Add up the gradients of all ranks, where sharding has not done it in the backward pass. All ranks."""
        if self.strategy == "ddp" and self.size > 1:
            sums = [dist.all_reduce(parameter.grad, async_op=True) for parameter in parameters if parameter.grad is not None]
            for each in sums:
                each.wait()  # type: ignore[union-attr]

    def rows(self, tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
        """What this rank holds of a tensor, and the number of its first row."""
        if not isinstance(tensor, DTensor):
            return tensor, 0
        assert tensor.placements == (Shard(0),), "rows are sharded along the first dimension"
        each = -(-tensor.shape[0] // self.size)
        return tensor.to_local(), min(self.rank * each, tensor.shape[0])


def strategy(config: ParallelConfig, size: int) -> Literal["none", "ddp", "fsdp"]:
    """How that many ranks share the work, where a recipe leaves it open; what cannot be is refused."""
    chosen = config.strategy if config.strategy != "auto" else "fsdp" if size > 1 else "none"
    if size > 1 and chosen == "none":
        raise UserError(f"{size} ranks were started, but parallel.strategy is none; choose auto, fsdp or ddp, or start one process")
    if config.cpu_offload and chosen != "fsdp":
        raise UserError("parallel.cpu_offload needs sharding, and one process alone does none; set parallel.strategy=fsdp")
    return chosen


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor with the rows of all ranks. All ranks."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """Meet the other ranks, as the environment has it, and train with them while the block runs.

    What fails is raised by the first rank that fails; the others end with status 2 and say nothing, so that one line tells all.
    """
    rank, size = _number("RANK", 0), _number("WORLD_SIZE", 1)
    # accelerate launch --use_fsdp sets it, and some versions of transformers then load values on the first rank only.
    os.environ.pop("FSDP_CPU_RAM_EFFICIENT_LOADING", None)
    device, lost = _device(), size > 1
    try:
        if size == 1:
            yield Ranks(device=device)
            return
        store = _meet()
        # gloo beside NCCL: counts and texts lie in the memory of the CPU, with cpu_offload gradients too.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=PrefixStore("group", store), rank=rank, world_size=size, timeout=TIMEOUT)
        quiet, console.quiet = console.quiet, rank > 0
        try:
            with _watch(store, rank):
                try:
                    yield Ranks(rank, size, device)
                except BaseException as error:
                    if not _is_first_to_fail(store, rank):
                        raise SystemExit(2) from error
                    if isinstance(error, RuntimeError) and (isinstance(error, dist.DistError) or "gloo" in str(error)):
                        raise UserError(
                            f"rank {rank} of {size} lost another one ({' '.join(str(error).split())[:120]}); was it killed, or out of memory? "
                            "The same command goes on from the last checkpoint"
                        ) from error
                    raise
            dist.barrier()  # the first one may keep the store that the others still look into
            lost = False
        finally:
            console.quiet = quiet
    finally:
        if dist.is_initialized() and not (lost and device.type == "cuda"):  # NCCL would wait for what the lost ones owe it
            dist.destroy_process_group()


def _number(name: str, default: int) -> int:
    text = os.environ.get(name) or str(default)
    if not text.isdigit():
        raise UserError(f"the environment variable {name} is {text!r}; a number is needed, as torchrun sets it")
    return int(text)


def _device() -> torch.device:
    """The device of this rank: each process of a machine takes a GPU of its own."""
    device, local = pick_device(), _number("LOCAL_RANK", 0)
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise UserError(f"LOCAL_RANK is {local}, but this machine has {torch.cuda.device_count()} GPUs; start fewer processes on it")
        torch.cuda.set_device(local)
    return device


def _meet() -> Any:
    """The table of keys and values that all ranks share."""
    try:
        store, _, _ = next(rendezvous("env://", timeout=TIMEOUT))
    except (ValueError, dist.DistError) as error:
        raise UserError(
            f"the ranks cannot meet ({' '.join(str(error).split())[:160]}); start them by torchrun or accelerate launch"
        ) from error
    return store  # type: ignore[no-any-return]


def _is_first_to_fail(store: Any, rank: int) -> bool:
    """Whether no other rank has failed before; tells them."""
    try:
        return bool(store.compare_set(FAILED, "", str(rank)) == str(rank).encode())
    except dist.DistError:  # the store went with the rank that kept it, and that one could not tell anybody
        return True


@contextlib.contextmanager
def _watch(store: Any, rank: int) -> Iterator[None]:
    """While the block runs, end this process soon after another one has failed: what waits in a collective hears of it in no other way."""
    ended, own = threading.Event(), store.clone()  # a connection of its own: the other may be waiting in a call

    def look() -> None:
        while not ended.wait(POLL):
            try:
                failed = own.check([FAILED]) and own.get(FAILED) != str(rank).encode()
            except dist.DistError:
                failed = not ended.is_set()
            if failed:
                sys.stdout.flush()
                os._exit(2)

    thread = threading.Thread(target=look, name="watch the other ranks", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
