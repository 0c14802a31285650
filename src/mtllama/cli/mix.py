"""The commands for the mixture of a recipe."""

from pathlib import Path
from typing import Annotated, Any

import typer

from mtllama.cli.options import AsJson, Out, Overrides, Overwrite, RecipeFile, group, print_json, print_table
from mtllama.errors import UserError

mix = group("The mixture of a recipe.")


@mix.command("plan")
def mix_plan(
    recipe: Annotated[Path | None, typer.Argument(metavar="[RECIPE]", help="YAML file, a run's folder, or a shipped name.")] = None,
    overrides: Overrides = None,
    named: Annotated[
        str | None, typer.Option("--mixture", metavar="NAME", help="In place of a recipe: t0-train or train, as published, no data needed.")
    ] = None,
    rule: Annotated[
        str | None, typer.Option("--rule", metavar="RULE", help="With --mixture: t0-code (default), t0-readme or min-size.")
    ] = None,
    num_examples: Annotated[
        int | None, typer.Option("--num-examples", metavar="N", help="Draws; default: the recipe's, or 20,000,000 with --mixture.")
    ] = None,
    by: Annotated[str, typer.Option("--by", metavar="WHAT", help="Table by set, family or task (set x prompt).")] = "set",
    as_json: AsJson = False,
) -> None:
    """Show what a recipe draws: rows, rate, share, draws, passes, tokens. Example: mtllama mix plan --mixture t0-train"""
    from mtllama.data import plan as plans

    if (recipe is None) == (named is None):
        raise UserError("give a recipe, or a named mixture, as in: mtllama mix plan --mixture t0-train")
    if num_examples is not None and num_examples < 1:
        raise UserError(f"--num-examples is {num_examples}; at least 1 is needed")
    if rule is not None and named is None:
        raise UserError(f"--rule goes with --mixture; a recipe says its own: pass mixture.rule={rule}")
    if by not in ("set", "family", "task"):
        raise UserError(f"--by is {by!r}; choose set, family or task")
    if named is not None:
        from mtllama.data.mixture import MixtureConfig
        from mtllama.tasks.catalog import GROUPS

        if named not in GROUPS:
            raise UserError(f"unknown mixture {named!r}; choose one of {', '.join(GROUPS)}")
        if rule not in (None, "t0-code", "t0-readme", "min-size"):
            raise UserError(f"unknown rule {rule!r}; choose t0-code, t0-readme or min-size (weights are set in a recipe)")
        found = plans.published((named,), MixtureConfig(tasks=(named,), rule=rule or "t0-code"), num_examples or 20_000_000)  # type: ignore[arg-type]
    else:
        from mtllama.data.mixture import Mixture
        from mtllama.train.recipe import load_recipe

        assert recipe is not None
        loaded = load_recipe(recipe, overrides or ())
        encoder, without = _encoder_if_any(loaded)
        found = plans.plan(Mixture(loaded.mixture), num_examples or loaded.train.examples, encoder)
        if without:
            found["warnings"].append(f"no expected tokens: {without}")
    if as_json:
        print_json(found)
        return
    rows = found["rows" if by == "task" else f"by_{by}"]
    columns = [
        by,
        *(["family"] if by == "set" else []),
        "rows",
        *([] if by == "task" else ["templates"]),
        "rate",
        "share",
        "draws",
        "passes",
    ]
    if found["tokens"] is not None:
        columns.append("tokens")
    shown = {"share": "{:.2%}", "draws": "{:,.0f}", "passes": "{:.2f}", "tokens": "{:,.0f}", "rows": "{:,}"}
    print_table(
        tuple(columns),
        [tuple(shown.get(column, "{}").format(_rounded(row[column])) for column in columns) for row in rows],
    )
    tokens = "" if found["tokens"] is None else f", about {found['tokens']:,.0f} tokens"
    print(f"\n{found['sets']} sets, {found['tasks']} tasks, total rate {_rounded(found['total_rate'])}, {found['draws']:,} draws{tokens}")
    for warning in found["warnings"]:
        print(f"warning: {warning}")


