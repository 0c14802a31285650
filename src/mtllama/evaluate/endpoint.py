"""A model behind an OpenAI-compatible completions route (vLLM's, for one), asked as an engine is asked: the way to many GPUs.

Prompts go over as token ids, made here by the tokenizer that MODEL names, so that what is scored is the same as with our own
engine. Scoring needs a server that echoes a prompt with its log-probabilities (`echo`, `logprobs`), as vLLM does.
"""

import itertools
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any, TypeVar

import requests

from mtllama.data.prompt import DEFAULT_FORMAT, PromptEncoder, find_format
from mtllama.errors import UserError
from mtllama.model.engine import Branches, Said, before_stop
from mtllama.model.find import ModelFolder, load_tokenizer

CONCURRENCY = 32
"""Requests that are on their way at a time: a server with a running batch needs many to be busy."""
TRIES = 6
"""How often a request is made that fails for a reason that may pass: no connection, too many requests, a fault of the server."""
LONGEST_WAIT = 30.0
TIMEOUT = (10.0, 600.0)
"""Seconds to connect, and to wait for an answer: a queue may be long."""
KEY = "OPENAI_API_KEY"
"""Where in the environment the key is, if the server wants one."""

STABLE = ("root", "parent", "owned_by", "max_model_len")
"""What servers say of a model that is the same whenever they are asked; vLLM's `created` is the time of the question."""
PROBE = "The ferry leaves the harbour at noon. Twelve and seven make nineteen. In Paris, people speak French."
"""A text whose tokens tell models apart."""

T = TypeVar("T")


