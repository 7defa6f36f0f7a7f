"""Long answers written by the engine: how far they follow the dense one, and how likely the dense model finds them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from fluxc.bench.systems import System
from fluxc.data import TokenizedPrompt
from fluxc.errors import OptionError
from fluxc.evaluate.oracle import all_full
from fluxc.evaluate.scorer import Scorer
from fluxc.evaluate.store import Store
from fluxc.evaluate.subjects import Subject

TOKENS = 512
GRAM = 4
DECODES = ("sparse", "full")


@dataclasses.dataclass(frozen=True)
class LongAnswers:
    """Answers of `tokens` greedy tokens under routings that the scorer knows; ends of text are ignored."""

    subject: Subject
    scorer: Scorer
    store: Store
    tokens: int = TOKENS

    def rows(
        self, prompt: TokenizedPrompt, systems: Sequence[System], advance: Callable[[], None]
    ) -> list[dict[str, Any]]:
        """One row a system and decode setting; dense, which decodes the same under both, comes first and once."""
        dense = self._answer(prompt, systems[0], self.decodes[0])
        found = []
        for system in systems:
            for decode in self.decodes[:1] if system.name == "dense" else self.decodes:
                answer = self._answer(prompt, system, decode)
                found.append(self._row(prompt, system, decode, answer, dense["tokens"]))
                advance()
        return found

    @property
    def decodes(self) -> tuple[str, ...]:
        """The settings that can be run, the plan's own first."""
        found: list[str] = [self.subject.plan.decode] if self.subject.plan else []
        for other in DECODES:
            try:
                self.subject.engine(other)
            except OptionError:
                continue
            found.append(other)
        return tuple(dict.fromkeys(found))

    def _answer(self, prompt: TokenizedPrompt, system: System, decode: str) -> dict[str, Any]:
        routes = self.scorer.scores(prompt, [system.bias])[0]["routes"]
        given = prompt.input_ids[: prompt.prompt_len]
        key = self.store.key("answer", given, routes, decode, self.tokens)
        if self.store.get(key) is None:
            self.store.put(key, self._generate(given, routes, decode))
        return {**self.store.get(key), "routes": routes}

    def _generate(self, given: list[int], routes: str, decode: str) -> dict[str, Any]:
        flags = [route == "1" for route in routes]
        engine = self.subject.engine(decode)
        found = engine.generate(given, routes=flags, max_new_tokens=self.tokens, eos_token_id=[])
        return {"tokens": list(found.tokens), "kv_bytes": found.kv_bytes.planned}

    def _row(
        self, prompt: TokenizedPrompt, system: System, decode: str, answer: dict[str, Any], dense: list[int]
    ) -> dict[str, Any]:
        written = [*prompt.input_ids[: prompt.prompt_len], *answer["tokens"]]
        judged = TokenizedPrompt(written, prompt.prompt_len, "answer")
        loss = self.scorer.scores(judged, [all_full(self.subject.layers)])[0]["loss"]
        return {
            "decode": decode,
            "agree": agreement(answer["tokens"], dense),
            "loss": loss,
            "fresh": fresh(answer["tokens"]),
            "answer_tokens": len(answer["tokens"]),
            "kv_bytes": answer["kv_bytes"],
            "routes": answer["routes"],
        }


def agreement(tokens: Sequence[int], dense: Sequence[int]) -> float:
    """Share of the dense tokens before the first that differs."""
    same = next((at for at, pair in enumerate(zip(tokens, dense, strict=False)) if pair[0] != pair[1]), None)
    return (min(len(tokens), len(dense)) if same is None else same) / len(dense)


def fresh(tokens: Sequence[int]) -> float:
    """Share of the 4-grams that are different ones: a text that repeats itself comes near 0."""
    grams = [tuple(tokens[at : at + GRAM]) for at in range(len(tokens) - GRAM + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0
