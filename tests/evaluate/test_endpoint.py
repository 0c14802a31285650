"""A model behind HTTP is measured as the same model here, also where the server is busy or fails now and then."""

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from mtllama.cli import app
from mtllama.errors import UserError
from mtllama.evaluate import endpoint as endpoints
from mtllama.evaluate import runner
from mtllama.evaluate.endpoint import Endpoint
from mtllama.evaluate.items import EvalConfig
from mtllama.evaluate.runner import RECORDS, evaluate
from mtllama.model.engine import Branches, Engine
from mtllama.model.find import find_model
from mtllama.model.load import load_model


class Server(ThreadingHTTPServer):
    """A completions server over transformers' own model: what a prompt's tokens cost, and greedy text. Not our engine."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = find_model(str(folder)) and load_model(find_model(str(folder)), dtype="float32").tokenizer
        self.lock, self.seen = threading.Lock(), 0
        self.fail: dict[int, tuple[int, str]] = {}
        """Requests (by number) that are answered by this status and text."""
        self.echoes, self.models, self.keys = True, ["pico"], set[str]()
        self.root = "/models/pico"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    @torch.inference_mode()
    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        ids = torch.tensor([body["prompt"]])
        with self.lock:
            if body.get("echo"):
                scores = self.model(ids).logits[0].log_softmax(-1)
                given = [None, *scores[:-1].gather(1, ids[0, 1:, None])[:, 0].tolist(), 0.0]
                return {"text": "", "logprobs": {"token_logprobs": given if self.echoes else given[-1:]}}
            new = self.model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=body["max_tokens"], pad_token_id=0
            )
            new = new[0, ids.shape[1] :]
            ended = int(new[-1]) == self.tokenizer.eos_token_id
            return {"text": self.tokenizer.decode(new, skip_special_tokens=True), "finish_reason": "stop" if ended else "length"}


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *rest: Any) -> None:
        pass

    def reply(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Retry-After", "0.01")
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def do_GET(self) -> None:
        self.server.keys.add(self.headers.get("Authorization", ""))
        entries = [{"id": name, "created": time.time_ns(), "root": self.server.root} for name in self.server.models]
        self.reply(200, json.dumps({"data": entries}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.seen += 1
            failure = self.server.fail.get(self.server.seen)
        if body["max_tokens"] < 1 or len(body["prompt"]) + body["max_tokens"] > self.server.model.config.max_position_embeddings:
            failure = (400, "at least one token must be asked for, and fit")  # as with vLLM
        if failure:
            return self.reply(*failure)
        self.reply(200, json.dumps({"choices": [self.server.complete(body)]}))


@pytest.fixture
def server(pico: Path) -> Iterator[Server]:
    with Server(pico) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()


CONFIG = EvalConfig(tasks=("copa", "squad"), limit=6, protocols=("all",))


def test_the_same_model_here_and_behind_http_gives_the_same_results(server: Server, pico: Path, tmp_path: Path) -> None:
    server.fail = {3: (503, "busy"), 5: (429, "too many"), 9: (500, "fault")}
    here = evaluate(Engine(load_model(find_model(str(pico)), dtype="float32")), CONFIG, tmp_path / "here")
    there = evaluate(Endpoint(server.url, find_model(str(pico), weights=False)), CONFIG, tmp_path / "there")
    assert server.seen > 20 and len(here["tasks"]["copa"]) > 5
    for task, by_protocol in here["tasks"].items():
        for protocol, result in by_protocol.items():
            assert there["tasks"][task][protocol]["value"] == result["value"], (task, protocol)
    ours, theirs = ((tmp_path / name / RECORDS).read_text(encoding="utf-8").splitlines() for name in ("there", "here"))
    assert len(ours) == len(theirs) > 12
    for one, other in zip(map(json.loads, ours), map(json.loads, theirs), strict=True):
        assert one["prompt_ids"] == other["prompt_ids"] and one.get("text") == other.get("text")
        assert one.get("at_limit") == other.get("at_limit")
        for mine, reference in zip(one.get("logprobs") or [], other.get("logprobs") or [], strict=True):
            assert mine == pytest.approx(reference, abs=1e-4)
    assert there["model"]["name"] == f"pico ({server.url})" and there["dtype"] == "served"


def test_scores_and_advances_are_in_the_order_of_the_items(server: Server, pico: Path) -> None:
    engine, remote = Engine(load_model(find_model(str(pico)), dtype="float32")), Endpoint(server.url, find_model(str(pico)))
    items = [Branches([5, 6, 7], [[8], [9, 10]]), Branches([11], [[12, 13, 14]]), Branches([3, 4], [[5], [6], [7, 8]])]
    told: list[int] = []
    ours, theirs = remote.score(items, told.append), engine.score(items)
    assert told == [1, 1, 1]
    for one, other in zip(ours, theirs, strict=True):
        for mine, reference in zip(one, other, strict=True):
            assert mine == pytest.approx(reference, abs=1e-4)


def test_a_prompt_that_was_cut_is_scored_and_continued_and_one_that_was_not_is_as_with_the_engine(server: Server, pico: Path) -> None:
    engine, remote = Engine(load_model(find_model(str(pico)), dtype="float32")), Endpoint(server.url, find_model(str(pico)))
    answers = [engine.encoder.answer_ids(text) for text in ("Yes", "It depends on the fog")]
    room, length = max(map(len, answers)), engine.encoder.max_length
    ids, cut = remote.encoder.prompt_ids("word " * 400, room=room)
    assert cut and len(ids) + room == length - 1
    items = [Branches(ids, answers), Branches(remote.encoder.prompt_ids("short", room=room)[0], answers)]
    assert items[1].prompt == engine.encoder.prompt_ids("short", room=room)[0]
    for one, other in zip(remote.score(items), engine.score(items), strict=True):
        for mine, reference in zip(one, other, strict=True):
            assert mine == pytest.approx(reference, abs=1e-4)
    prompts = [remote.encoder.prompt_ids("word " * 400, room=8)[0]]
    assert [said.text for said in remote.answer(prompts, max_new_tokens=8)] == engine.generate(prompts, max_new_tokens=8)


def test_what_cannot_be_had_is_told_in_one_line(server: Server, pico: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoints, "LONGEST_WAIT", 0.01)
    source, item = find_model(str(pico)), [Branches([1], [[2, 3]])]
    remote = Endpoint(server.url, source)
    server.fail = {1: (400, "prompt too\nlong")}
    with pytest.raises(UserError, match=r"completions: status 400 \(prompt too long\)$"):
        remote.score(item)
    server.fail = {number: (503, "down") for number in range(1, 99)}
    with pytest.raises(UserError, match=r"status 503 \(down\), 6 times; is the server up\?"):
        remote.score(item)
    server.fail, server.echoes = {}, False
    with pytest.raises(UserError, match="so it cannot rank; pass --protocol generate"):
        remote.score(item)
    assert len(remote.answer([[1, 2, 3]])) == 1
    server.models = ["one", "two"]
    with pytest.raises(UserError, match="serves one, two; choose one with --served-model"):
        Endpoint(server.url, source)
    with pytest.raises(UserError, match="does not serve 'three'"):
        Endpoint(server.url, source, model="three")
    assert Endpoint(server.url, source, model="two").model == "two"
    with pytest.raises(UserError, match="no answer"):
        Endpoint("http://127.0.0.1:9/v1", source)


@pytest.mark.parametrize(("echoes", "protocol"), [(True, "rank"), (False, "generate")])
def test_another_model_behind_the_same_name_does_not_go_on_with_a_run(
    server: Server, pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, echoes: bool, protocol: str
) -> None:
    config, server.echoes = EvalConfig(tasks=("copa",), limit=6, protocols=(protocol,)), echoes
    monkeypatch.setattr(runner, "BLOCK", 2)
    monkeypatch.setattr(endpoints, "LONGEST_WAIT", 0.01)

    def begin() -> None:
        evaluate(Endpoint(server.url, find_model(str(pico), weights=False)), config, tmp_path / "run")

    server.fail = {number: (400, "killed") for number in range(6, 99)}
    with pytest.raises(UserError, match="killed"):
        begin()
    asked = len((tmp_path / "run.partial" / RECORDS).read_text(encoding="utf-8").splitlines())
    assert 0 < asked < 6
    server.fail, server.root = {}, "/models/other"
    with pytest.raises(UserError, match="another model "):
        begin()
    server.root = "/models/pico"
    weights, noise = server.model.state_dict(), torch.Generator().manual_seed(1)
    own = {name: tensor.clone() for name, tensor in weights.items()}
    for tensor in weights.values():
        tensor += 0.05 * torch.randn(tensor.shape, generator=noise)
    with pytest.raises(UserError, match="another fingerprint "):
        begin()
    for name, tensor in weights.items():  # the same model, as another machine computes it
        tensor.copy_(own[name] * (1 + 1e-4 * torch.randn(tensor.shape, generator=noise)))
    begin()
    assert (tmp_path / "run" / RECORDS).is_file()


def test_the_command_asks_the_endpoint_and_sends_the_key(
    server: Server, pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(endpoints.KEY, "secret")
    words = ["eval", str(pico), "--endpoint", server.url, "--tasks", "copa", "--limit", "4", "--protocol", "rank"]
    done = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    assert server.keys == {"Bearer secret"} and "copa" in done.stdout and server.seen == 8 + 1  # and the fingerprint
    assert "secret" not in (tmp_path / "run" / "results.json").read_text(encoding="utf-8")
    wrong = CliRunner().invoke(app, [*words, "--self-test"])
    assert isinstance(wrong.exception, UserError) and "--endpoint" in str(wrong.exception)
