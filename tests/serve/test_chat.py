"""Chat: the same ids as training, a memory that forgets, a pipe."""

import io
import sys
from pathlib import Path

import pytest

from mtllama.data.prompt import Turn
from mtllama.model.engine import Engine
from mtllama.model.find import find_model
from mtllama.model.load import load_model
from mtllama.serve.chat import EXAMPLES, Chat, run


@pytest.fixture
def chat(pico: Path) -> Chat:
    return Chat(Engine(load_model(find_model(str(pico)), dtype="float32")), max_new_tokens=8)


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
    run(chat)
    text = [chat.engine.tokenizer.decode(ids) for ids in seen]
    assert len(text) == 3
    assert "first" in text[1] and "first" not in text[2]
    assert "forgotten" in capsys.readouterr().out


def test_a_dialogue_that_is_too_long_forgets_its_oldest_turns(chat: Chat) -> None:
    chat.history = [Turn("word " * 150, "yes"), Turn("word " * 150, "no"), Turn("short", "fine")]
    list(chat.answer("and now? " * 10))
    assert [turn.answer for turn in chat.history[:-1]] != ["yes", "no", "fine"]
    assert chat.history[-2].answer == "fine"


def test_one_prompt_and_the_examples_print_answers_only(chat: Chat, capsys: pytest.CaptureFixture[str]) -> None:
    run(chat, prompt="Hello")
    assert capsys.readouterr().out.count("\n") >= 1
    run(chat, examples=True)
    out = capsys.readouterr().out
    assert len(EXAMPLES) == 4
    assert all(f"# {title}" in out and text in out for title, text in EXAMPLES)
