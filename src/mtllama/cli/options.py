"""What commands have in common: their options, how words of the command line are read, how tables are printed."""

from pathlib import Path
from typing import Annotated, Any

import typer

from mtllama.errors import UserError

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


def group(help: str) -> typer.Typer:
    """Commands under one name."""
    return typer.Typer(help=help, rich_markup_mode=None, no_args_is_help=True)


def one_of(option: str, value: str, choices: tuple[Any, ...]) -> Any:
    """The value of an option, if it is one of these."""
    if value not in choices:
        raise UserError(f"{option} is {value!r}; choose one of {', '.join(choices)}")
    return value


def words(text: str) -> tuple[str, ...]:
    """Words with commas between."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def known_dtype(name: str) -> Any:
    """The value of --dtype, if there is such a one."""
    if name not in ("auto", "float32", "bfloat16"):
        raise UserError(f"--dtype is {name!r}; choose auto, float32 or bfloat16")
    return name


def print_json(value: Any) -> None:
    """For machines."""
    import json

    print(json.dumps(value, indent=1, ensure_ascii=False))


def print_table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> None:
    """For people."""
    cells = [tuple(map(str, row)) for row in (head, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
