"""The server over real HTTP, asked by real clients: OpenAI's SDK, curl, lm-eval, and some that misbehave."""

import asyncio
import contextlib
import functools
import http.client
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from served import PATIENCE, SLOW, Served, run_server
from typer.testing import CliRunner

from mtllama import api, cli
from mtllama.cli import app
from mtllama.data.prompt import Turn
from mtllama.errors import UserError
from mtllama.evaluate import memory
from mtllama.evaluate.endpoint import Endpoint
from mtllama.model.engine import Engine
from mtllama.model.find import find_model
from mtllama.model.load import load_model
from mtllama.serve import guards
from mtllama.serve.scheduler import Limits
from mtllama.serve.server import bind, start
from mtllama.tasks.catalog import catalog, load_rows, sampler_dir


def greedy(served: Served, prompt: str, count: int) -> list[int]:
    return served.engine.continue_ids([served.engine.encoder.raw_ids(prompt)], max_new_tokens=count)[0]


# OpenAI's own client


def test_the_openai_client_gets_what_the_engine_says(served: Served) -> None:
    client, tokenizer = served.client(), served.engine.tokenizer
    assert [model.id for model in client.models.list()] == ["pico"] and client.models.retrieve("pico").id == "pico"
    answer = client.completions.create(model="pico", prompt="Is fog wet?", max_tokens=12, temperature=0)
    ids = greedy(served, "Is fog wet?", 12)
    assert answer.choices[0].text == tokenizer.decode(ids, skip_special_tokens=True)
    assert answer.usage and answer.usage.completion_tokens == len(ids)
    assert answer.usage.prompt_tokens == len(served.engine.encoder.raw_ids("Is fog wet?"))
    assert answer.choices[0].finish_reason == ("stop" if ids[-1] == tokenizer.eos_token_id else "length")


