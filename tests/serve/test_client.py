"""The official OpenAI client against a running server."""

from __future__ import annotations

import asyncio
import time

import httpx
import pytest

openai = pytest.importorskip("openai", reason="the official client is installed with fluxc[test]")

MESSAGES = [{"role": "user", "content": "Where is the key?"}]


@pytest.fixture(scope="module")
def running(serving):
    with serving() as (url, server):
        yield url, server


@pytest.fixture
def client(running):
    with openai.OpenAI(base_url=f"{running[0]}/v1", api_key="any", max_retries=0) as made:
        yield made


def quiet(server) -> None:
    """Waits until nothing runs, and asserts that nothing is left."""
    end = time.monotonic() + 10
    while time.monotonic() < end:
        status = server._service.engine.status
        if not (status.running or status.waiting or status.kv_used or server._service.gate.inside):
            return
        time.sleep(0.01)
    raise AssertionError(f"something is left: {server._service.engine.status}")


def test_chat_whole_and_streamed(client):
    options = {"model": "toy", "messages": MESSAGES, "max_tokens": 8, "temperature": 0}
    whole = client.chat.completions.create(**options, extra_body={"budget": 0.4})
    assert whole.choices[0].finish_reason == "length" and whole.usage.completion_tokens == 8
    assert whole.model_extra["fluxc"]["sparse_ratio"] == whole.choices[0].model_extra["fluxc"]["sparse_ratio"]
    with client.chat.completions.create(
        **options, stream=True, stream_options={"include_usage": True}, extra_body={"budget": 0.4}
    ) as parts:
        found = list(parts)
    assert "".join(part.choices[0].delta.content or "" for part in found if part.choices) == (
        whole.choices[0].message.content
    )
    assert found[-1].usage == whole.usage


def test_completions_whole_and_streamed(client):
    options = {"model": "toy", "prompt": "The key", "max_tokens": 8, "seed": 7, "n": 2, "logprobs": 1}
    whole = client.completions.create(**options)
    texts = {0: "", 1: ""}
    for part in client.completions.create(**options, stream=True):
        texts[part.choices[0].index] += part.choices[0].text
    assert [choice.text for choice in whole.choices] == [texts[0], texts[1]]
    assert len(whole.choices[0].logprobs.token_logprobs) == 8


def test_models(client):
    assert [model.id for model in client.models.list()] == ["toy"]
    assert client.models.retrieve("toy").owned_by == "fluxc"


@pytest.mark.parametrize(
    "change, kind, code",
    [
        ({"model": "other"}, "NotFoundError", "model_not_found"),
        ({"max_tokens": -1}, "BadRequestError", "invalid_value"),
        ({"messages": [{"role": "user", "content": "word " * 600}]}, "BadRequestError", "context_length_exceeded"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "BadRequestError", "unsupported_parameter"),
        ({"extra_body": {"nonsense": 1}}, "BadRequestError", "unsupported_parameter"),
    ],
)
def test_errors_have_the_types_the_client_knows(client, change, kind, code):
    with pytest.raises(getattr(openai, kind)) as caught:
        client.chat.completions.create(**{"model": "toy", "messages": MESSAGES, "max_tokens": 3, **change})
    assert caught.value.code == code and caught.value.body["message"]
    assert caught.value.request_id.startswith("req_")


def test_keys_full_queues_and_draining_have_their_types(serving, tmp_path):
    (tmp_path / "keys").write_text("right\n")
    with serving(api_keys=str(tmp_path / "keys"), max_queue=0) as (url, server):
        ask = {"model": "toy", "messages": MESSAGES, "max_tokens": 2}
        with openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError):
                client.chat.completions.create(**ask)
            right = client.with_options(api_key="right")
            server._service.gate.inside = 4
            with pytest.raises(openai.RateLimitError) as full:
                right.chat.completions.create(**ask)
            assert full.value.response.headers["retry-after"]
            server._service.gate.inside = 0
            server._service.drain()
            with pytest.raises(openai.InternalServerError) as gone:
                right.chat.completions.create(**ask)
            assert gone.value.status_code == 503


def test_a_client_that_leaves_frees_its_pages_streamed_or_not(serving):
    async def leave(url):
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
            options = {"model": "toy", "messages": MESSAGES, "max_tokens": 150, "extra_body": {"ignore_eos": True}}
            stream = await client.chat.completions.create(**options, stream=True)
            async for _ in stream:
                break
            await stream.close()
            with pytest.raises(openai.APITimeoutError):
                await client.with_options(timeout=0.2).chat.completions.create(**options, n=3)

    with serving(seconds=0.05) as (url, server):
        start = time.monotonic()
        asyncio.run(leave(url))
        quiet(server)
        left = 'fluxc_requests_total{path="/v1/chat/completions",status="499"} 1.0'
        assert left in httpx.get(f"{url}/metrics").text
        # Far less than the 150 steps of 50 ms that nobody waits for.
        assert time.monotonic() - start < 5


def test_many_at_a_time_are_answered_as_alone(running, client):
    prompts = [f"The {word} is" for word in ("key", "door", "house", "sea", "road", "end", "hat", "dog")]

    async def all_at_once():
        async with openai.AsyncOpenAI(base_url=f"{running[0]}/v1", api_key="any", max_retries=0) as many:
            asked = [
                many.completions.create(model="toy", prompt=text, max_tokens=20, seed=at, extra_body={"budget": 0.2})
                for at, text in enumerate(prompts)
            ]
            return [found.choices[0].text for found in await asyncio.gather(*asked)]

    together = asyncio.run(all_at_once())
    alone = [
        client.completions.create(model="toy", prompt=text, max_tokens=20, seed=at, extra_body={"budget": 0.2})
        for at, text in enumerate(prompts)
    ]
    assert together == [found.choices[0].text for found in alone]
    quiet(running[1])
