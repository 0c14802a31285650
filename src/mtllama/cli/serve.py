"""The commands for talking to a model: chat and serve."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from mtllama.cli.options import Base, DataDir, DeltaDir, Dtype, Format, Model, known_dtype
from mtllama.errors import UserError


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
        return _chat_engine(name, None, None, known_dtype(dtype), format)

    chat = Chat(_chat_engine(model, base, delta, known_dtype(dtype), format), temperature=temperature, max_new_tokens=max_new_tokens)
    run(chat, load, prompt=prompt, examples=examples)


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

        line = vllm_command(find_model(model, base, delta), host=host, port=port, name=name, dtype=known_dtype(dtype))
        hand_over(line, api_key=api_key, show=show)
        return
    try:
        from mtllama.serve import server
    except ImportError as error:
        raise UserError(f"serving needs packages that are not installed ({error.name}); pip install 'mtllama[serve]'") from error
    from importlib.util import find_spec

    from mtllama.progress import say
    from mtllama.serve.scheduler import Limits

    wanted, has_page = known_dtype(dtype), not no_page and find_spec("gradio") is not None
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
