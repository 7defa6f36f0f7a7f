"""The app in process: answers are the engine's, and what cannot be answered is said in OpenAI's way."""

from __future__ import annotations

import json

import pytest

MESSAGES = [{"role": "user", "content": "Where is the key?"}]
PROMPT = "The key is in the"


def events(response) -> list[dict]:
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def complete(client, **body):
    return client.post("/v1/completions", json={"model": "toy", "prompt": PROMPT, "temperature": 0, **body})


def chat(client, session=None, **body):
    headers = {"x-session-id": session} if session else {}
    whole = {"model": "toy", "messages": MESSAGES, "temperature": 0, **body}
    return client.post("/v1/chat/completions", json=whole, headers=headers)


@pytest.fixture
def alone(make_engine):
    """What the engine itself answers."""
    with make_engine() as engine:
        yield lambda prompt, **options: engine.generate(prompt, **options)


def test_a_completion_is_the_engines_answer(client, alone):
    want = alone(PROMPT, max_new_tokens=12, budget=0.3)
    found = complete(client(), max_tokens=12, budget=0.3).json()
    assert found["choices"][0]["text"] == want.text and want.text
    assert found["choices"][0]["finish_reason"] == want.finish_reason
    assert found["usage"] == {
        "prompt_tokens": want.prompt_tokens,
        "completion_tokens": len(want.tokens),
        "total_tokens": want.prompt_tokens + len(want.tokens),
    }
    assert found["fluxc"]["routes"] == want.routes.tolist() and found["fluxc"]["budget"] == 0.3
    assert found["fluxc"]["sparse_ratio"] == want.sparse_ratio
    assert found["fluxc"]["kv_bytes"]["measured"] == want.kv_bytes.measured
    assert found["fluxc"]["timings"]["first_token"] > 0


def test_a_chat_goes_through_the_template(client, alone):
    want = alone(MESSAGES, max_new_tokens=9)
    found = chat(client(), max_completion_tokens=9).json()
    assert found["choices"][0]["message"] == {"role": "assistant", "content": want.text, "refusal": None}
    parts = [{"role": "user", "content": [{"type": "text", "text": "Where is "}, {"type": "text", "text": "the key?"}]}]
    assert chat(client(), messages=parts, max_tokens=9).json()["choices"][0]["message"]["content"] == want.text


@pytest.mark.parametrize("ask", [complete, chat])
def test_a_stream_says_the_same_as_the_whole(client, ask):
    app, options = client(), {"max_tokens": 12, "temperature": 1, "seed": 5, "n": 2, "stop": ["e"]}
    whole = ask(app, **options).json()
    parts = events(ask(app, **options, stream=True, stream_options={"include_usage": True}))
    assert parts[-1]["usage"] == whole["usage"] and parts[-1]["choices"] == []
    for choice in whole["choices"]:
        own = [part for part in parts if part["choices"] and part["choices"][0]["index"] == choice["index"]]
        texts = [part["choices"][0].get("text", part["choices"][0].get("delta", {}).get("content")) for part in own]
        assert "".join(text or "" for text in texts) == choice.get("text", choice.get("message", {}).get("content"))
        assert own[-1]["choices"][0]["finish_reason"] == choice["finish_reason"]
        assert own[-1]["fluxc"]["routes"] == choice["fluxc"]["routes"]


def test_a_seed_draws_the_same_and_each_of_n_draws_its_own(client):
    app, options = client(), {"max_tokens": 8, "temperature": 1, "seed": 3, "n": 3}
    first, second = (complete(app, **options).json()["choices"] for _ in range(2))
    assert [choice["text"] for choice in first] == [choice["text"] for choice in second]
    assert len({choice["text"] for choice in first}) == 3
    assert complete(app, **{**options, "seed": 4}).json()["choices"][0]["text"] == first[1]["text"]
    assert complete(app, **{**options, "seed": -3}).status_code == 200


def test_a_stop_string_ends_the_answer_before_itself(client):
    app = client()
    free = complete(app, max_tokens=24, ignore_eos=True).json()["choices"][0]["text"]
    stop = free[5:8]
    found = complete(app, max_tokens=24, ignore_eos=True, stop=[stop, "never there"]).json()
    assert found["choices"][0]["text"] == free[: free.find(stop)]
    assert found["choices"][0]["finish_reason"] == "stop"
    assert found["usage"]["completion_tokens"] < 24