def test_a_stream_is_the_whole_answer_in_pieces(served: Served) -> None:
    client = served.client()
    options: Any = {"model": "pico", "prompt": ["One", "Two two"], "max_tokens": 20, "temperature": 0}
    whole = client.completions.create(**options)
    texts, reasons, usage, pieces = ["", ""], ["", ""], None, 0
    for chunk in client.completions.create(**options, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
            pieces += 1
    assert texts == [choice.text for choice in whole.choices] and reasons == [choice.finish_reason for choice in whole.choices]
    assert usage == whole.usage and pieces > 4


def test_chat_is_the_model_s_own_format(served: Served) -> None:
    client, encoder = served.client(), served.engine.encoder
    messages: Any = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": [{"type": "text", "text": "Bye"}]},
    ]
    answer = client.chat.completions.create(model="pico", messages=messages, max_tokens=15, temperature=0)
    prompt = encoder.whole_prompt_ids("Bye", [Turn("Hello", "Hi")], "Be brief.")
    text = "".join(served.engine.stream(prompt, api.answer_settings(served.engine, 15)))
    assert answer.choices[0].message.content == text and answer.choices[0].message.role == "assistant"
    assert answer.usage and answer.usage.prompt_tokens == len(prompt)
    streamed = client.chat.completions.create(model="pico", messages=messages, max_tokens=15, temperature=0, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == text


def test_log_probabilities_are_the_engine_s(served: Served) -> None:
    client, prompt = served.client(), "Is fog wet?"
    ids, new = served.engine.encoder.raw_ids(prompt), greedy(served, prompt, 6)
    answer = client.completions.create(model="pico", prompt=prompt, max_tokens=6, temperature=0, logprobs=2, echo=True)
    found = answer.choices[0].logprobs
    assert found and found.token_logprobs and found.tokens and found.top_logprobs and found.text_offset
    ((scored,),) = served.engine.judge([api.Branches(ids[:1], [ids[1:] + new])])
    assert found.token_logprobs[0] is None and found.token_logprobs[1:] == pytest.approx(scored.log_probs, abs=1e-4)
    assert len(found.tokens) == len(ids) + len(new) == len(found.top_logprobs) == len(found.text_offset)
    assert all(top is None or 1 <= len(top) <= 3 for top in found.top_logprobs)
    assert answer.choices[0].text.startswith(prompt)
    chat = client.chat.completions.create(
        model="pico", messages=[{"role": "user", "content": prompt}], max_tokens=3, temperature=0, logprobs=True, top_logprobs=2
    )
    content = chat.choices[0].logprobs and chat.choices[0].logprobs.content
    assert content and all(len(each.top_logprobs) == 2 and each.logprob == each.top_logprobs[0].logprob for each in content)


def test_draws_repeat_with_a_seed_and_several_answers_differ(served: Served) -> None:
    client = served.client()

    def drawn(**options: Any) -> list[str]:
        answer = client.completions.create(model="pico", prompt="Once", max_tokens=10, temperature=1, n=4, **options)
        return [choice.text for choice in answer.choices]

    assert drawn(seed=3) == drawn(seed=3) != drawn(seed=4)
    assert len(set(drawn(seed=3))) > 1 and drawn() != drawn()


def test_prompts_come_as_text_ids_or_lists_of_either(served: Served) -> None:
    ids = served.engine.encoder.raw_ids("Is fog wet?")
    forms: list[Any] = ["Is fog wet?", ids, ["Is fog wet?"], [ids]]
    texts = [served.post("/v1/completions", prompt=form, temperature=0).json()["choices"][0]["text"] for form in forms]
    assert len(set(texts)) == 1
    two = served.post("/v1/completions", prompt=[ids, ids[:2]], temperature=0).json()["choices"]
    assert [choice["index"] for choice in two] == [0, 1] and two[0]["text"] == texts[0]


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_never_shows(served: Served, stream: bool) -> None:
    whole = served.post("/v1/completions", prompt="Is fog wet?", max_tokens=40, temperature=0).json()["choices"][0]["text"]
    place = len(whole) // 2
    stop = whole[place : place + 5]  # wherever tokens end
    body = {"prompt": "Is fog wet?", "max_tokens": 40, "temperature": 0, "stop": ["never said", stop], "stream": stream}
    answer = served.post("/v1/completions", **body)
    if stream:
        events = [json.loads(line[6:]) for line in answer.text.split("\n\n") if line and line != "data: [DONE]"]
        text = "".join(choice["text"] for event in events for choice in event["choices"])
        reason = events[-1]["choices"][0]["finish_reason"]
    else:
        text, reason = answer.json()["choices"][0]["text"], answer.json()["choices"][0]["finish_reason"]
    assert text == whole[: whole.index(stop)] and reason == "stop"


def test_curl_is_served(served: Served) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    body = json.dumps({"prompt": "Is fog wet?", "max_tokens": 5, "stream": True})
    told = subprocess.run(
        ["curl", "-sSN", f"{served.url}/v1/completions", "-H", "Content-Type: application/json", "-d", body],
        capture_output=True, text=True, check=True, timeout=PATIENCE,
    ).stdout  # fmt: skip
    assert told.startswith("data: {") and told.endswith("data: [DONE]\n\n")


# Scoring and tasks


def test_scores_are_the_offline_ones(served: Served) -> None:
    choices = ["Yes", "No", "It depends on the fog"]
    told = served.post("/v1/score", prompt="Is fog wet?", choices=choices).json()
    theirs = api.Model(served.engine).score("Is fog wet?", choices)
    assert told["model"] == "pico" and told["best"] == theirs.best.index
    for ours, other in zip(told["choices"], theirs.choices, strict=True):
        assert ours["logprobs"] == pytest.approx(list(other.logprobs), abs=1e-4) and ours["token_ids"] == list(other.token_ids)
        for name in ("sum", "mean", "per_char", "per_byte"):
            assert ours[name] == pytest.approx(getattr(other, name), abs=1e-4)
        assert ours["text"] == other.text
    assert set(told["choices"][0]) == {"index", "text", "token_ids", "logprobs", "sum", "mean", "per_char", "per_byte"}
    raw = served.post("/v1/score", prompt="Is fog", choices=[" wet", " dry"], raw=True).json()
    assert raw["choices"][0]["token_ids"] == served.engine.encoder.raw_continuation_ids(" wet")


def test_tasks_are_listed_and_run(served: Served) -> None:
    listed = {task["name"]: task for task in httpx.get(f"{served.url}/v1/tasks").json()["data"]}
    assert len(listed) > 40
    assert listed["copa"]["templates"][0]["fields"] == ["premise", "question", "choice1", "choice2"]
    fields = {"premise": "The candle went out.", "question": "cause", "choice1": "I blew on it", "choice2": "I lit it"}
    told = served.post("/v1/tasks/copa/run", fields=fields).json()
    theirs = api.Model(served.engine).run_task("copa", **fields)
    assert (told["answer"], told["prompt"], told["template"]) == (theirs.answer, theirs.prompt, theirs.template)
    assert sum(told["probabilities"]) == pytest.approx(1) and len(told["choices"]) == 2
    asked = {"context": "Paris is in France.", "question": "Where is Paris?"}
    told = served.post("/v1/tasks/squad/run", fields=asked, template="mt-llama").json()
    assert told["choices"] is None and told["answer"] == api.Model(served.engine).run_task("squad", **asked).answer


# Bad requests

COPA = {"premise": "The candle went out.", "question": "cause", "choice1": "I blew on it", "choice2": "I lit it"}


def nested(depth: int) -> Any:
    value: Any = "a"
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        ("/v1/completions", {}, 400, "prompt: Field required"),
        ("/v1/completions", {"prompt": "x", "temperature": -1}, 400, "temperature"),
        ("/v1/completions", {"prompt": "x", "max_tokens": 10_000}, 400, "the model reads 512 in all"),
        ("/v1/completions", {"prompt": "x", "max_tokens": 0}, 400, "max_tokens is 0"),
        ("/v1/completions", {"prompt": [10**7]}, 400, "token id 10000000 is not of this model"),
        ("/v1/completions", {"prompt": []}, 400, "prompt"),
        ("/v1/completions", {"prompt": "x", "model": "gpt-4"}, 404, "'gpt-4' is not served here; 'pico' is"),
        ("/v1/completions", {"prompt": "x", "suffix": "y"}, 400, "suffix is not served"),
        ("/v1/completions", {"prompt": "x", "presence_penalty": 1}, 400, "not served"),
        ("/v1/completions", {"prompt": "x", "top_k": 40}, 400, "top_k is not served"),
        ("/v1/completions", {"prompt": "x", "ignore_eos": True}, 400, "ignore_eos is not served"),
        ("/v1/completions", {"prompt": "x", "guided_json": {"type": "object"}}, 400, "guided_json is not served"),
        ("/v1/completions", {"prompt": [[5] * 500] * 8, "echo": True, "logprobs": 20, "n": 16, "max_tokens": 0}, 400, "1,344,000 log-prob"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "top_logprobs": 2}, 400, "needs logprobs"),
        ("/v1/completions", {"prompt": [""] * 100_000}, 400, "prompt"),
        ("/v1/completions", {"prompt": "x", "stop": [""]}, 400, "stop"),
        ("/v1/chat/completions", {"messages": []}, 400, "messages"),
        ("/v1/chat/completions", {"messages": [{"role": "assistant", "content": "x"}]}, 400, "in turn"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "tools": [{}]}, 400, "tools is not served"),
        ("/v1/score", {"prompt": "x", "choices": []}, 400, "choices"),
        ("/v1/score", {"prompt": "x", "choices": [""], "raw": True}, 400, "choice 0 is no token"),
        ("/v1/score", {"prompt": "word " * 600, "choices": ["a", "b"]}, 400, "the model reads 512"),
        ("/v1/tasks/nothing/run", {"fields": {}}, 404, "no task 'nothing'"),
        ("/v1/tasks/copa/run", {"fields": {"premise": "x"}}, 400, "question, choice1, choice2 missing"),
        ("/v1/tasks/copa/run", {"fields": {}, "template": "none"}, 400, "has no template 'none'"),
        ("/v1/tasks/squad/run", {"fields": {"context": 5, "question": "x"}}, 400, "template 'mt-llama' of squad"),
        ("/v1/tasks/squad/run", {"fields": {"context": "\ud800", "question": "x"}}, 400, "half of a surrogate pair"),
        ("/v1/tasks/copa/run", {"fields": {**COPA, "choice1": "\udfff"}}, 400, "half of a surrogate pair"),
        ("/v1/tasks/copa/run", {"fields": {**COPA, "\ud800": 1}}, 400, "fields"),
        ("/v1/tasks/copa/run", {"fields": {str(i): "" for i in range(101)}}, 400, "there are 101 fields; at most 100 are read"),
        ("/v1/tasks/cos_e_v1.11/run", {"fields": {"question": "x", "choices": nested(200)}}, 400, "nested more than 100 deep"),
        ("/v1/tasks/cos_e_v1.11/run", {"fields": {"question": "x", "choices": nested(700)}}, 400, "nested more than 100 deep"),
    ],
)
def test_a_bad_request_gets_one_clear_line(served: Served, path: str, body: dict[str, Any], status: int, says: str) -> None:
    # Written as pure ASCII: halves of surrogate pairs are JSON, but nothing that httpx would encode.
    answer = httpx.post(f"{served.url}{path}", content=json.dumps(body), headers={"Content-Type": "application/json"}, timeout=PATIENCE)
    error = answer.json()["error"]
    assert answer.status_code == status and says in error["message"] and "\n" not in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


