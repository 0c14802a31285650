"""The commands for weight deltas."""

from pathlib import Path
from typing import Annotated

import typer

from mtllama.cli.options import AsJson, Out, Overwrite, Workers, group, one_of, print_json

delta = group("Weight deltas: exact differences of two checkpoints.")


@delta.command("make")
def delta_make(
    base: Annotated[str, typer.Option("--base", metavar="MODEL", help="The model that was trained from.")],
    target: Annotated[str, typer.Option("--target", metavar="MODEL", help="The trained model.")],
    out: Out,
    mode: Annotated[
        str, typer.Option("--mode", metavar="MODE", help="bits: every bit comes back; add: the plain difference, for FastChat's tools.")
    ] = "bits",
    level: Annotated[
        str,
        typer.Option("--level", metavar="LEVEL", help="fast: half as large again as default; small: some percent smaller, slower made."),
    ] = "default",
    workers: Workers = None,
    overwrite: Overwrite = False,
) -> None:
    """Write the exact difference of two checkpoints. Example: mtllama delta make --base smollm2-135m --target tuned --out delta"""
    from mtllama.model.find import find_model
    from mtllama.weights.codec import LEVELS
    from mtllama.weights.delta import make
    from mtllama.weights.manifest import MODES

    before, after = find_model(base), find_model(target)
    summary = make(
        before.folder,
        after.folder,
        out,
        overwrite=overwrite,
        base_name=before.name,
        mode=one_of("--mode", mode, MODES),
        level=one_of("--level", level, LEVELS),
        workers=workers,
    )
    print(
        f"{out}: {summary.num_tensors} tensors ({summary.num_equal} equal), {summary.num_bytes / 1e6:.1f} MB, "
        f"{summary.bits_per_weight:.2f} bits a weight"
    )
    if summary.left_out:
        print(
            f"not in the delta: {', '.join(summary.left_out[:9])}{' ...' if len(summary.left_out) > 9 else ''} (folders, other weights, files over 128 MB)"
        )
    if mode == "add":
        print(
            f"{summary.num_inexact:,} of {summary.num_weights:,} weights will not come back exact: the sum is rounded (--mode bits has them all)"
        )


@delta.command("apply")
def delta_apply(
    base: Annotated[str, typer.Option("--base", metavar="MODEL", help="The model that the delta was made from.")],
    deltas: Annotated[list[str], typer.Option("--delta", metavar="DELTA", help="Delta folder or hub id; several are added up.")],
    out: Out,
    check: Annotated[
        str, typer.Option("--check", metavar="HOW", help="full: hash the base before; fast: a sample of it. The result is hashed anyway.")
    ] = "full",
    scales: Annotated[
        list[float] | None, typer.Option("--scale", metavar="A", help="Target = base + A x difference; once, or once for each delta.")
    ] = None,
    only: Annotated[
        str | None, typer.Option("--only", metavar="PATTERN", help="Change these tensors alone, such as 'model.layers.1*.mlp.*'.")
    ] = None,
    new_rows: Annotated[
        str,
        typer.Option("--new-rows", metavar="HOW", help="What rows that the base lacks count as, in published deltas: auto, zero or mean."),
    ] = "auto",
    checksum: Annotated[
        float | None, typer.Option("--checksum", metavar="SUM", help="What all weights must add up to (50637.1836 for Alpaca-7B).")
    ] = None,
    workers: Workers = None,
    overwrite: Overwrite = False,
) -> None:
    """Restore a checkpoint, bit for bit. Example: mtllama delta apply --base smollm2-135m --delta delta --out restored

    DELTA may also be one as FastChat, Vicuna, MT-LLaMA or Stanford Alpaca publish theirs. Hub ids (owner/name, or
    owner/name@revision) are fetched shard by shard, and each is deleted when it is done with.
    """
    from mtllama.model.find import find_model
    from mtllama.weights import remote, restore

    how, rows = one_of("--check", check, restore.CHECKS), one_of("--new-rows", new_rows, restore.NEW_ROWS)
    with remote.Fetcher(out, overwrite=overwrite) as fetcher:
        folder = fetcher.base(base) or find_model(base).folder
        sources = [fetcher.delta(each) or Path(each) for each in deltas]
        target = restore.open_target(folder, sources, scales=scales or (), only=only, new_rows=rows, reader=fetcher.reader)
        summary = restore.apply(target, out, folder, *sources, overwrite=overwrite, check=how, checksum=checksum, workers=workers)
    print(f"{out}: {summary.num_tensors} tensors restored, {summary.num_bytes / 1e6:.1f} MB, {target.promise}")


@delta.command("verify")
def delta_verify(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The model that should be the target.")],
    delta: Annotated[Path, typer.Option("--delta", metavar="DIR", help="Delta folder.")],
) -> None:
    """Tell whether a model is exactly a delta's target; the base is not needed. Example: mtllama delta verify restored --delta delta"""
    from mtllama.model.find import find_model
    from mtllama.weights.delta import verify

    folder = find_model(model).folder
    print(f"{folder} is the target of {delta}: {verify(folder, delta)} tensors and every other file are as recorded (SHA-256)")


@delta.command("info")
def delta_info(
    delta: Annotated[Path, typer.Argument(metavar="DELTA", help="Delta folder.")],
    figure: Annotated[
        Path | None, typer.Option("--figure", metavar="FILE.png", help="Draw it, too; a file of that name is replaced.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Tell what a delta changed, by layer and kind of matrix: norms, equal bits, size. Example: mtllama delta info delta --figure delta.png"""
    from mtllama.weights.info import read, write_figure

    found = read(delta)
    if figure is not None:
        write_figure(found, figure)
    if as_json:
        print_json(found.to_json())
        return
    print(found.text())
    if figure is not None:
        print(f"\n{figure}")