class Endpoint:
    """The part of `Engine` that an evaluation needs, over HTTP. Raises `UserError`, one line, for what cannot be had."""

    def __init__(self, url: str, source: ModelFolder, *, model: str | None = None, format: str | None = None) -> None:
        """`url`: up to and with `/v1`; `source`: config and tokenizer; `model`: the name that the server has for it, if it has several."""
        from transformers import AutoConfig

        self.url = url.rstrip("/")
        self._source, self._local = source, threading.local()
        self.tokenizer = load_tokenizer(source.files)
        length = int(getattr(AutoConfig.from_pretrained(source.files, local_files_only=True), "max_position_embeddings", 2048))
        # A server that scores wants to generate, too (vLLM: one token at least), so what is cut must leave room for one token more.
        self.encoder = PromptEncoder(self.tokenizer, find_format(format or source.own_format() or DEFAULT_FORMAT), length - 1)
        entries = {str(each["id"]): each for each in self._ask("GET", "models").get("data", [])}
        served = list(entries)
        if model is None and len(served) != 1:
            raise UserError(f"{self.url} serves {', '.join(served) or 'no model'}; choose one with --served-model")
        if model is not None and model not in served:
            raise UserError(f"{self.url} does not serve {model!r}; it has {', '.join(served) or 'no model'}")
        self.model = model or served[0]
        self.said = {key: value for key in STABLE if isinstance(value := entries[self.model].get(key), str | int)}
        """What the server says of it."""

    @cached_property
    def fingerprint(self) -> list[float] | str:
        """What tells another model behind the same name: the log-probabilities of a fixed text, or greedy text where there are none."""
        ids = list(self.tokenizer(PROBE).input_ids)
        try:
            return [round(value, 2) for value in self.score([Branches(ids[:1], [ids[1:]])])[0][0]]
        except UserError:  # it may be one that generates only; if it is down, the next request says so
            return self.answer([ids], max_new_tokens=24, stop=())[0].text

    def describe(self) -> dict[str, Any]:
        """Facts for results; what weights a server has, it does not say, so its model is known by its answers, too."""
        return {
            "name": f"{self.model} ({self.url})",
            "folder": str(self._source.files),
            "delta": None,
            "parameters": None,
            "weights_sha256": " ".join([self.url, self.model, *(f"{key}={value}" for key, value in self.said.items())]),
            "fingerprint": self.fingerprint,
            "recipe": None,
            "dtype": "served",
        }

    def score(self, items: Sequence[Branches], advance: Callable[[int], None] = lambda n: None) -> list[list[list[float]]]:
        """As `Engine.score`: a request for every answer; a server that caches prefixes computes a prompt once."""
        pairs = [(item.prompt, answer) for item in items for answer in item.answers]
        last = {end - 1 for end in itertools.accumulate(len(item.answers) for item in items)}
        found = iter(self._all(self._log_probs, pairs, lambda number: advance(1) if number in last else None))
        return [[next(found) for _ in item.answers] for item in items]

    def _log_probs(self, pair: tuple[list[int], list[int]]) -> list[float]:
        prompt, answer = pair
        choice = self._complete(prompt + answer, max_tokens=1, echo=True, logprobs=1)
        given = (choice.get("logprobs") or {}).get("token_logprobs") or []
        if len(given) < len(prompt) + len(answer):
            raise UserError(
                f"{self.url} gives no log-probabilities of a prompt (echo with logprobs: {len(given)} for {len(prompt) + len(answer)} tokens), "
                "so it cannot rank; pass --protocol generate, or serve with one that does, such as vLLM"
            )
        return [float(value) for value in given[len(prompt) : len(prompt) + len(answer)]]

    def answer(
        self,
        prompts: Sequence[list[int]],
        *,
        max_new_tokens: int = 64,
        stop: Sequence[str] = ("\n",),
        advance: Callable[[int], None] = lambda n: None,
    ) -> list[Said]:
        """As `Engine.answer`: greedy, cut before the first stop string behind the first word."""

        def said(prompt: list[int]) -> Said:
            # Stop strings are looked for here: a server would stop at one before the first word, too.
            found = self._complete(prompt, max_tokens=max_new_tokens)
            whole = str(found.get("text", "")).rstrip("\N{REPLACEMENT CHARACTER}").strip()
            text = before_stop(whole, stop)
            return Said(text, found.get("finish_reason") == "length" and text == whole)

        return self._all(said, prompts, lambda number: advance(1))

    def _complete(self, prompt: list[int], **options: Any) -> dict[str, Any]:
        body = {"model": self.model, "prompt": prompt, "temperature": 0, "seed": 0, **options}
        choices = self._ask("POST", "completions", body).get("choices")
        if not choices:
            raise UserError(f"{self.url}/completions answered without choices; is it a completions server?")
        return dict(choices[0])

    def _all(self, call: Callable[[Any], T], values: Sequence[Any], done: Callable[[int], None]) -> list[T]:
        """The calls' results in order, many at a time; the first that fails ends all."""
        results = []
        with ThreadPoolExecutor(CONCURRENCY) as pool:
            futures = [pool.submit(call, value) for value in values]
            try:
                for number, future in enumerate(futures):
                    results.append(future.result())
                    done(number)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return results

    def _ask(self, method: str, route: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """One request, made again where what is wrong may pass."""
        where = f"{self.url}/{route}"
        for number in range(TRIES):
            wait = min(0.5 * 2**number, LONGEST_WAIT)
            try:
                answer = self._session().request(method, where, json=body, timeout=TIMEOUT)
            except requests.RequestException as error:
                why = f"no answer ({' '.join(str(error).split())[:120]})"
            else:
                if answer.ok:
                    return self._json(answer, where)
                why = f"status {answer.status_code} ({' '.join(answer.text.split())[:160]})"
                if answer.status_code != 429 and answer.status_code < 500:
                    raise UserError(f"{where}: {why}")
                asked = answer.headers.get("Retry-After", "")
                wait = min(float(asked), LONGEST_WAIT) if asked.replace(".", "", 1).isdigit() else wait
            if number + 1 < TRIES:
                time.sleep(wait)
        raise UserError(f"{where}: {why}, {TRIES} times; is the server up? What was answered is kept: the same command goes on")

    @staticmethod
    def _json(answer: requests.Response, where: str) -> dict[str, Any]:
        try:
            found = answer.json()
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise UserError(f"{where}: the answer is no JSON object; give the URL up to /v1, as in http://127.0.0.1:8000/v1")
        return found

    def _session(self) -> requests.Session:
        """A connection for each thread: a session is not made to be shared."""
        if not hasattr(self._local, "session"):
            self._local.session = requests.Session()
            if key := os.environ.get(KEY):
                self._local.session.headers["Authorization"] = f"Bearer {key}"
        session: requests.Session = self._local.session
        return session