def test_a_chat_template_that_refuses_a_dialogue_is_told(pico: Path, tmp_path: Path) -> None:
    folder = tmp_path / "choosy"
    shutil.copytree(pico, folder)
    (folder / "chat_template.jinja").write_text(
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}{{ messages[-1].content }}"
    )
    choosy = Engine(load_model(find_model(str(folder)), dtype="float32", format="native"))
    with run_server(choosy) as served:
        said = [{"role": "system", "content": "x"}, {"role": "user", "content": "x"}]
        answer = served.post("/v1/chat/completions", messages=said)
        assert answer.status_code == 400 and "chat template refuses this: no system role" in answer.json()["error"]["message"]
        assert served.post("/v1/chat/completions", messages=said[1:], max_tokens=2).status_code == 200


def test_an_error_that_quotes_half_a_surrogate_pair_can_be_sent() -> None:
    answer = guards.RefusedError(400, "it says \ud800").response()
    assert json.loads(bytes(answer.body))["error"]["message"] == "it says \\ud800"


def test_a_top_p_of_0_is_the_likeliest_token(served: Served) -> None:
    body = {"prompt": "Is fog wet?", "max_tokens": 12}
    greedy_text = served.post("/v1/completions", **body, temperature=0).json()["choices"][0]["text"]
    texts = [served.post("/v1/completions", **body, temperature=2, top_p=0).json()["choices"][0]["text"] for _ in range(3)]
    assert texts == [greedy_text] * 3
    assert served.post("/v1/completions", **body, temperature=2, seed=1).json()["choices"][0]["text"] != greedy_text


