"""A model folder -> the command line that serves it with vLLM, for many GPUs. Never run against vLLM itself here."""

import json
import os
import shlex
import shutil
from pathlib import Path

from mtllama import folders
from mtllama.errors import UserError
from mtllama.model.find import ModelFolder
from mtllama.progress import say

KEY = "VLLM_API_KEY"
"""Where vLLM looks for the key, so that it stands in no list of processes."""


def vllm_command(source: ModelFolder, *, host: str, port: int, name: str | None, dtype: str) -> list[str]:
    """The line; raises where vLLM could not serve the folder as training left it.

    vLLM reads the prompt format from the folder's chat template, and the end marker from its generation config; without them it serves, but not
    what was trained. Stop strings it takes from requests alone: where the folder has some, that is said.
    """
    folder = source.folder
    if source.delta:
        raise UserError("vLLM reads whole folders: restore the model first (mtllama delta apply), and serve what comes out")
    config = folders.read_json(folder / "config.json")
    kinds = config.get("architectures") or []
    if not any(kind.endswith("ForCausalLM") for kind in kinds):
        raise UserError(f"{folder}/config.json names no causal language model ({', '.join(kinds) or 'nothing'})")
    if not list(folder.glob("*.safetensors")):
        path = repr(str(folder))
        rewrite = f"from transformers import AutoModelForCausalLM as M; M.from_pretrained({path}, dtype='auto').save_pretrained({path})"
        raise UserError(f"{folder} has no safetensors files; write them first: python -c {shlex.quote(rewrite)}")
    for file in ("tokenizer.json", "generation_config.json"):
        if not (folder / file).is_file() and not (file == "tokenizer.json" and (folder / "tokenizer.model").is_file()):
            raise UserError(f"{folder} has no {file}, so that vLLM would not stop or prompt as training did; fetch the model again")
    generation = folders.read_json(folder / "generation_config.json")
    if stop := generation.get("stop_strings"):
        say(
            f'the answers of {folder} end at {stop}, which vLLM does not read from a folder: send "stop": {json.dumps(stop)} with every request'
        )
    if generation.get("eos_token_id") is None:
        raise UserError(
            f"{folder}/generation_config.json has no eos_token_id, so that vLLM would not know where an answer ends; set it there"
        )
    if not _has_chat_template(folder):
        raise UserError(
            f"{folder} has no chat template, so that vLLM would not know how a chat is written; put one into chat_template.jinja"
        )
    line = ["vllm", "serve", str(folder), "--served-model-name", name or source.name, "--host", host, "--port", str(port), "--dtype", dtype]
    line += ["--generation-config", str(folder)]
    length = config.get("max_position_embeddings")
    return [*line, "--max-model-len", str(length)] if length else line


def _has_chat_template(folder: Path) -> bool:
    """Whether there is one in any of the places where transformers looks."""
    if any((folder / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    config = folder / "tokenizer_config.json"
    return bool(config.is_file() and folders.read_json(config).get("chat_template"))


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
