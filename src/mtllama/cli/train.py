"""The commands for training by a recipe."""

from typing import Annotated

import typer

from mtllama.cli.options import AsJson, Overrides, RecipeFile, group, one_of, print_json, words
from mtllama.errors import UserError

train = group("Train by a recipe.")


@train.command("run")
def train_run(
    recipe: RecipeFile,
    overrides: Overrides = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a finished result. What is not finished goes on all the same.")
    ] = False,
) -> None:
    """Train by a recipe; cut off, the same command goes on. Example: mtllama train run quickstart train.lr=5e-5

    An unfinished run is in OUT.partial: remove that folder to begin anew.

    On several GPUs or machines: torchrun --nproc-per-node 8 -m mtllama train run RECIPE
    """
    from mtllama.train.loop import run
    from mtllama.train.parallel import joined
    from mtllama.train.recipe import load_recipe

    with joined() as ranks:
        out = run(load_recipe(recipe, overrides or ()), overwrite=overwrite, ranks=ranks)
        if ranks.first:
            print(out)


@train.command("plan")
def train_plan(
    recipe: RecipeFile,
    overrides: Overrides = None,
    ranks: Annotated[int, typer.Option("--ranks", metavar="N", help="Processes that share the work, each with a device.")] = 1,
    device: Annotated[str | None, typer.Option("--device", metavar="KIND", help="cpu or cuda; default: what is here.")] = None,
    speed: Annotated[
        float | None, typer.Option("--tokens-per-second", metavar="X", help="Over all ranks: for the hours that the run will take.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Tell what a run will need: memory, tokens, FLOPs, hours. Example: mtllama train plan mt-llama-7b --ranks 8 --device cuda

    Built from the model's config alone: no weights are read, and no GPU is needed to plan for some.
    """
    import torch

    from mtllama.train.plan import plan
    from mtllama.train.recipe import load_recipe

    if ranks < 1 or (speed is not None and speed <= 0):
        raise UserError("--ranks must be at least 1, and --tokens-per-second positive")
    chosen = torch.device(one_of("--device", device, ("cpu", "cuda"))) if device else None
    found = plan(load_recipe(recipe, overrides or ()), ranks=ranks, device=chosen)
    if as_json:
        print_json({**found.to_json(), "hours": found.hours(speed) if speed else None})
        return
    for remark in found.remarks:
        print(f"note: {remark}")
    print(f"parameters      {found.parameters:,}, {found.trained:,} of them trained; {found.embedding:,} in the embedding")
    print(
        f"run             {found.examples:,} examples in {found.steps:,} steps, about {found.tokens:,.0f} tokens, {found.targets:,.0f} trained on"
    )
    print(f"FLOPs           {found.flops:.3g}: {found.flops / max(1, found.tokens):.3g} a token")
    hours = f"{found.hours(speed):,.1f} at {speed:,.0f} tokens/s" if speed else "give --tokens-per-second X"
    print(f"hours           {hours}")
    print(f"memory          {found.peak / 1e9:,.2f} GB on {'each rank' if ranks > 1 else 'one process'} at the worst moment, that is")
    for name, num in found.memory.parts().items():
        print(f"  {name:<14}{num / 1e9:10,.2f} GB")
    if found.memory.heap:
        print(
            f"  {found.memory.needed / 1e9:,.2f} GB is what tensors and libraries take; the heap is what glibc's allocator comes to hold beyond that in "
            "hundreds of steps of unequal lengths, by two runs that were measured (docs/scaling.md)"
        )
    if found.host:
        print(f"host memory     {found.host / 1e9:,.2f} GB for {'each rank' if ranks > 1 else 'the process'}: weights, gradients, moments")


@train.command("verify")
def train_verify(
    recipe: RecipeFile,
    overrides: Overrides = None,
    what: Annotated[
        str, typer.Option("--what", metavar="LIST", help="Of: packing, accumulation, resume, ranks.")
    ] = "packing,accumulation,resume,ranks",
    steps: Annotated[int, typer.Option("--steps", metavar="N", help="Steps of each run that is compared.")] = 4,
) -> None:
    """Prove on your own model and data that how a run is done does not change what comes out. Example: mtllama train verify quickstart

    Short runs in float32, done in different ways: examples packed or each alone, a step in one pass or several, killed and started
    again or in one go, one process or two (on the CPU where there is one GPU). Status 1 if one differs or fails.
    """
    from mtllama.train.recipe import load_recipe
    from mtllama.train.verify import verify

    if steps < 2:
        raise UserError(f"--steps is {steps}; at least 2 are needed")
    good = True
    for each in verify(load_recipe(recipe, overrides or ()), words(what), steps=steps):
        good = good and each.holds is not False
        if each.loss is None:
            print(f"{each.what}: {'nothing to compare' if each.holds is None else 'FAILED'}: {each.why}", flush=True)
            continue
        print(
            f"{each.what}: {'holds' if each.holds else 'DIFFERS'} over {each.num_steps} steps; largest difference of a loss {each.loss:.1e}, "
            f"of a gradient norm {each.norm:.1e} of it, of a weight {_maybe(each.weight)}; compared: {each.ways}",
            flush=True,
        )
    if not good:
        raise typer.Exit(1)


def _maybe(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}" if value else "0, bit for bit"
