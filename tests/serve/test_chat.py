"""Chat: the same ids as training, a memory that forgets, a pipe."""

import io
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from served import SLOW

from mtllama import api, folders
from mtllama.data.prompt import Turn
from mtllama.errors import UserError
from mtllama.model.engine import Engine
from mtllama.model.find import find_model
from mtllama.model.load import load_model
from mtllama.serve import terminal
from mtllama.serve.chat import EXAMPLES, Chat


@pytest.fixture
def chat(pico: Path) -> Chat:
    return Chat(Engine(load_model(find_model(str(pico)), dtype="float32")), max_new_tokens=8)


def no_other(name: str) -> Engine:
    raise UserError(f"there is no model {name}")


def piped(chat: Chat, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    terminal.run(chat, no_other)


def test_an_answer_is_the_engines_own_continuation(chat: Chat) -> None:
    answer = "".join(chat.answer("What is a pond?"))
    ids, _ = chat.engine.encoder.prompt_ids("What is a pond?")
    assert answer.strip() == chat.engine.generate([ids], max_new_tokens=8, stop=())[0]
    assert chat.history == [Turn("What is a pond?", answer)]


def test_a_second_turn_sees_the_first_until_reset(chat: Chat, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[list[int]] = []
    stream = chat.engine.stream
    monkeypatch.setattr(chat.engine, "stream", lambda ids, settings: seen.append(ids) or stream(ids, settings))  # type: ignore[func-returns-value]
    monkeypatch.setattr(sys, "stdin", io.StringIO("first\nsecond\n/reset\nsecond\n/exit\nnever\n"))
    terminal.run(chat, no_other)
    text = [chat.engine.tokenizer.decode(ids) for ids in seen]
    assert len(text) == 3
    assert "first" in text[1] and "first" not in text[2]
    assert "forgotten" in capsys.readouterr().out


def test_a_dialogue_that_is_too_long_forgets_its_oldest_turns(chat: Chat) -> None:
    chat.history = [Turn("word " * 150, "yes"), Turn("word " * 150, "no"), Turn("short", "fine")]
    list(chat.answer("and now? " * 10))
    assert [turn.answer for turn in chat.history[:-1]] != ["yes", "no", "fine"]
    assert chat.history[-2].answer == "fine"


def test_of_a_long_dialogue_the_oldest_turns_are_forgotten_without_reading_it_again_for_each(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = [Turn(f"word {number} " * (1 + number % 7), "yes " * (number % 5)) for number in range(3000)]
    for length in (0, 1, 2, 9, 40, 41):
        theirs, (ids, cut) = list(turns[:length]), engine.encoder.prompt_ids("last", turns[:length], room=64)
        while cut and theirs:
            del theirs[0]
            ids, cut = engine.encoder.prompt_ids("last", theirs, room=64)
        chat = Chat(engine, max_new_tokens=64, history=turns[:length])
        assert chat.prompt_ids("last") == (ids, 64) and chat.history == theirs
    read, whole_prompt_ids = [], engine.encoder.whole_prompt_ids

    def counted(text: str, history: Sequence[Turn] = (), system: str | None = None) -> list[int]:
        read.append(len(history))
        return whole_prompt_ids(text, history, system)

    monkeypatch.setattr(engine.encoder, "whole_prompt_ids", counted)
    chat = Chat(engine, max_new_tokens=64, history=list(turns))
    chat.prompt_ids("last")
    assert chat.history == turns[-len(chat.history) :] and 3 < len(chat.history) < 500 and sum(read) < 3000


def test_one_prompt_and_the_examples_print_answers_only(chat: Chat, capsys: pytest.CaptureFixture[str]) -> None:
    terminal.run(chat, no_other, prompt="Hello")
    assert capsys.readouterr().out.count("\n") >= 1
    terminal.run(chat, no_other, examples=True)
    out = capsys.readouterr().out
    assert len(EXAMPLES) == 4
    assert all(f"# {title}" in out and text in out for title, text in EXAMPLES)


def test_bytes_that_are_no_text_are_read_as_such_and_the_pipe_goes_on(
    chat: Chat, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9?\ntwo\n"), encoding="utf-8"))
    terminal.run(chat, no_other)
    assert [turn.inputs for turn in chat.history] == ["caf\ufffd?", "two"]
    terminal.run(chat, no_other, prompt=os.fsdecode(b"caf\xe9?"))
    assert chat.history[-1].inputs == "caf\ufffd?" and not capsys.readouterr().err


COPA = "/task copa\nThe candle went out.\ncause\nI blew on it\nI lit it\n"


def test_a_task_is_filled_in_field_by_field(chat: Chat, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    piped(
        chat,
        monkeypatch,
        COPA + '/task copa ours_bare\nRain\neffect\nwet\ndry\n/task cos_e_v1.11\nWhat is wet?\n["fog", "sand", "salt", "stone", "ash"]\n',
    )
    out = capsys.readouterr().out
    fields = {"premise": "The candle went out.", "question": "cause", "choice1": "I blew on it", "choice2": "I lit it"}
    answer = api.Model(chat.engine).run_task("copa", **fields)
    assert answer.scores and f"{answer.prompt}\n-> {answer.answer}\n" in out
    for choice, chance in zip(answer.scores.choices, answer.scores.probabilities, strict=True):
        assert any(f"{chance:.1%}" in line and choice.text in line for line in out.splitlines())
    assert "Rain\nResult:" in out and "fog" in out
    assert chat.history == []


def test_tokens_shows_the_ids_that_the_model_read(chat: Chat, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    piped(chat, monkeypatch, "one\ntwo\n/tokens\n")
    shown = [int(line.split()[0]) for line in capsys.readouterr().out.splitlines() if line.startswith(" ") and line.split()[0].isdigit()]
    assert shown == chat.engine.encoder.whole_prompt_ids("two", chat.history[:1]) and len(chat.history) == 2
    piped(chat, monkeypatch, "/tokens three\n")
    out = capsys.readouterr().out
    assert f"{len(chat.engine.encoder.whole_prompt_ids('three'))} tokens" in out and str(chat.engine.encoder.end_ids) in out


def test_a_dialogue_is_saved_once_and_never_over_another(
    chat: Chat, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "d.json"
    piped(chat, monkeypatch, f"one\n/temperature 0.5\n/save {file}\n/reset\n/save {file}\n/save {tmp_path}/no/d.json\n")
    saved = folders.read_json(file)
    assert [message["role"] for message in saved["messages"]] == ["user", "assistant"] and saved["temperature"] == 0.5
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2 and "is there already" in errors[0] and str(tmp_path) in errors[1]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("/nothing", "there is no command /nothing"),
        ("/task", "/task wants the name of a task"),
        ("/task nothing", "nothing"),
        ("/temperature hot", "wants a number"),
        ("/temperature nan", "wants a number"),
        ("/tokens", "there is none yet"),
        ("/save", "wants a file name"),
        ("/model other", "there is no model other"),
    ],
)
def test_a_bad_command_is_told_and_the_dialogue_goes_on(
    chat: Chat, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], line: str, says: str
) -> None:
    piped(chat, monkeypatch, f"{line}\n/temperature\n/help\n")
    told = capsys.readouterr()
    assert says in told.err and told.err.count("\n") == 1 and "temperature 0 (greedy)" in told.out
    assert all(name in told.out for name in terminal.COMMANDS)


def test_another_model_begins_anew(pico: Path, chat: Chat, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    loaded: list[str] = []

    def load(name: str) -> Engine:
        loaded.append(name)
        return Engine(load_model(find_model(str(pico)), dtype="float32", format="plain"))

    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n/model other\n/tokens\n/tokens x\n"))
    terminal.run(chat, load)
    said = capsys.readouterr()
    assert loaded == ["other"] and chat.history == [] and "format plain" in said.out
    assert "there is none yet" in said.err, "the ids of the other model's last prompt are not this one's"


def test_a_path_is_a_prompt_and_no_command(chat: Chat, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    piped(chat, monkeypatch, "/etc/hosts is what?\n")
    assert [turn.inputs for turn in chat.history] == ["/etc/hosts is what?"] and not capsys.readouterr().err


def test_in_a_terminal_ctrl_c_stops_the_answer_and_a_pasted_text_is_one_prompt(pico: Path, tmp_path: Path) -> None:
    """A real terminal (a pseudo one), with a model that would go on for long."""
    leader, follower = pty.openpty()
    environment = {**os.environ, "MTLLAMA_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
    command = [sys.executable, "-c", SLOW, "chat", str(pico), "--temperature", "5", "--max-new-tokens", "400"]
    process = subprocess.Popen(
        command, stdin=follower, stdout=follower, stderr=follower, env=environment, start_new_session=True, close_fds=True
    )
    os.close(follower)
    heard = b""

    def until(wanted: bytes, after: int = 0) -> None:
        nonlocal heard
        deadline = time.monotonic() + 90
        while wanted not in heard[after:]:
            ready, _, _ = select.select([leader], [], [], 1)
            assert time.monotonic() < deadline, heard[-500:]
            if ready:
                heard += os.read(leader, 4096)

    try:
        until(b"Ctrl-D ends")
        until(b"?2004h")  # the line editor reads
        os.write(leader, b"\x1b[200~one\ntwo\x1b[201~\r")  # as a terminal tells of a paste
        start = len(heard)
        until(b"?2004l", start)  # the line was taken, the answer begins
        deadline = time.monotonic() + 60
        while b"[stopped]" not in heard[start:] and time.monotonic() < deadline:
            time.sleep(1)
            os.kill(process.pid, signal.SIGINT)  # again, as a person would: one was once lost, and the cause is not known
            if select.select([leader], [], [], 1)[0]:
                heard += os.read(leader, 4096)
        until(b"[stopped]", start)
        place = len(heard)
        os.write(leader, b"/tokens\r")
        until(b"the answer ends at", place)
        until(b"?2004h", heard.index(b"the answer ends at", place))
        os.write(leader, b"\x04")
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(leader)
    assert "+one\n+two\n" in (tmp_path / "chat_history").read_text()
