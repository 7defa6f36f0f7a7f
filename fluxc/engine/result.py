"""What an answer consists of."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

FinishReason = Literal["stop", "length", "cancelled"]


@dataclasses.dataclass(frozen=True)
class Piece:
    """One new token, and the text that became readable with it (perhaps "").

    Where logprobs were asked for: the token's log-probability, and the most likely tokens with theirs, falling.
    """

    token: int
    text: str
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class KvBytes:
    """Bytes of KV of a request: what the plan keeps under its routes, the pages that took, and the most at any time
    (with the keys and values of one layer in transit during prefill)."""

    planned: int
    measured: int
    peak: int

    def __add__(self, other: KvBytes) -> KvBytes:
        return KvBytes(self.planned + other.planned, self.measured + other.measured, self.peak + other.peak)


@dataclasses.dataclass(frozen=True)
class Timings:
    """Seconds: in the queue, from there to the first token, and between each token and the one before."""

    queue: float
    prefill: float
    per_token: tuple[float, ...]

    @property
    def first_token(self) -> float:
        """From submission to the first token."""
        return self.queue + self.prefill

    @property
    def decode(self) -> float:
        """All tokens after the first."""
        return sum(self.per_token)


@dataclasses.dataclass(frozen=True)
class Generation:
    """An answer.

    `tokens`: the new ones, the stopping one included; `text` is theirs without special tokens, "" without a tokenizer.
    `prompt_tokens`: tokens before the answer, earlier turns included. routes bool[L] are the prompt's (None where the
    request was cancelled before they were known), scores f32[L] None where no router ran; both
    are tensors, or arrays of an engine that runs without torch. `sparse_ratio`: Ω.
    `requeues`: how often its pages went to others and it was computed again.
    """

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    routes: Any
    scores: Any
    finish_reason: FinishReason
    timings: Timings
    kv_bytes: KvBytes
    requeues: int = 0

    @property
    def sparse_ratio(self) -> float:
        """Ω: share of the routable layers on SA; 0 where no route is known."""
        flags = [] if self.routes is None else self.routes.tolist()
        return 1.0 - sum(flags) / len(flags) if flags else 0.0


@dataclasses.dataclass(frozen=True)
class EngineStatus:
    """What an engine does now: requests in the batch and in the queue, and bytes of the KV pool.

    `kv_used`: in pages that requests or kept conversations hold; `kv_kept`: those of conversations that wait.
    """

    running: int
    waiting: int
    kv_used: int
    kv_kept: int
    kv_free: int
