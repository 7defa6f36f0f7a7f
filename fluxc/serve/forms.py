"""How answers look on the wire: completions and chat, whole and in chunks."""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from fluxc.engine.result import Generation, Piece

Json = dict[str, Any]


@dataclasses.dataclass
class Choice:
    """One answer, complete or on its way. `begun`: characters of its text handed out before this."""

    index: int
    text: str = ""
    pieces: list[Piece] = dataclasses.field(default_factory=list)
    finish: str | None = None
    result: Generation | None = None
    begun: int = 0


class Form(Protocol):
    """One of the two shapes."""

    prefix: str
    whole_object: str
    chunk_object: str

    def first(self, index: int) -> Json | None:
        """The choice of the chunk that opens a streamed answer, None where there is none."""

    def whole(self, choice: Choice) -> Json:
        """A complete choice."""

    def part(self, choice: Choice) -> Json:
        """The choice of a chunk."""


@dataclasses.dataclass(frozen=True)
class Completions:
    """`/v1/completions`. `decode`: the text of one token; `logprobs`: how many were asked for."""

    decode: Callable[[int], str]
    logprobs: int | None
    prefix = "cmpl"
    whole_object = "text_completion"
    chunk_object = "text_completion"

    def first(self, index: int) -> Json | None:
        """See Form."""
        return None

    def whole(self, choice: Choice) -> Json:
        """See Form."""
        return {
            "index": choice.index,
            "text": choice.text,
            "logprobs": None if self.logprobs is None else self._logprobs(choice),
            "finish_reason": choice.finish,
        }

    part = whole

    def _logprobs(self, choice: Choice) -> Json:
        texts = [self.decode(piece.token) for piece in choice.pieces]
        offsets = [choice.begun + sum(map(len, texts[:at])) for at in range(len(texts))]
        tops = [{self.decode(token): value for token, value in piece.top} for piece in choice.pieces]
        return {
            "tokens": texts,
            "token_logprobs": [piece.logprob for piece in choice.pieces],
            "top_logprobs": tops if self.logprobs else None,
            "text_offset": offsets,
        }


@dataclasses.dataclass(frozen=True)
class Chat:
    """`/v1/chat/completions`."""

    decode: Callable[[int], str]
    logprobs: int | None
    prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def first(self, index: int) -> Json | None:
        """See Form."""
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def whole(self, choice: Choice) -> Json:
        """See Form."""
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        return {"message": message, **self._rest(choice)}

    def part(self, choice: Choice) -> Json:
        """See Form."""
        return {"delta": {"content": choice.text} if choice.text else {}, **self._rest(choice)}

    def _rest(self, choice: Choice) -> Json:
        content = None if self.logprobs is None else {"content": self._logprobs(choice.pieces), "refusal": None}
        return {"index": choice.index, "logprobs": content, "finish_reason": choice.finish}

    def _logprobs(self, pieces: Sequence[Piece]) -> list[Json]:
        return [
            {
                **self._token(piece.token, piece.logprob),
                "top_logprobs": [self._token(token, value) for token, value in piece.top],
            }
            for piece in pieces
        ]

    def _token(self, token: int, logprob: float | None) -> Json:
        text = self.decode(token)
        # A token that is part of a character has no text of its own.
        whole = "\ufffd" not in text
        return {"token": text, "logprob": logprob, "bytes": list(text.encode()) if whole else None}


@dataclasses.dataclass(frozen=True)
class Envelope:
    """What surrounds the choices of one request."""

    form: Form
    model: str
    fingerprint: str
    budget: float
    id: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    def whole(self, choices: Sequence[Choice], usage: Json) -> Json:
        """The complete answer."""
        made = [{**self.form.whole(choice), **self._own(choice)} for choice in choices]
        return {**self._head(self.form.whole_object), "choices": made, "usage": usage, "fluxc": made[0].get("fluxc")}

    def first(self, index: int) -> Json | None:
        """The chunk that opens an answer."""
        choice = self.form.first(index)
        return {**self._head(self.form.chunk_object), "choices": [choice]} if choice else None

    def part(self, choice: Choice) -> Json:
        """One chunk; the last one of a choice has `fluxc`."""
        return {**self._head(self.form.chunk_object), "choices": [self.form.part(choice)], **self._own(choice)}

    def counts(self, usage: Json) -> Json:
        """The closing chunk of a stream that asked for its usage."""
        return {**self._head(self.form.chunk_object), "choices": [], "usage": usage}

    def _head(self, kind: str) -> Json:
        return {
            "id": f"{self.form.prefix}-{self.id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }

    def _own(self, choice: Choice) -> Json:
        return {} if choice.result is None else {"fluxc": own(choice.result, self.budget)}


def own(result: Generation, budget: float) -> Json:
    """The `fluxc` field: routes (true: full), Ω, seconds, bytes of KV."""
    timings = result.timings
    return {
        "budget": budget,
        "routes": None if result.routes is None else [bool(route) for route in result.routes.tolist()],
        "sparse_ratio": result.sparse_ratio,
        "timings": {
            "queue": timings.queue,
            "prefill": timings.prefill,
            "first_token": timings.first_token,
            "decode": timings.decode,
            "per_token": timings.decode / len(timings.per_token) if timings.per_token else None,
        },
        "kv_bytes": dataclasses.asdict(result.kv_bytes),
        "requeues": result.requeues,
    }
