"""Requests made from the app's own OpenAPI document, and bodies that follow no document: no answer is a 5xx."""

from __future__ import annotations

import json

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

schemathesis = pytest.importorskip("schemathesis", reason="the fuzzer is installed with fluxc[test]")

CALM = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None, "derandomize": True}
STATUSES = {200, 400, 401, 404, 405, 408, 413, 422, 429}
ROUTES = ("/v1/completions", "/v1/chat/completions")

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=30),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)
parameters = st.sampled_from(
    (
        *("prompt", "messages", "model", "n", "stop", "seed", "stream", "max_tokens", "temperature", "top_p", "top_k"),
        *("min_p", "budget", "logprobs", "top_logprobs", "stream_options", "logit_bias", "min_tokens", "user", "tools"),
        *("repetition_penalty", "ignore_eos"),
    )
)


@pytest.fixture(scope="module")
def app(serving):
    """A client of one server for all requests: what one of them breaks, the next ones notice."""
    with serving(max_new_tokens=6, max_choices=4) as (url, server), httpx.Client(base_url=url, timeout=60) as client:
        yield client
        status = server._service.engine.status
        assert (status.running, status.waiting, server._service.gate.inside) == (0, 0, 0)


@pytest.fixture(scope="module")
def operations(app):
    """The operations of the app's own document."""
    document = schemathesis.openapi.from_url(f"{app.base_url}/openapi.json")
    return {operation.ok().label: operation.ok() for operation in document.get_all_operations()}


def reached(body):
    """The body, so changed that it reaches the engine."""
    if isinstance(body, dict):
        body = {**body, "model": "toy"}
        for name in ("max_tokens", "max_completion_tokens"):
            if isinstance(body.get(name), int) and body[name] > 6:
                body[name] = 3
    return body


def fuzz(operation, examples: int) -> set[int]:
    """Requests that fit the document, and ones that almost do: the statuses of their answers."""
    modes, statuses = list(schemathesis.GenerationMode), set()

    @settings(max_examples=examples, **CALM)
    @given(st.one_of(*(operation.as_strategy(generation_mode=mode) for mode in modes)))
    def run(case):
        case.body = reached(case.body)
        statuses.add(check(case))

    run()
    return statuses


def check(case) -> int:
    found = case.call()
    assert found.status_code in STATUSES, found.text
    if found.status_code >= 400 and case.operation.path.startswith("/v1"):
        assert set(found.json()["error"]) == {"message", "type", "param", "code"}
    elif "text/event-stream" in found.headers["content-type"][0]:
        assert '"error"' not in found.text and found.text.endswith("data: [DONE]\n\n")
    elif found.status_code == 200:
        case.operation.validate_response(found)
    return found.status_code


LABELS = ("GET /health", "GET /metrics", "GET /v1/models", "GET /v1/models/{model_id}", *(f"POST {r}" for r in ROUTES))


def test_the_document_has_all_routes(operations):
    assert sorted(operations) == sorted(LABELS)


@pytest.mark.parametrize("label", LABELS)
def test_requests_of_the_document(operations, label):
    statuses = fuzz(operations[label], 25 if label.startswith("POST") else 5)
    assert not label.startswith("POST") or {200, 400} <= statuses


@pytest.mark.slow
@pytest.mark.parametrize("label", LABELS)
def test_many_requests_of_the_document(operations, label):
    fuzz(operations[label], 1000)


def send(app, route: str, content: bytes) -> None:
    found = app.post(route, content=content, headers={"content-type": "application/json"})
    assert found.status_code in STATUSES, (content, found.text)


@settings(max_examples=60, **CALM)
@given(st.sampled_from(ROUTES), st.dictionaries(parameters, json_values, max_size=6))
def test_parameters_of_any_value(app, route, body):
    whole = {"model": "toy", "prompt": "a", "max_tokens": 2, **body}
    if route == ROUTES[1]:
        whole = {"messages": [{"role": "user", "content": "a"}], **whole}
        del whole["prompt"]
    send(app, route, json.dumps(whole).encode())


@settings(max_examples=40, **CALM)
@given(st.sampled_from(ROUTES), st.binary(max_size=200) | json_values.map(lambda value: json.dumps(value).encode()))
def test_bodies_of_any_kind(app, route, content):
    send(app, route, content)


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b"",
        b"null",
        b"\xff\xfe",
        b'{"model":"toy","prompt":"a","seed":' + b"9" * 5000 + b"}",
        b'{"model":"toy","prompt":"a","temperature":1e400}',
        b'{"model":"toy","prompt":"a","budget":NaN}',
        b'{"model":"toy","prompt":"\\ud800"}',
        b'{"model":"\\ud800","prompt":"a"}',
        b'{"model":"toy","prompt":"a","\\ud800":1}',
        b'{"model":"toy","prompt":"a\\u0000b","max_tokens":2}',
        b'{"model":"toy","prompt":"a","stop":["\\ud83d"],"max_tokens":2}',
        b'{"model":"toy","prompt":"a","temperature":1e-300,"max_tokens":2}',
        b'{"model":"toy","prompt":"a","repetition_penalty":0.1,"max_tokens":2}',
    ],
)
def test_known_traps(app, content):
    send(app, "/v1/completions", content)
