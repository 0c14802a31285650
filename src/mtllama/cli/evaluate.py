"""The commands for evaluation and its report."""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from mtllama.cli.options import Base, DataDir, DeltaDir, Dtype, Format, Model, Out, Overwrite, known_dtype, words
from mtllama.errors import UserError


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
        _harness(find_model(model, base, delta), words(harness), limit, out, dtype, include, num_fewshot, overwrite)
        return
    config = EvalConfig(suite, words(tasks), data_dir, split, words(protocol), limit, seed, templates)
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
            chosen = known_dtype("float32" if self_test else dtype)
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

    chosen = known_dtype(dtype)
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


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders made by `mtllama eval`; the first is the base.")],
    out: Out,
    overwrite: Overwrite = False,
) -> None:
    """Compare evaluations: Markdown, one HTML file, figures. Example: mtllama report runs/base runs/tuned --out report"""
    from mtllama.evaluate.report import write_report

    for path in write_report(runs, out, overwrite=overwrite):
        print(path)