def test_several_prompts_and_token_ids(client, tokenizer):
    app, ids = client(), tokenizer(PROMPT)["input_ids"]
    alone = complete(app, max_tokens=5).json()
    found = complete(app, prompt=[ids, tokenizer("Yes")["input_ids"], ids], max_tokens=5, n=2).json()
    assert [choice["index"] for choice in found["choices"]] == list(range(6))
    assert {found["choices"][at]["text"] for at in (0, 1, 4, 5)} == {alone["choices"][0]["text"]}
    assert found["usage"]["prompt_tokens"] == 2 * len(ids) + len(tokenizer("Yes")["input_ids"])


def test_logprobs_are_those_of_the_model(client, alone):
    found = complete(client(), max_tokens=6, logprobs=3).json()["choices"][0]["logprobs"]
    assert len(found["tokens"]) == len(found["token_logprobs"]) == len(found["text_offset"]) == 6
    for value, top in zip(found["token_logprobs"], found["top_logprobs"], strict=True):
        assert value == max(top.values()) and -20 < value < 0
    content = chat(client(), max_tokens=4, logprobs=True, top_logprobs=2).json()["choices"][0]["logprobs"]["content"]
    assert [len(token["top_logprobs"]) for token in content] == [2] * 4
    assert all(bytes(token["bytes"]).decode() == token["token"] for token in content if token["bytes"] is not None)


def test_models_health_and_metrics(client):
    app = client(name="mine")
    assert [model["id"] for model in app.get("/v1/models").json()["data"]] == ["mine"]
    assert app.get("/v1/models/mine").json()["object"] == "model"
    assert app.get("/v1/models/other").status_code == 404
    state = {"status": "ok", "running": 0, "waiting": 0, "server": app.app.state.service.id}
    assert app.get("/health").json() == state
    complete(app, model="mine", max_tokens=7, ignore_eos=True)
    text = app.get("/metrics").text
    for line in (
        'fluxc_requests_total{path="/v1/completions",status="200"} 1.0',
        'fluxc_tokens_total{kind="answer"} 7.0',
        "fluxc_kv_used_bytes 0.0",
        "fluxc_queue 0.0",
        "fluxc_time_to_first_token_seconds_count 1.0",
        "fluxc_crossover_tokens",
        "fluxc_sparse_ratio_count 1.0",
        "fluxc_kv_free_bytes",
    ):
        assert line in text


