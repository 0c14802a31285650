"""A model folder -> the command line that serves it with vLLM, for many GPUs. Never run against vLLM itself here."""

import os
import shlex
import shutil

from mtllama import folders
from mtllama.errors import UserError
from mtllama.model.find import ModelFolder

KEY = "VLLM_API_KEY"
"""Where vLLM looks for the key, so that it stands in no list of processes."""


def vllm_command(source: ModelFolder, *, host: str, port: int, name: str | None, dtype: str) -> list[str]:
    """The line; raises where vLLM could not serve the folder as training left it.

    vLLM reads the prompt format from the folder's chat template, and the end marker and stop strings from its generation config.
    """
    folder = source.folder
    if source.delta:
        raise UserError("vLLM reads whole folders: restore the model first (mtllama delta apply), and serve what comes out")
    config = folders.read_json(folder / "config.json")
    kinds = config.get("architectures") or []
    if not any(kind.endswith("ForCausalLM") for kind in kinds):
        raise UserError(f"{folder}/config.json names no causal language model ({', '.join(kinds) or 'nothing'})")
    if not list(folder.glob("*.safetensors")):
        raise UserError(f"{folder} has no safetensors files; write them first: mtllama delta info {folder} says what it holds")
    for file in ("tokenizer.json", "generation_config.json"):
        if not (folder / file).is_file() and not (file == "tokenizer.json" and (folder / "tokenizer.model").is_file()):
            raise UserError(f"{folder} has no {file}, so that vLLM would not stop or prompt as training did; fetch the model again")
    line = ["vllm", "serve", str(folder), "--served-model-name", name or source.name, "--host", host, "--port", str(port), "--dtype", dtype]
    line += ["--generation-config", str(folder)]
    length = config.get("max_position_embeddings")
    return [*line, "--max-model-len", str(length)] if length else line


def hand_over(command: list[str], *, api_key: str | None, show: bool) -> None:
    """Print the line, or become it."""
    if show:
        print(shlex.join(command))
        return
    program = shutil.which(command[0])
    if program is None:
        raise UserError(f"vllm is not installed here; pip install vllm on a machine with a GPU, then: {shlex.join(command)}")
    environment = {**os.environ, KEY: api_key} if api_key else dict(os.environ)
    os.execve(program, command, environment)
