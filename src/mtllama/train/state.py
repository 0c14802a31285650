"""The state of a run between two steps, on disk: what is trained, its moments, the step. Whole or not there.

Each rank writes a file with the rows that it holds; any number of ranks reads them again, each the rows that it needs. There is
nothing in it but numbers: safetensors and one JSON file.
"""

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import safetensors
import torch

from mtllama import folders
from mtllama.errors import UserError
from mtllama.progress import say
from mtllama.train.parallel import Ranks
from mtllama.weights.shards import SafetensorsWriter, TensorInfo, raw_bytes

STATE = "state.json"
ROWS = "rows"
"""Key of a file's metadata under which it says, by parameter, what its first row is and how many rows there are in all."""
WEIGHT = "weight"


def rank_file(number: int) -> str:
    """Name of the file of the rank with this number."""
    return f"rank-{number:05d}.safetensors"


def save(
    checkpoints: Path,
    step: int,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    totals: dict[str, Any],
    keep: int,
    ranks: Ranks,
) -> None:
    """Write the state after `step` steps, then drop what is older than the last `keep` whole ones. All ranks.

    Those of later steps could not be read, or the run would not be here: they go first.
    """
    num_files = ranks.size if ranks.sharded else 1
    with ranks.new_folder(folder_of(checkpoints, step), overwrite=True) as folder:
        if ranks.rank < num_files:
            _write(folder / rank_file(ranks.rank), model, optimizer, ranks)
        if ranks.first:
            updates = max((int(entry.get("step", 0)) for entry in optimizer.state.values()), default=0)
            folders.write_json(
                folder / STATE, {"step": step, "updates": updates, "files": num_files, "ranks": ranks.size, "totals": totals}
            )
    if ranks.first:
        earlier, newest = [], folder_of(checkpoints, step)
        for folder in sorted(checkpoints.glob("step-*")):
            if folder > newest:
                shutil.rmtree(folder)
            elif folder < newest:
                earlier.append(folder)
        whole = [folder for folder in earlier if _fault(folder, model) is None]
        oldest = [*whole, newest][-keep:][0]
        for folder in earlier:
            if folder < oldest:
                shutil.rmtree(folder)


def tidy(checkpoints: Path) -> None:
    """Remove what kills left of checkpoints, those of other machines too: whoever calls this is the only one who writes there."""
    for left in checkpoints.glob(".step-*"):
        shutil.rmtree(left)


def folder_of(checkpoints: Path, step: int) -> Path:
    """Where the state after so many steps lies."""
    return checkpoints / f"step-{step:07d}"


def _write(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks) -> None:
    tensors, rows = {}, {}
    for name, parameter in _trained(model).items():
        moments = {kind: value for kind, value in optimizer.state.get(parameter, {}).items() if value.shape == parameter.shape}
        for kind, value in {WEIGHT: parameter.detach(), **moments}.items():
            tensors[f"{kind}/{name}"], first = ranks.rows(value)
        rows[name] = [first, parameter.shape[0]]
    infos = {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with SafetensorsWriter(path, infos, {ROWS: json.dumps(rows)}) as writer:
        for name, tensor in tensors.items():
            writer.write(raw_bytes(tensor.cpu()))
            writer.end(name, infos[name])


def restore(checkpoints: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks) -> tuple[int, dict[str, Any]]:
    """Load the newest whole state into model and optimiser; returns its step (0 if there is none) and totals. All ranks.

    It may be of any number of ranks. A checkpoint that cannot be read is named and passed over; where none can, that is
    refused: what keeps them from being read may pass, and a run that began anew would come to replace them.
    """
    found = ranks.once(lambda: _newest(checkpoints, model))
    if found is None:
        return 0, {}
    folder, state = found
    with contextlib.ExitStack() as stack, torch.no_grad():
        files = [_File(stack.enter_context(safetensors.safe_open(folder / rank_file(number), "pt"))) for number in range(state["files"])]
        for name, parameter in _trained(model).items():
            for kind in files[0].kinds:
                target = parameter if kind == WEIGHT else torch.zeros_like(parameter)
                local, first = ranks.rows(target)
                for file in files:
                    file.copy(kind, name, local, first)
                if kind != WEIGHT:
                    optimizer.state[parameter][kind] = target
            if parameter in optimizer.state:  # before its first update it has none: an optimiser that finds a step makes no moments
                device = parameter.device if parameter.is_cuda else torch.device("cpu")
                optimizer.state[parameter]["step"] = torch.tensor(float(state["updates"]), device=device)
    return int(state["step"]), dict(state["totals"])


class _File:
    """What one rank wrote."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self.rows: dict[str, list[int]] = json.loads(handle.metadata()[ROWS])
        self.kinds = sorted({key.partition("/")[0] for key in handle.keys()})  # noqa: SIM118 (a handle is no dict)

    def shape(self, kind: str, name: str) -> list[int]:
        """Of the rows in this file."""
        return list(self._handle.get_slice(f"{kind}/{name}").get_shape())

    def copy(self, kind: str, name: str, local: torch.Tensor, first: int) -> None:
        """Copy those rows into `local`, whose first row is the whole tensor's row `first`, that both hold."""
        begin = self.rows[name][0]
        rows = self._handle.get_slice(f"{kind}/{name}")
        start, stop = max(first, begin), min(first + len(local), begin + rows.get_shape()[0])
        if start < stop:
            local[start - first : stop - first].copy_(rows[start - begin : stop - begin])


def _newest(checkpoints: Path, model: torch.nn.Module) -> tuple[Path, dict[str, Any]] | None:
    found = sorted(checkpoints.glob("step-*"), reverse=True)
    for folder in found:
        fault = _fault(folder, model)
        if fault is None:
            return folder, folders.read_json(folder / STATE)
        why = f"checkpoint {folder} cannot be read ({' '.join(str(fault).split())[:120]})"
        if folder is found[-1]:
            raise UserError(
                f"{why}{', nor can those after it' if len(found) > 1 else ''}; mend that, or remove {checkpoints} to begin anew"
            )
        say(f"{why}; passed over")
    return None


def _fault(folder: Path, model: torch.nn.Module) -> Exception | None:
    """What is wrong with a checkpoint; None if it is whole."""
    try:
        _check(folder, folders.read_json(folder / STATE), model)
    except Exception as error:  # whatever it is, another one may be whole
        return error
    return None


def _check(folder: Path, state: dict[str, Any], model: torch.nn.Module) -> None:
    """Whether every row of everything that is trained is there. Raises whatever is wrong."""
    with contextlib.ExitStack() as stack:
        files = [_File(stack.enter_context(safetensors.safe_open(folder / rank_file(number), "pt"))) for number in range(state["files"])]
        for name, parameter in _trained(model).items():
            for kind in files[0].kinds:
                end = 0
                for file in files:
                    begin, total = file.rows[name]
                    shape = file.shape(kind, name)
                    if begin != end or shape[1:] != list(parameter.shape[1:]) or total != parameter.shape[0]:
                        raise ValueError(f"{kind} of {name} has other rows or another shape")
                    end += shape[0]
                if end != parameter.shape[0]:
                    raise ValueError(f"{kind} of {name} lacks rows")


def _trained(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
