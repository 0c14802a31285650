"""What two ranks do for test_parallel.py, all in one start: python -m torch.distributed.run --nproc-per-node 2 ranks_job.py FOLDER

FOLDER holds `job.json`: recipes, and the step after which the one named `left` is interrupted. Each rank leaves what it saw in
`seen-RANK.json`. At the end the second rank fails while the first waits for it.
"""

import contextlib
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from mtllama import cli
from mtllama import config as configs
from mtllama.errors import UserError
from mtllama.model.load import LoadedModel
from mtllama.train import loop, parallel
from mtllama.train.recipe import Recipe

seen: dict[str, Any] = {}
"""What this rank saw in the run that goes on."""
own_load_model, own_load, own_shard, own_interrupts = loop.load_model, loop._load, parallel.Ranks.shard, loop._interrupts
own_backward = loop.backward


def load_model(*args: Any, **options: Any) -> LoadedModel:
    loaded = own_load_model(*args, **options)
    seen["loaded empty"] = all(parameter.is_meta for parameter in loaded.model.parameters())
    return loaded


def shard(ranks: parallel.Ranks, part: Any, compute: Any) -> None:
    """Notes how many values lie whole in the memory of a rank when a part is divided."""
    modules = part if isinstance(part, list) else [part]
    whole = sum(parameter.numel() for each in modules for parameter in each.parameters() if not isinstance(parameter, DTensor))
    seen["whole at a time"] = max(whole, seen.get("whole at a time", 0))
    own_shard(ranks, part, compute)


def load(recipe: Recipe, ranks: parallel.Ranks) -> Any:
    loaded, objective = own_load(recipe, ranks)
    parameters = list(loaded.model.parameters())
    seen["values"] = sum(parameter.numel() for parameter in parameters)
    seen["local values"] = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in parameters)
    seen["kinds"] = sorted({type(parameter.data).__name__ for parameter in parameters})
    seen["trained dtypes"] = sorted({str(parameter.dtype) for parameter in parameters if parameter.requires_grad})
    return loaded, objective


def backward(objective: Any, examples: list[Any], *rest: Any) -> torch.Tensor:
    """Notes the tokens that this rank has in each step."""
    seen.setdefault("tokens", []).append(sum(len(each.ids) for each in examples))
    return own_backward(objective, examples, *rest)


@contextlib.contextmanager
def interrupted_after(step: int) -> Iterator[Any]:
    """In place of a signal, which arrives at a moment of its own."""
    calls = itertools.count(1)
    yield lambda: next(calls) >= step


def main(folder: Path) -> None:
    global seen
    loop.load_model, loop._load, loop.backward, parallel.Ranks.shard = load_model, load, backward, shard  # type: ignore[assignment, method-assign]
    job, told = json.loads((folder / "job.json").read_text(encoding="utf-8")), {}
    with parallel.joined() as ranks:
        for name, values in job["recipes"].items():
            told[name] = seen = {}
            alone = name == "left" and not ranks.first  # one of them alone is asked to stop
            loop._interrupts = (lambda: interrupted_after(job["stop"])) if alone else own_interrupts
            try:
                loop.run(configs.build(Recipe, values, name), ranks=ranks)
            except Exception as error:  # what fails on both ranks fails in the test that looks at it
                seen["error"] = str(error)
        (folder / f"seen-{ranks.rank}.json").write_text(json.dumps(told), encoding="utf-8")
        ranks.gather(None)
        if not ranks.first:
            raise UserError("the second rank alone has failed")
        ranks.gather("the first one waits for it")


if __name__ == "__main__":
    cli._quiet()
    try:
        main(Path(sys.argv[1]))
    except UserError as error:
        cli._fail(str(error))
