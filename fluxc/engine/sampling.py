"""The next token of one request, and whether it is the last: transformers' own processors and criteria, row by row.

Every request has its own processors and its own random numbers, so its tokens do not depend on its batch mates.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fluxc.engine.options import SEEDS, TOP_K, GenerationOptions
from fluxc.errors import DataError


class Sampler:
    """Chooses the tokens of one request after `prompt`; `eos_ids` are the model's end-of-text tokens."""

    def __init__(
        self, options: GenerationOptions, prompt: Sequence[int], eos_ids: Iterable[int], tokenizer: Any, device: Any
    ) -> None:
        given = options.eos_token_id
        self.eos_ids = frozenset(eos_ids if given is None else given)
        self._samples = options.samples
        self._processors = _processors(options, len(prompt), sorted(self.eos_ids), device)
        self._stop_strings = _stop_strings(options, tokenizer)
        self._tokens = TokenBuffer(prompt)
        self._device = torch.device(device)
        self._random = _generator(options.seed, self._device) if self._samples else None

    @property
    def greedy(self) -> bool:
        """Whether the token is the largest logit as it is: the engine then takes those of a batch in one call."""
        return not self._processors and not self._samples

    def choose(self, logits: Tensor) -> int:
        """The next token by logits [V]."""
        scores = logits[None].to(torch.float32, copy=True)
        if self._processors:
            scores = self._processors(self._tokens.ids.to(self._device), scores)
        if not self._samples:
            return int(scores.argmax())
        shares = torch.nn.functional.softmax(scores, dim=-1)
        return int(torch.multinomial(shares, num_samples=1, generator=self._random))

    def ends(self, token: int) -> bool:
        """Take note of the chosen token; whether the answer ends with it."""
        self._tokens.add(token)
        if token in self.eos_ids:
            return True
        return self._stop_strings is not None and bool(self._stop_strings(self._tokens.ids, None))


class TokenBuffer:
    """Token ids that grow by one, as a tensor."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._used = len(tokens)
        self._room = torch.zeros(1, 2 * len(tokens) + 64, dtype=torch.int64)
        self._room[0, : self._used] = torch.tensor(tokens)

    @property
    def ids(self) -> Tensor:
        """i64[1,n] of all tokens so far."""
        return self._room[:, : self._used]

    def add(self, token: int) -> None:
        """Put one more at the end."""
        if self._used == self._room.shape[1]:
            self._room = torch.cat((self._room, torch.zeros_like(self._room)), dim=1)
        self._room[0, self._used] = token
        self._used += 1


def new_seed() -> int:
    """A seed from torch's own generator, so that `torch.manual_seed` fixes it."""
    return int(torch.randint(SEEDS - 1, ()))


def _generator(seed: int | None, device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(new_seed() if seed is None else seed)


def _processors(options: GenerationOptions, prompt: int, eos_ids: list[int], device: Any) -> Any:
    """transformers' processors in the order its `generate` has them."""
    from transformers.generation import logits_process as made

    found: list[Any] = []
    if options.repetition_penalty != 1:
        found.append(made.RepetitionPenaltyLogitsProcessor(float(options.repetition_penalty)))
    if options.no_repeat_ngram_size:
        found.append(made.NoRepeatNGramLogitsProcessor(options.no_repeat_ngram_size))
    if options.min_new_tokens and eos_ids:
        found.append(made.MinNewTokensLengthLogitsProcessor(prompt, options.min_new_tokens, eos_ids, device=device))
    return made.LogitsProcessorList(found + (_warpers(options) if options.samples else []))


def _warpers(options: GenerationOptions) -> list[Any]:
    from transformers.generation import logits_process as made

    top_k = TOP_K if options.top_k is None else options.top_k
    found: list[Any] = []
    if options.temperature not in (None, 1):
        found.append(made.TemperatureLogitsWarper(float(options.temperature)))
    if top_k:
        found.append(made.TopKLogitsWarper(top_k))
    if options.top_p not in (None, 1):
        found.append(made.TopPLogitsWarper(float(options.top_p)))
    if options.min_p is not None:
        found.append(made.MinPLogitsWarper(float(options.min_p)))
    if options.typical_p not in (None, 1):
        found.append(made.TypicalLogitsWarper(float(options.typical_p)))
    return found


def _stop_strings(options: GenerationOptions, tokenizer: Any) -> Any:
    if not options.stop_strings:
        return None
    if tokenizer is None:
        raise DataError("stop_strings need a tokenizer, and this model has none", hint="stop at eos_token_id")
    from transformers.generation.stopping_criteria import StopStringCriteria

    return StopStringCriteria(tokenizer, list(options.stop_strings))