BAD = {
    "unknown model": ({"model": "other"}, 404, "model", "does not exist"),
    "budget": ({"budget": 1.5}, 400, "budget", "outside 0..1"),
    "long prompt": ({"prompt": "word " * 500}, 400, None, f"context of {200}"),
    "empty prompt": ({"prompt": ""}, 400, None, "no tokens"),
    "no prompt": ({"prompt": []}, 400, "prompt", "empty"),
    "unknown": ({"nonsense": 1}, 400, "nonsense", "nonsense is not supported"),
    "unsupported": ({"logit_bias": {"5": 1}}, 400, "logit_bias", "logit_bias is not supported"),
    "penalty": ({"presence_penalty": 0.5}, 400, "presence_penalty", "presence_penalty is not supported"),
    "echo": ({"echo": True}, 400, "echo", "echo is not supported"),
    "temperature": ({"temperature": -1}, 400, "temperature", "greater than or equal to 0"),
    "tokens": ({"max_tokens": 0}, 400, "max_tokens", "greater than or equal to 1"),
    "vocabulary": ({"prompt": [3, 10**6]}, 400, None, "outside the model's vocabulary"),
    "too many": ({"n": 17}, 400, "n", "limit of 16"),
    "surrogate": ({"prompt": "\ud800"}, 400, None, "surrogate"),
    "stream options": ({"stream_options": {"include_usage": True}}, 400, None, "stream=true"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_requests_are_named(client, name):
    body, status, param, text = BAD[name]
    given = json.dumps({"model": "toy", "prompt": PROMPT, **body})
    found = client().post("/v1/completions", content=given, headers={"content-type": "application/json"})
    error = found.json()["error"]
    assert (found.status_code, error["param"]) == (status, param)
    assert text in error["message"] and error["type"] == "invalid_request_error"


def test_neutral_values_of_what_is_not_supported_are_taken(client):
    neutral = {"presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "user": "me", "stop": None, "n": 1}
    assert complete(client(), **neutral, best_of=1, echo=False).status_code == 200
    sent_back = [{**MESSAGES[0]}, {"role": "assistant", "content": "There", "refusal": None, "tool_calls": None}]
    more = {"tools": [], "response_format": {"type": "text"}, "store": False}
    assert chat(client(), **neutral, **more, messages=[*sent_back, *MESSAGES]).status_code == 200


def test_limits_of_tokens(client):
    app = client(max_new_tokens=5)
    assert "limit of 5" in complete(app, max_tokens=6).json()["error"]["message"]
    assert chat(app, ignore_eos=True).json()["usage"]["completion_tokens"] == 5


def test_bodies_are_limited_before_they_are_parsed(client):
    app = client(max_body_bytes=2000, max_json_depth=8)
    assert complete(app, prompt="x" * 3000).status_code == 413
    deep = app.post("/v1/completions", content='{"model": ' + "[" * 9 + "]" * 9 + "}")
    assert deep.status_code == 400 and "deeper than 8" in deep.json()["error"]["message"]
    assert complete(app, prompt="[{" * 20 + '\\"').status_code == 200
    broken = app.post("/v1/completions", content="{nope", headers={"content-type": "application/json"})
    assert broken.status_code == 400 and "no JSON" in broken.json()["error"]["message"]


def test_api_keys(client, tmp_path):
    path = tmp_path / "keys"
    path.write_text("# ours\nfirst\nsecond\n")
    app = client(api_keys=str(path))
    assert app.get("/v1/models").status_code == 401
    for key, status in (("second", 200), ("third", 401), ("", 401)):
        found = app.get("/v1/models", headers={"Authorization": f"Bearer {key}"})
        assert found.status_code == status
    assert found.json()["error"]["code"] == "invalid_api_key"
    assert app.get("/health").status_code == 200


def test_a_full_queue_is_429_with_retry_after(client):
    app = client(max_batch=1, max_queue=1)
    app.app.state.service.gate.inside = 2
    found = complete(app)
    assert found.status_code == 429 and int(found.headers["retry-after"]) >= 1
    assert found.json()["error"]["type"] == "rate_limit_error"
    app.app.state.service.gate.inside = 0
    assert complete(app, n=3).status_code == 400
    assert complete(app, n=2).status_code == 200


def test_a_draining_server_says_so(client):
    app = client()
    app.app.state.service.drain()
    assert app.get("/health").status_code == 503
    found = complete(app)
    assert found.status_code == 503 and found.headers["retry-after"] and found.json()["error"]["type"] == "server_error"


def test_a_fault_of_ours_is_500_without_its_text(client, monkeypatch, caplog):
    app = client()

    def broken(*inputs):
        raise RuntimeError("secret of the machine")

    monkeypatch.setattr(app.app.state.service.engine.programs, "decode", broken)
    whole, streamed = complete(app), complete(app, stream=True)
    assert whole.status_code == 500 and "secret" not in whole.text + streamed.text
    assert '"code":"internal"' in streamed.text and "[DONE]" not in streamed.text
    assert any("secret" in str(record.exc_info) for record in caplog.records)


def test_a_session_continues_its_conversation(client, alone):
    app = client()
    first = chat(app, "a", max_tokens=6, ignore_eos=True).json()
    talk = [*MESSAGES, first["choices"][0]["message"], {"role": "user", "content": "And now?"}]
    second = chat(app, "a", messages=talk, max_tokens=6).json()
    assert second["fluxc"]["routes"] == first["fluxc"]["routes"]
    assert second["usage"]["prompt_tokens"] > first["usage"]["total_tokens"]
    assert app.app.state.service.engine.status.kv_kept > 0
    # Another story under the same key starts anew.
    other = chat(app, "a", messages=MESSAGES, max_tokens=6, ignore_eos=True).json()
    assert other["choices"][0]["message"] == first["choices"][0]["message"]
    assert other["usage"] == first["usage"]


def test_sessions_are_forgotten_when_there_are_too_many(client):
    app = client(conversations=2)
    for key in "abc":
        chat(app, key, max_tokens=2)
    assert len(app.app.state.service.sessions) == 2
