"""The command line: the only parser. Every command imports what it needs when it runs."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from mtllama import __version__
from mtllama.cli import delta, evaluate, mix, models, serve, tasks, train
from mtllama.cli.options import Out, Overwrite
from mtllama.errors import UserError

app = typer.Typer(
    name="mtllama",
    help="Multi-task instruction tuning for LLaMA-family models, end to end.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    no_args_is_help=True,
)
for name, commands in (
    ("models", models.models),
    ("tasks", tasks.tasks),
    ("mix", mix.mix),
    ("train", train.train),
    ("delta", delta.delta),
):
    app.add_typer(commands, name=name)


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


app.command("eval")(evaluate.evaluate)
for command in (evaluate.report, serve.chat, serve.serve):
    app.command()(command)


@app.command()
def doctor() -> None:
    """Look at this machine, and say what to do about what is missing. Example: mtllama doctor"""
    from mtllama.doctor import run

    run()


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
