"""Requests of a load: seeded, of mixed lengths and kinds, some to be broken off, some that are no requests at all."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from typing import Any, Literal

from fluxc.data import corpus

Kind = Literal["good", "cancel", "malformed"]
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
# Words of a prompt: share of the requests, least, most.
LENGTHS = ((0.7, 4, 40), (0.25, 40, 160), (0.05, 160, 400))
BROKEN: tuple[dict[str, Any], ...] = (
    {"model": "another"},
    {"budget": 7},
    {"temperature": "hot"},
    {"max_tokens": -3},
    {"prompt": ""},
    {"prompt": {"text": "x"}},
    {"logit_bias": {"1": 5}},
    {"invented": True},
    {"prompt": [10**9]},
    {"n": 100_000},
)


@dataclasses.dataclass(frozen=True)
class Ask:
    """One request to send. `content`: its body. `after`: pieces after which a `cancel` leaves. `key`: equal for equal
    requests."""

    kind: Kind
    path: str
    content: bytes | dict[str, Any]
    key: int = -1
    after: int = 0

    @property
    def streams(self) -> bool:
        """Whether the answer comes in pieces."""
        return isinstance(self.content, dict) and bool(self.content.get("stream"))


@dataclasses.dataclass(frozen=True)
class Mix:
    """What a load is made of. `distinct`: different good requests. `words`: of each prompt, in place of LENGTHS."""

    model: str
    requests: int
    distinct: int
    cancel: float = 0.0
    malformed: float = 0.0
    max_tokens: int = 16
    words: int = 0
    budgets: Sequence[float | None] = (None,)
    seed: int = 0

    def asks(self) -> list[Ask]:
        """All requests in the order they are sent."""
        draw = random.Random(self.seed)
        good = [self._good(draw, key) for key in range(self.distinct)]
        return [self._one(draw, good) for _ in range(self.requests)]

    def _one(self, draw: random.Random, good: list[Ask]) -> Ask:
        share = draw.random()
        if share < self.malformed:
            return self._malformed(draw)
        chosen = draw.choice(good)
        if share < self.malformed + self.cancel:
            return dataclasses.replace(chosen, kind="cancel", after=draw.randrange(4))
        return chosen

    def _good(self, draw: random.Random, key: int) -> Ask:
        text = _text(draw, self.words or _words(draw))
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": draw.randint(max(self.max_tokens // 4, 1), self.max_tokens),
            "temperature": 0 if draw.random() < 0.7 else 0.8,
            "seed": key,
            "stream": draw.random() < 0.7,
            "ignore_eos": draw.random() < 0.5,
        }
        budget = draw.choice(list(self.budgets))
        body |= {} if budget is None else {"budget": budget}
        body |= {"stop": ["\n\n"]} if draw.random() < 0.2 else {}
        if draw.random() < 0.5:
            return Ask("good", COMPLETIONS, {**body, "prompt": text}, key)
        messages = [{"role": "user", "content": f"{text}\n\nSay in a few words what this is about."}]
        return Ask("good", CHAT, {**body, "messages": messages}, key)

    def _malformed(self, draw: random.Random) -> Ask:
        if draw.random() < 0.3:
            return Ask("malformed", COMPLETIONS, draw.choice((b"{", b"", b"[" * 5000, b"\xff", b"null")))
        body = {"model": self.model, "prompt": "Once", "max_tokens": 4, **draw.choice(BROKEN)}
        return Ask("malformed", COMPLETIONS, body)


def _words(draw: random.Random) -> int:
    shares = [share for share, _, _ in LENGTHS]
    _, least, most = draw.choices(LENGTHS, shares)[0]
    return draw.randint(least, most)


def _text(draw: random.Random, words: int) -> str:
    """Words of the packaged corpus that follow each other."""
    known = corpus.read(draw.choice(corpus.pieces(kind="prose"))).split()
    start = draw.randrange(max(len(known) - words, 1))
    found = known[start : start + words]
    return " ".join((found * (words // max(len(found), 1) + 1))[:words])
