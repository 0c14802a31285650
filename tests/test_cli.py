"""The command line as a user meets it: one clear line and status 2 for bad input, examples in every help text."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mtllama import cli


def mtllama(*words: str, cwd: Path | None = None, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "mtllama", *words], capture_output=True, text=True, cwd=cwd, env={**os.environ, **(env or {})}
    )


def write_recipe(file: Path, model: Path, **train: float) -> None:
    """A recipe on the sampler; JSON is YAML too."""
    values = {"model": str(model), "out": "tuned", "mixture": {"dir": "sampler"}, "train": {"batch_size": 8, **train}}
    file.write_text(json.dumps(values), encoding="utf-8")


def fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> str:
    """Run the command in this process; it must end with status 2 and one line, which is returned."""
    monkeypatch.setattr(sys, "argv", ["mtllama", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("mtllama:")]
    assert len(lines) == 1 and captured.err.splitlines()[-1] == lines[0], captured.err
    assert "Traceback" not in captured.err
    return lines[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tasks", "show", "copaa"], "did you mean copa?"),
        (["tasks", "render", "copa", "--index", "80"], "rows 0 to 79"),
        (["tasks", "render", "copa", "--template", "nope"], "no template 'nope'"),
        (["tasks", "list", "--role", "test"], "unknown role"),
        (["evall"], "No such command 'evall'"),
        (["eval", "--limt", "3"], "No such option: --limt"),
        (["eval", "smollm2-135m"], "Missing option '--out'"),
        (["models", "path", "no-such-model"], "no model 'no-such-model'"),
        (["models", "path", "some/model"], "HF_HUB_OFFLINE"),
        (["models", "path", "{tmp}"], "has no config.json"),
        (["mix", "plan", "nowhere.yaml"], "no recipe nowhere.yaml"),
        (["mix", "plan", "quickstart", "train.lrr=1"], "did you mean train.lr?"),
        (["mix", "plan", "quickstart", "mixture.tasks.squad=1"], "held out"),
        (["mix", "plan"], "give a recipe, or a named mixture"),
        (["mix", "plan", "quickstart", "--mixture", "t0-train"], "give a recipe, or a named mixture"),
        (["mix", "plan", "--mixture", "t0"], "unknown mixture 't0'"),
        (["mix", "plan", "--mixture", "t0-train", "--rule", "weights"], "unknown rule 'weights'"),
        (["mix", "plan", "quickstart", "--by", "row"], "--by is 'row'"),
        (["mix", "plan", "quickstart", "--num-examples", "0"], "--num-examples is 0"),
        (["mix", "plan", "quickstart", "mixture.tasks.trec=-1"], "mixture.tasks.trec is -1.0; a positive number is needed"),
        (["mix", "plan", "quickstart", "mixture.tasks.trec=many"], "mixture.tasks.trec is 'many'; a number is needed"),
        (["mix", "plan", "quickstart", "mixture.templates=promptsource:{tmp}"], "holds no promptsource templates"),
        (["mix", "plan", "mt-llama-7b"], "no local file, and UCLNLP/adversarial_qa cannot be had from the hub"),
        (["mix", "show", "quickstart", "--index", "-1"], "--index is -1"),
        (["mix", "show", "quickstart", "--step", "126"], "the run has the steps 1 to 125"),
        (["mix", "show", "{tmp}"], "is not the folder of a training run"),
        (["mix", "export", "quickstart", "--out", "x", "--format", "csv"], "choose parquet or jsonl"),
        (["mix", "export", "quickstart", "--out", "{full}"], "is not empty"),
        (["mix", "check", "quickstart", "--eval-dir", "{tmp}"], "no evaluation set in"),
        (["tasks", "show", "t0-train"], "is a group of data sets"),
        (["tasks", "render", "copa", "--promptsource", "{tmp}"], "holds no promptsource templates"),
        (["train", "run", "quickstart", "model={tmp}"], "config.json"),
        (["delta", "apply", "--base", "{tmp}", "--delta", "{tmp}", "--out", "x"], "config.json"),
        (["delta", "make", "--base", "{pico}", "--target", "{pico}", "--out", "x", "--level", "tiny"], "--level is 'tiny'"),
        (["delta", "verify", "{pico}", "--delta", "{tmp}"], "delta.json"),
        (["report", "{tmp}", "--out", "x"], "results.json"),
        (["chat", "{pico}", "--temperature", "-1"], "--temperature"),
        (["chat", "{pico}", "--base", "{pico}"], "give either MODEL"),
        (["eval", "{pico}", "--out", "{full}"], "is not empty"),
        (["eval", "{pico}", "--out", "x", "--dtype", "int8"], "--dtype is 'int8'"),
        (["eval", "{pico}", "--out", "x", "--format", "chatml"], "unknown format"),
        (["eval", "{pico}", "--out", "x", "--data-dir", "{tmp}/none"], "does not exist"),
        (["quickstart", "--out", "{full}"], "holds other files"),
    ],
)
def test_bad_input_is_one_line_and_status_two(
    words: list[str], message: str, tmp_path: Path, pico: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("x", encoding="utf-8")
    filled = [word.format(tmp=tmp_path, pico=pico, full=tmp_path / "full") for word in words]
    assert message in fails(capsys, monkeypatch, *filled)
    assert (tmp_path / "full" / "precious").read_text(encoding="utf-8") == "x"
    assert not (tmp_path / "x").exists()


def test_a_broken_line_of_a_data_file_is_named(
    tmp_path: Path, pico: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "sst2"
    data.mkdir()
    (data / "validation.jsonl").write_text('{"sentence": "a", "label": 1}\n{"sentence": \n', encoding="utf-8")
    line = fails(capsys, monkeypatch, "eval", str(pico), "--suite", "mt-llama", "--data-dir", str(tmp_path), "--out", str(tmp_path / "x"))
    assert "validation.jsonl, line 2" in line


def test_the_base_model_that_is_missing_is_asked_for_by_its_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MTLLAMA_HOME", str(tmp_path))
    monkeypatch.setattr("mtllama.model.convert.find_gguf", lambda: None)
    assert "mtllama models fetch smollm2-135m" in fails(capsys, monkeypatch, "models", "path", "smollm2-135m")


def test_a_full_disk_is_said_and_leaves_nothing(
    tmp_path: Path, pico: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mtllama.weights.card.write", full)
    line = fails(capsys, monkeypatch, "delta", "make", "--base", str(pico), "--target", str(pico), "--out", str(tmp_path / "d"))
    assert "no space left on the disk" in line
    assert list(tmp_path.iterdir()) == []


def test_every_command_has_help_with_an_example(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    commands = [["quickstart"], ["eval"], ["report"], ["chat"], ["doctor"], ["version"]]
    groups = {
        "models": ["list", "path", "fetch"],
        "tasks": ["list", "show", "render"],
        "mix": ["plan", "show"],
        "train": ["run"],
        "delta": ["make", "apply", "info"],
    }
    commands += [[group, name] for group, names in groups.items() for name in names]
    assert len(commands) == 18
    for words in commands:
        monkeypatch.setattr(sys, "argv", ["mtllama", *words, "--help"])
        cli.main()
        text = " ".join(capsys.readouterr().out.split())
        assert f"Example: mtllama {' '.join(words)}" in text, words


def test_every_command_of_the_documents_is_one_that_exists(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).resolve().parents[1]
    lines = set()
    for file in (root / "README.md", root / "CONTRIBUTING.md", *root.glob("docs/*.md")):
        for line in file.read_text(encoding="utf-8").splitlines():
            lines |= {match.split("#")[0].strip() for match in re.findall(r"(?:^|`)(mtllama [a-z][^`]*)", line)}
    assert len(lines) > 15
    for line in lines:
        words = line.split()[1:]
        command = words[: 2 if words[0] in ("models", "tasks", "mix", "train", "delta") else 1]
        monkeypatch.setattr(sys, "argv", ["mtllama", *command, "--help"])
        cli.main()
        known = capsys.readouterr().out
        for option in (word for word in words if word.startswith("--")):
            assert f"{option} " in known, line


def test_the_commands_of_the_catalogue_and_mixture_print_what_they_promise(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, pico: Path, tmp_path: Path
) -> None:
    def out(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["mtllama", *words])
        cli.main()
        return capsys.readouterr().out

    listed = json.loads(out("tasks", "list", "--role", "unseen task", "--json"))
    assert {"copa", "winogrande", "wic", "mnli", "rte", "anli_r1", "cb", "wsc", "hellaswag", "xcopa-et"} <= {
        task["name"] for task in listed
    }
    pairs = {task["name"] for task in json.loads(out("tasks", "list", "--json")) if len(task["languages"]) == 2}
    assert {"xquad-de-en", "mlqa-en-de"} <= pairs and not pairs & set(out("tasks", "list").split())
    assert "metrics accuracy, macro-f1;" in out("tasks", "show", "cb")
    assert "Help me pick the more plausible option" in out("tasks", "show", "copa")
    rendered = json.loads(out("tasks", "render", "copa", "--index", "3", "--json"))
    assert rendered[0]["targets"] in rendered[0]["choices"]
    plan = json.loads(out("mix", "plan", "quickstart", "--json"))
    assert plan["sets"] == len(plan["by_set"]) == 14 and plan["tasks"] == len(plan["rows"]) == 56
    assert "22 tasks are oversampled" in out("mix", "plan", "--mixture", "t0-train")
    assert json.loads(out("mix", "plan", "--mixture", "train", "--json"))["sets"] == 39
    assert sum(row["share"] for row in plan["rows"]) == pytest.approx(1, abs=1e-3)
    shown = out("mix", "show", "quickstart", f"model={pico}", "--index", "5")
    assert "Output:" in shown and "<|end|>]" in shown
    step = out("mix", "show", "quickstart", f"model={pico}", "--step", "2")
    assert [int(line.split(":")[0]) for line in step.splitlines() if " template " in line] == list(range(8, 16))
    assert "0 of 640 evaluation items found in 0 of 1,557 training rows" in out("mix", "check", "quickstart", "--eval-dir", "sampler")
    assert out("mix", "export", "quickstart", "--out", str(tmp_path / "mixed"), "--num-examples", "9").strip() == str(tmp_path / "mixed")
    assert out("models", "path", str(pico)).strip() == str(pico)


def test_a_whole_job_in_separate_processes(pico: Path, tmp_path: Path) -> None:
    """Train, delta, restore, evaluate from base and delta, report, chat: each command as a user types it."""
    write_recipe(tmp_path / "r.yaml", pico, examples=16, lr=1e-3)
    steps = [
        ["train", "run", "r.yaml", "train.lr=2e-3"],
        ["delta", "make", "--base", str(pico), "--target", "tuned", "--out", "delta"],
        ["delta", "apply", "--base", str(pico), "--delta", "delta", "--out", "restored"],
        ["delta", "verify", "restored", "--delta", "delta"],
        ["eval", str(pico), "--limit", "4", "--out", "base"],
        ["eval", "--base", str(pico), "--delta", "delta", "--limit", "4", "--out", "run"],
        ["report", "base", "run", "--out", "report"],
        ["chat", "restored", "--prompt", "Hello", "--max-new-tokens", "4"],
    ]
    for words in steps:
        done = mtllama(*words, cwd=tmp_path)
        assert done.returncode == 0, (words, done.stderr)
    assert (tmp_path / "tuned" / "model.safetensors").read_bytes() == (tmp_path / "restored" / "model.safetensors").read_bytes() or (
        len(list((tmp_path / "restored").glob("*.safetensors"))) == 1
    )
    assert (tmp_path / "report" / "report.html").stat().st_size > 10_000
    manifest = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    assert manifest["format"] == "mtllama" and manifest["model"]["delta"] == "delta"


def test_ctrl_c_keeps_what_was_done_and_says_so(pico: Path, tmp_path: Path) -> None:
    write_recipe(tmp_path / "r.yaml", pico, examples=100_000)
    process = subprocess.Popen([sys.executable, "-m", "mtllama", "train", "run", "r.yaml"], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "tuned.partial" / "metrics.jsonl"
    while process.poll() is None and not (metrics.is_file() and len(metrics.read_text(encoding="utf-8").splitlines()) >= 3):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 2
    assert "interrupted after step" in err and "goes on from there" in err and "Traceback" not in err
    assert len(list((tmp_path / "tuned.partial" / "checkpoints").glob("step-*"))) == 1
