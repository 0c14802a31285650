"""The line that hands a folder over to vLLM, as a user types it."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from mtllama.cli import app
from mtllama.errors import UserError


def serve(*arguments: object, path: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PATH": path or os.environ["PATH"]}
    command = [sys.executable, "-m", "mtllama", "serve", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


@pytest.fixture
def folder(pico: Path, tmp_path: Path) -> Path:
    shutil.copytree(pico, tmp_path / "my model")
    (tmp_path / "my model" / "chat_template.jinja").write_text("{{ messages[-1].content }}")
    return tmp_path / "my model"


def test_the_line_is_printed_and_names_everything_that_training_left(folder: Path) -> None:
    done = serve(folder, "--engine", "vllm", "--print", "--port", "9000", "--name", "tuned", "--dtype", "bfloat16")
    assert done.returncode == 0, done.stderr
    line = shlex.split(done.stdout)
    assert line[:3] == ["vllm", "serve", str(folder)]
    options = dict(zip(line[3::2], line[4::2], strict=True))
    assert options == {
        "--served-model-name": "tuned", "--host": "127.0.0.1", "--port": "9000", "--dtype": "bfloat16",
        "--generation-config": str(folder), "--max-model-len": "512",
    }  # fmt: skip


def test_stop_strings_that_vllm_would_not_read_are_told(folder: Path) -> None:
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(config | {"stop_strings": ["\n"]}))
    done = serve(folder, "--engine", "vllm", "--print")
    assert done.returncode == 0 and shlex.split(done.stdout)[0] == "vllm" and '"stop": ["\\n"]' in done.stderr


def test_a_vllm_that_is_installed_takes_over_and_finds_the_key_in_its_environment(folder: Path, tmp_path: Path) -> None:
    program = tmp_path / "bin" / "vllm"
    program.parent.mkdir()
    program.write_text(
        f'#!{sys.executable}\nimport json, os, sys\nprint(json.dumps([sys.argv[1:], os.environ["VLLM_API_KEY"]]))\nsys.exit(7)\n'
    )
    program.chmod(0o755)
    done = serve(folder, "--engine", "vllm", "--api-key", "secret", path=f"{program.parent}:{os.environ['PATH']}")
    arguments, key = json.loads(done.stdout)
    assert done.returncode == 7 and arguments[:2] == ["serve", str(folder)] and key == "secret" and "secret" not in arguments


def test_a_folder_that_vllm_could_not_serve_is_told_in_one_line(folder: Path) -> None:
    if shutil.which("vllm") is None:
        done = serve(folder, "--engine", "vllm")
        assert done.returncode == 2 and "vllm is not installed" in done.stderr and done.stderr.count("\n") == 1
    (folder / "chat_template.jinja").unlink()
    done = serve(folder, "--engine", "vllm", "--print")
    assert done.returncode == 2 and "has no chat template" in done.stderr and done.stderr.count("\n") == 1
    (folder / "generation_config.json").write_text("{}")
    done = serve(folder, "--engine", "vllm", "--print")
    assert done.returncode == 2 and "generation_config.json has no eos_token_id" in done.stderr
    (folder / "generation_config.json").unlink()
    done = serve(folder, "--engine", "vllm", "--print")
    assert done.returncode == 2 and "has no generation_config.json" in done.stderr
    done = serve(folder, "--print")
    assert done.returncode == 2 and "--print goes with --engine vllm" in done.stderr
    assert "choose mtllama or vllm" in serve(folder, "--engine", "tgi").stderr


def test_a_folder_of_pickles_is_told_what_writes_safetensors_and_that_does(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    done = serve(folder, "--engine", "vllm", "--print")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    program, *rest = shlex.split(done.stderr.partition("write them first: ")[2])
    assert program == "python"
    subprocess.run([sys.executable, *rest], check=True, capture_output=True, timeout=300)
    assert serve(folder, "--engine", "vllm", "--print").returncode == 0


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--format", "plain"], "--format"),
        (["--compare", "other", "--report", "report"], "--compare, --report"),
        (["--max-batch", "16", "--max-queue", "8", "--max-seconds", "5"], "--max-batch, --max-queue, --max-seconds"),
        (["--cache-gb", "2", "--data-dir", "data"], "--cache-gb, --data-dir"),
    ],
)
def test_what_cannot_be_handed_over_is_refused_by_its_name(folder: Path, words: list[str], named: str) -> None:
    told = CliRunner().invoke(app, ["serve", str(folder), "--engine", "vllm", "--print", *words]).exception
    assert isinstance(told, UserError) and str(told).startswith(f"vLLM knows no {named}; leave that out")