def test_a_body_that_is_no_json_or_too_large_is_refused(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = httpx.post(f"{served.url}/v1/completions", content=b"{", headers={"Content-Type": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"]["message"]
    answer = httpx.post(f"{served.url}/v1/completions", content=b"\xff\xfe", headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    monkeypatch.setattr(guards, "MAX_BODY", 1000)
    answer = served.post("/v1/completions", prompt="x" * 2000)
    assert answer.status_code == 413 and "larger than 1000 bytes" in answer.json()["error"]["message"]
    assert httpx.get(f"{served.url}/nothing").status_code == 404 and httpx.get(f"{served.url}/v1/score").status_code == 405


# Bodies that an answer does not wait for


def send_whole(url: str, size: int, **headers: str) -> tuple[http.client.HTTPResponse, dict[str, Any]]:
    """The answer to a body, and its error, for a client that does not look for an answer before the body is sent."""
    with contextlib.closing(http.client.HTTPConnection(url[7:], timeout=PATIENCE)) as client:
        client.request("POST", "/v1/score", b" " * size, {"Content-Type": "application/json", **headers})
        answer = client.getresponse()
        return answer, json.loads(answer.read())["error"]


def test_who_sends_far_too_much_gets_an_answer_to_read(served: Served) -> None:
    for _ in range(5):
        answer, error = send_whole(served.url, 32 * 2**20)  # more than both ends of a connection hold for each other
        assert answer.status == 413 and "larger than 4194304 bytes" in error["message"]
        assert answer.headers["Connection"] == "close"


def test_who_sends_much_with_a_wrong_key_gets_an_answer_to_read(engine: Engine) -> None:
    with run_server(engine, api_key="right") as served:
        for connection in ("close", "keep-alive"):
            answer, error = send_whole(served.url, 32 * 2**20, Authorization="Bearer wrong", Connection=connection)
            assert answer.status == 401 and error["code"] == "invalid_api_key"
            assert answer.headers["Connection"] == "close"  # nobody should have to read to the end of it


def test_an_answer_that_does_not_fit_yet_is_not_lost(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards, "MAX_BODY", 1000)
    before, size = 20, 4 * 2**20
    with contextlib.closing(socket.socket()) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)  # as little as there is: some of these answers fill it
        client.settimeout(PATIENCE)
        client.connect(("127.0.0.1", int(served.url.rsplit(":", 1)[1])))
        client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" * before)
        client.sendall(f"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Length: {size}\r\n\r\n".encode())
        with contextlib.suppress(ConnectionError):  # a client may go on and read: what was answered counts
            client.sendall(b" " * size)
        told = b"".join(iter(lambda: client.recv(2**16), b""))
    assert told.count(b'{"status":"ok"') == before
    head, body = told[told.index(b"HTTP/1.1 413") :].split(b"\r\n\r\n")
    assert f"content-length: {len(body)}" in head.decode().lower() and "larger than 1000 bytes" in json.loads(body)["error"]["message"]


def test_who_never_ends_a_body_has_the_answer_at_once_and_is_let_go(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards, "MAX_BODY", 1000)
    monkeypatch.setattr(guards, "LINGER", 0.5)
    with socket.create_connection(("127.0.0.1", int(served.url.rsplit(":", 1)[1])), timeout=PATIENCE) as client:
        client.sendall(b"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Length: 100000000\r\n\r\n" + b" " * 2000)
        lines = client.makefile("rb")
        head = dict(line.decode().lower().strip().split(": ") for line in iter(lines.readline, b"\r\n") if b": " in line)
        assert "larger than" in json.loads(lines.read(int(head["content-length"])))["error"]["message"]
        assert lines.read() == b""  # closed, although it sends nothing more


def test_a_connection_whose_body_was_read_stays_open(served: Served) -> None:
    with contextlib.closing(http.client.HTTPConnection(served.url[7:], timeout=PATIENCE)) as client:
        for method, path, body, status in (("POST", "/v1/score", b"{", 400), ("POST", "/health", b"", 405), ("GET", "/health", None, 200)):
            client.request(method, path, body, {"Content-Type": "application/json"})
            sock, answer = client.sock, client.getresponse()
            assert answer.status == status and answer.read() and "Connection" not in answer.headers
            assert client.sock is sock is not None


def test_special_tokens_in_a_text_are_text(served: Served) -> None:
    eos = served.engine.tokenizer.eos_token
    told = served.post("/v1/completions", prompt=eos, max_tokens=0, echo=True, logprobs=0).json()
    ids = served.engine.encoder.raw_ids(eos)
    assert told["usage"]["prompt_tokens"] == len(ids) > 1 and served.engine.tokenizer.eos_token_id not in ids


# Under stress


def test_a_client_that_goes_away_frees_its_slot(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    step = engine.step

    def slow(*args: Any) -> Any:
        time.sleep(0.02)
        return step(*args)

    monkeypatch.setattr(engine, "step", slow)
    with run_server(engine, limits=Limits(max_batch=1)) as served:
        for stream in (True, False):
            before = served.metric("mtllama_cancelled_total")
            body = {"prompt": "x", "max_tokens": 400, "temperature": 2, "seed": 1, "stream": stream, "logprobs": 0}
            with socket.create_connection(served.url[7:].split(":"), timeout=PATIENCE) as client:  # type: ignore[arg-type]
                text = json.dumps(body)
                client.sendall(
                    f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n{text}".encode()
                )
                wait_for(lambda: served.metric("mtllama_running") == 1)
            wait_for(lambda before=before: served.metric("mtllama_cancelled_total") == before + 1)  # type: ignore[misc]
            wait_for(lambda: served.metric("mtllama_running") == 0)
        assert served.post("/v1/completions", prompt="x", max_tokens=2).status_code == 200


def wait_for(true: Any) -> None:
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_full_queue_answers_429_and_says_when_to_come_again(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    step = engine.step

    def slow(*args: Any) -> Any:
        time.sleep(0.02)
        return step(*args)

    monkeypatch.setattr(engine, "step", slow)
    with run_server(engine, limits=Limits(max_batch=1, max_queue=1)) as served:

        async def ask() -> list[httpx.Response]:
            body = {"prompt": "x", "max_tokens": 30, "temperature": 1}
            async with httpx.AsyncClient(timeout=PATIENCE) as client:
                return await asyncio.gather(*(client.post(f"{served.url}/v1/completions", json=body) for _ in range(8)))

        answers = asyncio.run(ask())
        refused = [answer for answer in answers if answer.status_code == 429]
        assert refused and len(refused) + sum(answer.status_code == 200 for answer in answers) == 8
        assert all(answer.headers["retry-after"] == "1" and answer.json()["error"]["code"] == "queue_full" for answer in refused)


def test_only_the_key_opens_the_door(engine: Engine) -> None:
    with run_server(engine, api_key="a secret é") as served:
        assert httpx.get(f"{served.url}/health").json() == {"status": "ok", "model": "pico"}
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "a secret"}):
            answer = httpx.get(f"{served.url}/v1/models", headers=headers)
            assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
        right = {"Authorization": "Bearer a secret é".encode()}
        assert httpx.get(f"{served.url}/v1/models", headers=right).status_code == 200
        with pytest.raises(openai.AuthenticationError):
            served.client(api_key="wrong").models.list()


def test_counters_count(engine: Engine) -> None:
    with run_server(engine) as served:
        served.post("/v1/completions", prompt="one two", max_tokens=3, temperature=0)
        served.post("/v1/score", prompt="x", choices=["a", "b"])
        served.post("/v1/completions")
        text = httpx.get(f"{served.url}/metrics").text
        assert 'mtllama_requests_total{route="/v1/completions",status="200"} 1.0' in text
        assert 'mtllama_requests_total{route="/v1/completions",status="400"} 1.0' in text
        assert served.metric("mtllama_generated_tokens_total") == len(greedy(served, "one two", 3))
        assert served.metric("mtllama_scored_tokens_total") > 0 and served.metric("mtllama_first_token_seconds_count") == 1


def test_the_time_to_first_text_begins_where_the_request_comes_in(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    raw_ids = engine.encoder.raw_ids
    monkeypatch.setattr(engine.encoder, "raw_ids", lambda text: (time.sleep(0.3), raw_ids(text))[1])  # a long prompt takes its time
    with run_server(engine) as served:
        assert served.post("/v1/completions", prompt="x", max_tokens=1, temperature=0).status_code == 200
        assert served.metric("mtllama_first_token_seconds_sum") >= 0.3


@pytest.mark.parametrize("key", ["", "  "])
def test_an_empty_key_lets_nobody_in_unnoticed(engine: Engine, key: str) -> None:
    with bind("127.0.0.1", 0) as bound, pytest.raises(UserError, match="the API key is empty"):
        start(engine, bound, api_key=key)


@pytest.mark.parametrize("engine", ["mtllama", "vllm"])
def test_an_empty_host_or_key_is_told_before_anything_is_loaded(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def told(*words: str) -> str:
        return str(CliRunner().invoke(app, ["serve", "/no/model", "--engine", engine, *words]).exception)

    assert "--host is empty" in told("--host", "")
    assert "the API key (--api-key, MTLLAMA_API_KEY) is empty" in told("--api-key", "")
    monkeypatch.setenv("MTLLAMA_API_KEY", "")
    assert "the API key (--api-key, MTLLAMA_API_KEY) is empty" in told()
    assert "no model '/no/model'" in told("--api-key", "secret", "--port", "0")


def test_the_base_stands_beside_its_delta_only_where_that_costs_the_model_nothing(
    pico: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.serve._base_beside(None, "float32", None) is None
    beside = cli.serve._base_beside(str(pico), "float32", None)
    assert isinstance(beside, Engine) and not capsys.readouterr().err.count("does not show")
    monkeypatch.setattr(memory, "free_memory", lambda device: 1000)
    assert cli.serve._base_beside(str(pico), "float32", None) is None
    assert "the page does not show the base beside: " in (said := capsys.readouterr().err) and "does not fit into memory" in said
    assert cli.serve._base_beside("/no/model", "float32", None) is None and "no model '/no/model'" in capsys.readouterr().err


@pytest.mark.parametrize(("key", "said"), [("k\x00ey", "no header can carry"), ("ключ", "no header can carry"), (" \n", "is empty")])
def test_a_key_that_no_header_can_carry_is_told(key: str, said: str) -> None:
    assert said in str(CliRunner().invoke(app, ["serve", "/no/model", "--api-key", key]).exception)


def test_a_report_that_is_none_is_told_before_a_model_is_loaded(tmp_path: Path) -> None:
    assert "has no report.html" in str(CliRunner().invoke(app, ["serve", "/no/model", "--report", str(tmp_path)]).exception)


def test_lm_evals_results_over_this_server_are_the_offline_ones(served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`lm_eval --model local-completions` on multiple-choice questions, item by item, beside the same task on the engine."""
    pytest.importorskip("lm_eval")
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from mtllama.evaluate import harness

    rows = load_rows(catalog()["openbookqa"], sampler_dir()).rows[:40]
    items = [{"question": row["question_stem"], "options": row["choices"]["text"], "gold": "ABCD".index(row["answerKey"])} for row in rows]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    task = {
        "task": "questions",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "options",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    (tmp_path / "questions.yaml").write_text(json.dumps(task), encoding="utf-8")
    monkeypatch.setattr(harness, "simple_evaluate", functools.partial(simple_evaluate, bootstrap_iters=10))
    offline = harness.run_harness(served.engine, ["questions"], out=tmp_path / "offline", include=tmp_path)
    arguments = (
        f"base_url={served.url}/v1/completions,model=pico,tokenizer={served.engine.loaded.source.files},num_concurrent=4,max_length=500"
    )
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    online = simple_evaluate("local-completions", model_args=arguments, tasks=["questions"], task_manager=manager, bootstrap_iters=10)
    assert online is not None
    for metric in ("acc,none", "acc_norm,none"):
        assert online["results"]["questions"][metric] == offline["results"]["questions"][metric]
    (file,) = (tmp_path / "offline").rglob("samples_questions_*.jsonl")
    theirs = {line["doc_id"]: line["filtered_resps"] for line in map(json.loads, file.read_text(encoding="utf-8").splitlines())}
    ours = {sample["doc_id"]: sample["filtered_resps"] for sample in online["samples"]["questions"]}
    assert ours.keys() == theirs.keys() and len(ours) == 40
    for number, answers in ours.items():
        assert len(answers) == 4
        for (logprob, greedy), (expected, expected_greedy) in zip(answers, theirs[number], strict=True):
            assert float(logprob) == pytest.approx(float(expected), abs=1e-3) and str(greedy) == str(expected_greedy)


def test_an_evaluation_over_this_server_gives_the_engine_s_numbers(served: Served) -> None:
    source = served.engine.loaded.source
    there = Endpoint(f"{served.url}/v1", source, model="pico", format=served.engine.loaded.format.name)
    prompts = [served.engine.encoder.whole_prompt_ids(text) for text in ("Is fog wet?", "One", "Name a colour.")]
    answers = [served.engine.encoder.answer_ids(text) for text in ("Yes", "No", "It depends")]
    cut, was_cut = there.encoder.prompt_ids("word " * 600, room=max(map(len, answers)))
    assert was_cut
    items = [api.Branches(prompt, answers) for prompt in (*prompts, cut)]
    for ours, theirs in zip(there.score(items), served.engine.score(items), strict=True):
        for mine, other in zip(ours, theirs, strict=True):
            assert mine == pytest.approx(other, abs=1e-4)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_server_and_what_runs_is_finished(pico: Path, tmp_path: Path, number: int) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", SLOW, "serve", str(pico), "--port", str(port), "--no-page", "--dtype", "float32"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for(lambda: (tmp_path / "log").read_text().count(url))
        body = {"prompt": "Once", "max_tokens": 60, "temperature": 2, "seed": 1, "stream": True, "logprobs": 0}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=PATIENCE) as answer:
            lines = answer.iter_lines()
            events = [next(lines)]
            process.send_signal(number)
            events += [line for line in lines if line]
        assert events[-1] == "data: [DONE]" and json.loads(events[-2][6:])["choices"][0]["finish_reason"] in ("stop", "length")
        assert process.wait(PATIENCE) == 0
    finally:
        process.kill()
        process.wait()
    told = (tmp_path / "log").read_text()
    assert "Traceback" not in told and url in told.splitlines()[-1], told
