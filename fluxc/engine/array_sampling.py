"""The next token of one request by numpy alone: what transformers' processors do, for engines that load no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from fluxc.engine.options import SEEDS, TOP_K, GenerationOptions
from fluxc.errors import DataError

Array = np.ndarray
_TAIL = 64
"""Tokens looked back at for a stop string, beside one for each of its characters."""


class ArraySampler:
    """Chooses the tokens of one request after `prompt`; see `sampling.Sampler`, whose scores it has to equal."""

    def __init__(
        self, options: GenerationOptions, prompt: Sequence[int], eos_ids: Iterable[int], tokenizer: Any
    ) -> None:
        given = options.eos_token_id
        self.eos_ids = frozenset(eos_ids if given is None else given)
        self._options, self._tokenizer = options, tokenizer
        self._tokens, self._prompt = list(prompt), len(prompt)
        self._random = np.random.default_rng(options.seed) if options.samples else None
        if options.stop_strings and tokenizer is None:
            raise DataError("stop_strings need a tokenizer, and this model has none", hint="stop at eos_token_id")

    @property
    def greedy(self) -> bool:
        """Whether the token is the largest logit as it is."""
        given = self._options
        changes = given.repetition_penalty != 1 or given.no_repeat_ngram_size or (given.min_new_tokens and self.eos_ids)
        return not changes and self._random is None

    def choose(self, logits: Array) -> int:
        """The next token by logits [V]."""
        scores = self.scores(logits)
        if self._random is None:
            return int(scores.argmax())
        shares = softmax(scores.astype(np.float64))
        return int(self._random.choice(len(shares), p=shares / shares.sum()))

    def scores(self, logits: Array) -> Array:
        """f32[V]: the logits as the options change them, in the order of transformers' `generate`."""
        given, scores = self._options, np.array(logits, np.float32)
        if given.repetition_penalty != 1:
            scores = penalized(scores, self._tokens, given.repetition_penalty)
        if given.no_repeat_ngram_size:
            scores[_banned(self._tokens, given.no_repeat_ngram_size)] = -np.inf
        if len(self._tokens) - self._prompt < given.min_new_tokens:
            scores[sorted(self.eos_ids)] = -np.inf
        return warped(scores, given) if self._random is not None else scores

    def ends(self, token: int) -> bool:
        """Take note of the chosen token; whether the answer ends with it."""
        self._tokens.append(token)
        return token in self.eos_ids or any(map(self._just_said, self._options.stop_strings))

    def _just_said(self, text: str) -> bool:
        """Whether the last token completed `text`."""
        tail = self._tokens[-(_TAIL + len(text)) :]
        before, after = (self._tokenizer.decode(tokens) for tokens in (tail[:-1], tail))
        at = after.rfind(text)
        return at >= 0 and at + len(text) > len(before.rstrip("\ufffd"))


def new_seed() -> int:
    """A seed from the system."""
    return int(np.random.default_rng().integers(SEEDS - 1))


def penalized(scores: Array, tokens: Sequence[int], penalty: float) -> Array:
    """Scores [V] of tokens that were there before, made less likely by `penalty`."""
    seen = np.unique(np.asarray(tokens, np.int64))
    own = scores[seen]
    scores[seen] = np.where(own < 0, own * np.float32(penalty), own / np.float32(penalty))
    return scores


def _banned(tokens: Sequence[int], size: int) -> list[int]:
    """Tokens that would repeat a run of `size` tokens."""
    if len(tokens) + 1 < size:
        return []
    last = tuple(tokens[len(tokens) - size + 1 :])
    starts = range(len(tokens) - size + 1)
    return [tokens[at + size - 1] for at in starts if tuple(tokens[at : at + size - 1]) == last]


def warped(scores: Array, options: GenerationOptions) -> Array:
    """Temperature, top_k, top_p, min_p, typical_p: tokens they rule out become -inf."""
    top_k = TOP_K if options.top_k is None else options.top_k
    if options.temperature not in (None, 1):
        scores = scores / np.float32(options.temperature)
    if top_k:
        least = np.partition(scores, -min(top_k, len(scores)))[-min(top_k, len(scores))]
        scores = np.where(scores < least, -np.inf, scores)
    if options.top_p not in (None, 1):
        scores = _top_p(scores, float(options.top_p or 1))
    if options.min_p is not None:
        shares = softmax(scores)
        scores = np.where(shares < np.float32(options.min_p) * shares.max(), -np.inf, scores)
    if options.typical_p not in (None, 1):
        scores = _typical(scores, float(options.typical_p or 1))
    return scores.astype(np.float32)


def softmax(scores: Array) -> Array:
    """Shares of one row."""
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def _top_p(scores: Array, top_p: float) -> Array:
    """The least likely tokens go, as long as those left hold `top_p`; one always stays."""
    order = np.argsort(scores, kind="stable")
    gone = np.cumsum(softmax(scores[order])) <= np.float32(1 - top_p)
    gone[-1] = False
    return _without(scores, order[gone])


def _typical(scores: Array, mass: float) -> Array:
    """Tokens whose surprise is nearest to the expected one, until they hold `mass`."""
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = scores - scores.max()
        logs = logs - np.log(np.exp(logs).sum())
        shares = np.exp(logs)
        entropy = -np.nansum(logs * shares)
    order = np.argsort(np.abs(-logs - entropy), kind="stable")
    held = np.cumsum(softmax(scores[order]))
    last = min(int((held < np.float32(mass)).sum()), len(scores) - 1)
    distance = np.abs(-logs - entropy)
    return _without(scores, np.flatnonzero(distance > distance[order[last]]))


def _without(scores: Array, tokens: Array) -> Array:
    left = scores.copy()
    left[tokens] = -np.inf
    return left
