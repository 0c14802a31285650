"""Requests of every shape that the server's own description allows, and of many that it does not: none is a fault of the server."""

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import Case, GenerationMode
from served import Served

ROUTES = 9


MODES = [GenerationMode.POSITIVE, GenerationMode.NEGATIVE]


@pytest.mark.parametrize("mode", MODES)
def test_no_request_is_a_fault_of_the_server(served: Served, mode: GenerationMode) -> None:
    fuzz(served, mode, 200)


@pytest.mark.soak
def test_no_request_of_ten_thousand_is_a_fault_of_the_server(served: Served) -> None:
    assert sum(fuzz(served, mode, 6000) for mode in MODES) >= 10_000


def fuzz(served: Served, mode: GenerationMode, wanted: int) -> int:
    """Send so many requests to the routes that take a body, and some to the others; returns how many were answered."""
    schema = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) == ROUTES
    answers: dict[int, int] = {}
    posted = [each for each in operations if each.method.lower() == "post"]
    for operation in operations:
        count = wanted // len(posted) if operation in posted else 5

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate], database=None)
        def ask(case: Case) -> None:
            response = case.call()
            answers[response.status_code] = answers.get(response.status_code, 0) + 1
            assert response.status_code < 500, (case.as_curl_command(), response.text[:300])
            # An error in a stream comes behind a status of 200.
            assert '"type": "server_error"' not in response.text, (case.as_curl_command(), response.text[-300:])
            if response.status_code >= 400:
                assert set(response.json()["error"]) == {"message", "type", "param", "code"}

        try:
            ask()
        except Exception as error:  # a route without fields has nothing that could be wrong
            if mode is GenerationMode.POSITIVE or operation in posted or "Unsatisfiable" not in type(error).__name__:
                raise
    assert sum(answers.values()) >= wanted * 5 // 6, answers  # a generator that has nothing new to say ends early
    if mode is GenerationMode.NEGATIVE:
        assert answers[400] > wanted // 5, answers
    else:
        assert answers[200] >= ROUTES, answers
    assert httpx.get(f"{served.url}/health").json()["status"] == "ok" and served.metric("mtllama_running") == 0
    assert served.post("/v1/completions", prompt="x", max_tokens=2).status_code == 200
    return sum(answers.values())
