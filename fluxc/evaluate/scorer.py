"""Scores of prompts under routings, taken from the store where they are known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fluxc.data import TokenizedPrompt
from fluxc.evaluate.store import Store
from fluxc.evaluate.subjects import Subject

Sample = dict[str, Any]
"""loss: nats; exact: None where nothing is asked; routes: a string of 1 (full) and 0, one a routable layer; key: its
name in the store."""


class Scorer:
    """Runs a subject on prompts; `together` routings of one prompt are one batch."""

    def __init__(self, subject: Subject, store: Store, together: int = 1) -> None:
        self.subject, self._store, self._together = subject, store, together

    def key(self, prompt: TokenizedPrompt, bias: Tensor) -> str:
        """The name of a sample in the store. Infinities are written as words, which JSON lacks."""
        return self._store.key("score", prompt.input_ids, prompt.prompt_len, [str(value) for value in bias.tolist()])

    def known(self, prompt: TokenizedPrompt, bias: Tensor) -> bool:
        """Whether the sample needs no run."""
        return self._store.get(self.key(prompt, bias)) is not None

    def scores(
        self, prompt: TokenizedPrompt, biases: Sequence[Tensor], advance: Callable[[], None] = lambda: None
    ) -> list[Sample]:
        """The prompt under each bias fp32 [L]; what is not stored is run and stored."""
        keys = [self.key(prompt, bias) for bias in biases]
        missing = {key: bias for key, bias in zip(keys, biases, strict=True) if self._store.get(key) is None}
        todo = list(missing)
        for start in range(0, len(todo), self._together):
            self._run(prompt, todo[start : start + self._together], missing)
        for _ in keys:
            advance()
        return [self._store.get(key) for key in keys]

    def _run(self, prompt: TokenizedPrompt, keys: Sequence[str], biases: dict[str, Tensor]) -> None:
        outcomes = self.subject.outcomes(prompt, torch.stack([biases[key] for key in keys], dim=1))
        for key, found in zip(keys, outcomes, strict=True):
            routes = "".join("1" if full else "0" for full in found.routes.tolist())
            exact = found.exact if prompt.asks else None
            self._store.put(key, {"loss": found.loss, "exact": exact, "routes": routes, "key": key})