def _rounded(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value


def _encoder_if_any(loaded: Any) -> tuple[Any, str]:
    """The prompt encoder of a recipe, or None and why there is none: a plan can do without the model."""
    try:
        return _encoder(loaded), ""
    except UserError as error:
        return None, str(error)


def _encoder(loaded: Any) -> Any:
    from mtllama.data.prompt import PromptEncoder, find_format
    from mtllama.model.find import find_model, load_tokenizer

    tokenizer = load_tokenizer(find_model(loaded.model, loaded.base, loaded.delta).files)
    return PromptEncoder(tokenizer, find_format(loaded.format), loaded.train.max_length)


@mix.command("show")
def mix_show(
    recipe: RecipeFile,
    overrides: Overrides = None,
    index: Annotated[int | None, typer.Option("--index", metavar="I", help="Position in the mixture; default 0.")] = None,
    step: Annotated[int | None, typer.Option("--step", metavar="N", help="All that this step (from 1) of the recipe's run sees.")] = None,
) -> None:
    """Show an example of a mixture, or a step's: text, tokens, loss mask. Example: mtllama mix show quickstart --index 7"""
    from mtllama.data.mixture import Mixture
    from mtllama.train.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    if index is not None and step is not None:
        raise UserError("give --index or --step, not both")
    if step is not None and not 1 <= step <= loaded.train.num_steps:
        raise UserError(f"--step is {step}; the run has the steps 1 to {loaded.train.num_steps}")
    if index is not None and index < 0:
        raise UserError(f"--index is {index}; positions begin at 0")
    mixture, encoder = Mixture(loaded.mixture), _encoder(loaded)
    for place in [index or 0] if step is None else loaded.train.indices(step - 1):
        _show_draw(place, mixture.draw(place), encoder)


def _show_draw(index: int, draw: Any, encoder: Any) -> None:
    print(f"{index}: {draw.task}, template {draw.template}, row {draw.row}, pass {draw.turn + 1}\n")
    if draw.example is None:
        print("no prompt applies to the row; it is skipped\n")
        return
    print(f"{encoder.prompt_text(draw.example.inputs)}\n-> {draw.example.targets}\n")
    encoded = encoder.encode(draw.example.inputs, draw.example.targets)
    if encoded is None:
        print(f"the answer alone is longer than {encoder.max_length} tokens; it is skipped\n")
        return
    start = len(encoded.ids) - encoded.num_target
    cut = "; the prompt is cut" if encoded.cut else ""
    print(f"{len(encoded.ids)} tokens, {encoded.num_target} of them trained on (in brackets){cut}:")
    words = encoder.tokenizer.convert_ids_to_tokens(encoded.ids)
    print(" ".join(f"[{word}]" if i >= start else word for i, word in enumerate(words)) + "\n")


@mix.command("check")
def mix_check(
    recipe: RecipeFile,
    overrides: Overrides = None,
    eval_dir: Annotated[
        Path | None, typer.Option("--eval-dir", metavar="DIR", help="Folder of the evaluation sets; default: the recipe's.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Look for evaluation items in the training rows. Example: mtllama mix check quickstart --eval-dir sampler"""
    from dataclasses import replace

    from mtllama.data import contamination
    from mtllama.data.mixture import held_out, passages, training_passages
    from mtllama.train.recipe import load_recipe

    config = load_recipe(recipe, overrides or ()).mixture
    if eval_dir is not None:
        config = replace(config, eval_dir=eval_dir)
    found = contamination.check(training_passages(config), [passages(rows) for rows in held_out(config)])
    if as_json:
        print_json(found.to_dict())
        return
    print("\n".join(found.lines()))


@mix.command("export")
def mix_export(
    recipe: RecipeFile,
    out: Out,
    overrides: Overrides = None,
    num_examples: Annotated[int | None, typer.Option("--num-examples", metavar="N", help="Draws; default: the recipe's.")] = None,
    workers: Annotated[int, typer.Option("--workers", metavar="W", help="Processes; the files are the same for any number.")] = 1,
    file_format: Annotated[str, typer.Option("--format", metavar="KIND", help="parquet or jsonl.")] = "parquet",
    shard_size: Annotated[int, typer.Option("--shard-size", metavar="N", help="Draws in one file.")] = 50_000,
    overwrite: Overwrite = False,
) -> None:
    """Write a mixture for other trainers; cut off, it goes on. Example: mtllama mix export quickstart --out mixed --num-examples 1000"""
    from mtllama.data.export import ExportConfig, export
    from mtllama.data.mixture import Mixture
    from mtllama.data.prompt import find_format
    from mtllama.folders import require_new
    from mtllama.train.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    settings = ExportConfig(loaded.train.examples if num_examples is None else num_examples, file_format, shard_size)  # type: ignore[arg-type]
    require_new(out, overwrite=overwrite)
    print(export(Mixture(loaded.mixture), find_format(loaded.format), settings, out, workers=workers, overwrite=overwrite))
