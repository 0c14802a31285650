"""What a client may ask is checked on the event loop: a body of any kind is judged by its first wrong items, and nothing is ignored in silence."""

from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from mtllama.serve.requests import ChatRequest, CompletionRequest, ScoreRequest, TaskRequest

MANY = 20_000
ASKED: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}]}


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (CompletionRequest, {"prompt": [""] * MANY}),
        (CompletionRequest, {"prompt": [{}] * MANY}),
        (CompletionRequest, {"prompt": ["\ud800"] * MANY}),
        (CompletionRequest, {"prompt": [[]] * MANY}),
        (CompletionRequest, {"prompt": [[""] * MANY]}),
        (CompletionRequest, {"prompt": "x", "stop": [""] * MANY}),
        (CompletionRequest, {"prompt": "x", "stop_token_ids": [""] * MANY}),
        (CompletionRequest, {"prompt": "x", "logit_bias": {str(i): "" for i in range(MANY)}}),
        (CompletionRequest, {"prompt": "x", "logit_bias": {f"\ud800{i}": 0 for i in range(MANY)}}),
        (ChatRequest, {"messages": [{}] * MANY}),
        (ChatRequest, {"messages": [{"role": "user", "content": [{}] * MANY}] * 100}),
        (ChatRequest, {**ASKED, "response_format": {f"\ud800{i}": 0 for i in range(MANY)}}),
        (ChatRequest, {**ASKED, "tools": [{}] * MANY}),
        (ScoreRequest, {"prompt": "x", "choices": [0] * MANY}),
        (TaskRequest, {"fields": {f"\ud800{i}": 0 for i in range(MANY)}}),
    ],
)
def test_a_body_with_thousands_of_wrong_items_has_a_few_errors(kind: type[BaseModel], body: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as raised:
        kind.model_validate(body)
    assert 1 <= raised.value.error_count() <= 8


HARMFUL = {
    "frequency_penalty": 0.5,
    "presence_penalty": -1,
    "repetition_penalty": 1.2,
    "top_k": 40,
    "min_p": 0.1,
    "min_tokens": 5,
    "typical_p": 0.9,
    "logit_bias": {"5": 100},
    "stop_token_ids": [2],
    "bad_words": ["x"],
    "repeat_penalty": 1.1,
    "mirostat": 2,
    "guided_choice": ["a", "b"],
    "add_special_tokens": False,
    "truncate_prompt_tokens": 5,
    "tool_choice": "required",
    "modalities": ["audio"],
    "tools": [{"name": "look"}],
    "functions": [{"name": "look"}],
    "ignore_eos": True,
    "guided_json": {"type": "object"},
    "structured_outputs": {"regex": "a+"},
    "suffix": "y",
    "response_format": {"type": "json_object"},
}
HARMLESS = {
    "frequency_penalty": 0,
    "presence_penalty": 0.0,
    "repetition_penalty": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "min_tokens": 0,
    "typical_p": 1,
    "logit_bias": {},
    "stop_token_ids": [],
    "bad_words": [],
    "repeat_penalty": 1.0,
    "mirostat": 0,
    "guided_choice": [],
    "add_special_tokens": True,
    "truncate_prompt_tokens": None,
    "tool_choice": "auto",
    "modalities": ["text"],
    "tools": [],
    "functions": [],
    "ignore_eos": False,
    "guided_json": {},
    "structured_outputs": {},
    "suffix": "",
    "response_format": {"type": "text", "schema": None},
}


@pytest.mark.parametrize(("kind", "body"), [(CompletionRequest, {"prompt": "x"}), (ChatRequest, ASKED)])
@pytest.mark.parametrize("name", HARMFUL)
def test_what_is_not_served_is_refused_by_its_name_unless_it_changes_nothing(
    kind: type[BaseModel], body: dict[str, Any], name: str
) -> None:
    with pytest.raises(ValidationError, match=f"{name} is not served; leave it out"):
        kind.model_validate({**body, name: HARMFUL[name]})
    for value in (HARMLESS[name], None):
        assert kind.model_validate({**body, name: value})
