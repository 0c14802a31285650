"""What a client may ask over HTTP, field by field: OpenAI's completions and chat, choices to score, tasks to run.

Fields that would change an answer and are not served are refused; unknown ones are ignored, as other servers do.

A body is checked on the event loop, so the first wrong item of a list ends it: an error for each of a million would keep everybody waiting.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

MAX_PROMPTS, MAX_N, MAX_STOPS, MAX_STOP_LENGTH, MAX_LOGPROBS, MAX_TURNS, MAX_FIELDS = 64, 16, 16, 256, 20, 256, 100

Text = Annotated[str, Field(max_length=1_000_000)]
Ids = Annotated[list[Annotated[int, Field(ge=0, strict=True)]], Field(min_length=1, max_length=1_000_000, fail_fast=True)]
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]


def _few(fields: Any) -> Any:
    # Before their names are looked at: objects have no way of their own to stop at the first wrong one in all of pydantic's versions.
    if isinstance(fields, dict) and len(fields) > MAX_FIELDS:
        raise ValueError(f"there are {len(fields)} fields; at most {MAX_FIELDS} are read")
    return fields


class _Request(BaseModel):
    model_config = ConfigDict(extra="ignore")


class StreamOptions(_Request):
    """How a stream is told."""

    include_usage: bool = False


class _Sampled(_Request):
    """What completions and chat have in common."""

    model: str | None = Field(None, max_length=1000, description="Name of the served model; none: the one there is.")
    temperature: Number | None = Field(None, ge=0, le=100, description="0 is greedy. Default: 1, as OpenAI has it.")
    top_p: Number | None = Field(None, ge=0, le=1, description="0 leaves the likeliest token.")
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS, fail_fast=True)] | None = None
    seed: Seed | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @model_validator(mode="before")
    @classmethod
    def _served(cls, fields: Any) -> Any:
        if isinstance(fields, dict):
            for name, harmless in _NOT_SERVED.items():
                value = fields.get(name)
                if name == "response_format" and isinstance(value, dict):
                    value = value.get("type", "") if value else None
                if value is not None and value not in harmless:
                    raise ValueError(f"{name} is not served; leave it out")
        return fields

    @model_validator(mode="after")
    def _likeliest(self) -> Any:
        if self.top_p == 0:  # the smallest set of tokens that there is: the likeliest one
            self.top_p, self.temperature = None, 0.0
        return self


_EMPTY: tuple[Any, ...] = ("", {}, [])
_NOT_SERVED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("frequency_penalty", "presence_penalty", "min_p", "min_tokens", "no_repeat_ngram_size"), (0,)),
    **dict.fromkeys(("mirostat", "dry_multiplier", "xtc_probability"), (0,)),
    **dict.fromkeys(("repetition_penalty", "repeat_penalty", "typical_p", "length_penalty"), (1,)),
    **dict.fromkeys(
        ("logit_bias", "stop_token_ids", "bad_words", "allowed_token_ids", "suffix", "chat_template", "tools", "functions"), _EMPTY
    ),
    **dict.fromkeys(
        ("structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar", "grammar", "json_schema"), _EMPTY
    ),
    **dict.fromkeys(("ignore_eos", "use_beam_search", "include_stop_str_in_output", "continue_final_message"), (False,)),
    **dict.fromkeys(("add_special_tokens", "skip_special_tokens"), (True,)),
    "top_k": (0, -1),
    "truncate_prompt_tokens": (),
    "tool_choice": ("none", "auto"),
    "modalities": (["text"],),
    "response_format": ("text",),
}
"""What would change an answer in the interface of OpenAI, vLLM or llama.cpp, and is not served; and its values that change nothing, which
clients send of their own accord."""


class CompletionRequest(_Sampled):
    """`POST /v1/completions`: text goes on behind each prompt as it stands, in no prompt format."""

    prompt: (
        Text
        | Ids
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
        | Annotated[list[Ids], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
    ) = Field(description="Text, ids, or a list of either.")
    max_tokens: Annotated[int, Field(ge=0)] | None = Field(
        16, description="0, with echo: only the prompt is told, and its log-probabilities."
    )
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    best_of: int | None = Field(None, description="Not served beyond n.")

    @model_validator(mode="after")
    def _consistent(self) -> Any:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("best_of is not served beyond n; leave it out")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens is 0; ask for at least 1, or for echo")
        return self

    @property
    def prompts(self) -> "list[str] | list[list[int]]":
        """The prompts, one or several."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [self.prompt] if isinstance(self.prompt[0], int) else self.prompt  # type: ignore[list-item, return-value]


class ContentPart(_Request):
    """A part of a message; only text is read."""

    type: Literal["text"]
    text: Text


class Message(_Request):
    """One turn of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[ContentPart], Field(max_length=MAX_TURNS, fail_fast=True)]

    @property
    def text(self) -> str:
        """All of its text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(_Sampled):
    """`POST /v1/chat/completions`, in the model's own prompt format."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_TURNS, fail_fast=True)] = Field(
        description="An optional system message, then user and assistant in turn; the last one is a user's."
    )
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Any:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        roles = [message.role for message in self.messages]
        turns = roles[1:] if roles[0] in ("system", "developer") else roles
        if len(turns) % 2 == 0 or any(role != ("user", "assistant")[i % 2] for i, role in enumerate(turns)):
            raise ValueError("messages are an optional system message, then user and assistant in turn, a user's last")
        return self


class ScoreRequest(_Request):
    """`POST /v1/score`: how likely each choice is as the answer to a prompt, exactly."""

    model: str | None = Field(None, max_length=1000)
    prompt: Text
    choices: Annotated[list[Text], Field(min_length=1, max_length=512, fail_fast=True)]
    raw: bool = Field(False, description="Join prompt and choices as they stand: no prompt format, no end marker.")


class TaskRequest(_Request):
    """`POST /v1/tasks/{name}/run`: one instance of a task of the catalogue."""

    model: str | None = Field(None, max_length=1000)
    template: str | None = Field(None, max_length=200, description="Name of one of its prompts; none: the first.")
    fields: Annotated[dict[Annotated[str, Field(max_length=200)], Any], Field(max_length=MAX_FIELDS), BeforeValidator(_few)] = Field(
        description="The task's fields by name."
    )
