"""Answers as the app's OpenAPI document describes them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

from fluxc.serve.errors import ErrorAnswer

Finish = Literal["stop", "length"]


class Usage(BaseModel):
    """Tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Timings(BaseModel):
    """Seconds: waiting, until the first token, for all further ones and for each of them."""

    queue: float
    prefill: float
    first_token: float
    decode: float
    per_token: float | None


class KvBytes(BaseModel):
    """Bytes of KV: planned under the routes, taken in pages, most at any time."""

    planned: int
    measured: int
    peak: int


class Own(BaseModel):
    """What fluxc adds: the budget asked for, each routable layer's route (true: full attention), Ω, times, KV."""

    budget: float
    routes: list[bool] | None
    sparse_ratio: float
    timings: Timings
    kv_bytes: KvBytes
    requeues: int


class CompletionLogprobs(BaseModel):
    """One item a token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One answer."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Finish
    fluxc: Own


class Answer(BaseModel):
    """What both kinds of answers share. `fluxc` is that of the first choice."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    usage: Usage
    fluxc: Own


class CompletionAnswer(Answer):
    """Answer of `/v1/completions`."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class ChatTokenTop(BaseModel):
    """A token that might have been chosen."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatToken(ChatTokenTop):
    """The chosen token."""

    top_logprobs: list[ChatTokenTop]


class ChatLogprobs(BaseModel):
    """One item a token."""

    content: list[ChatToken]
    refusal: None


class ChatAnswerMessage(BaseModel):
    """The assistant's message."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: ChatAnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Finish
    fluxc: Own


class ChatAnswer(Answer):
    """Answer of `/v1/chat/completions`."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class Model(BaseModel):
    """The model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class Models(BaseModel):
    """All models: one."""

    object: Literal["list"]
    data: list[Model]


class Health(BaseModel):
    """`ok`, or `draining` with status 503. `server` tells replicas behind one address apart."""

    status: Literal["ok", "draining"]
    running: int
    waiting: int
    server: str


_STREAM: dict[str, Any] = {"text/event-stream": {"schema": {"type": "string"}}}
_ERRORS = {
    400: "the request cannot be used as it is",
    401: "the API key is missing or not known",
    404: "no such model",
    408: "the body came too slowly",
    409: "the session's last turn is still running",
    413: "the body is too large",
    429: "the queue is full; Retry-After says when to ask again",
    500: "a fault of the server",
    503: "the server is shutting down",
}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The error answers of a route."""
    return {status: {"model": ErrorAnswer, "description": _ERRORS[status]} for status in statuses}


def answers(model: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """All answers of a route that generates."""
    found: dict[int | str, dict[str, Any]] = {200: {"model": model, "content": _STREAM}}
    return {**found, **errors(*_ERRORS)}
