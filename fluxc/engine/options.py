"""What can be asked of one generation, and how an engine is set up."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal, Self

from fluxc.errors import OptionError
from fluxc.options import Options

COLD = 1e-5
"""Temperatures below are greedy: dividing by them would leave the range of fp32."""
TOP_K = 50
"""What transformers takes for top_k where sampling is asked for without one."""
SEEDS = 2**63


@dataclasses.dataclass(frozen=True)
class GenerationOptions(Options):
    """Options of one answer, under the names and with the meaning they have in transformers' `generate`.

    `max_new_tokens`: at most so many tokens (fewer where the context ends). `min_new_tokens`: no end of text before.
    `do_sample`: None samples where a temperature above 0, top_k, top_p, min_p or typical_p is given, and is greedy
    otherwise; temperature 0 is greedy. `top_k`: None takes 50 when sampling, 0 all. `stop_strings`: end after any of
    them appeared. `eos_token_id`: None takes the model's own, [] none. `seed`: None draws one from torch's generator.
    `logprobs`: pieces carry the log-probability of their token by the model's own logits, whatever was drawn from, and
    that many of the most likely ones; None for neither.
    """

    max_new_tokens: int = 64
    min_new_tokens: int = 0
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    stop_strings: tuple[str, ...] = ()
    eos_token_id: tuple[int, ...] | None = None
    seed: int | None = None
    logprobs: int | None = None

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """As Options, and a single stop string or end token may stand for a list of one."""
        return super().from_dict({name: _as_tuple(name, value) for name, value in values.items()})

    def __post_init__(self) -> None:
        _integers(self, {"max_new_tokens": 1, "min_new_tokens": 0, "top_k": 0, "no_repeat_ngram_size": 0})
        _integers(self, {"logprobs": 0})
        _number(self, "temperature", lambda x: x >= 0, "0 or above")
        _number(self, "repetition_penalty", lambda x: x > 0, "above 0")
        for name in ("top_p", "typical_p"):
            _number(self, name, lambda x: 0 < x <= 1, "above 0 and at most 1")
        _number(self, "min_p", lambda x: 0 <= x <= 1, "in 0..1")
        if self.seed is not None and not (_is_int(self.seed) and 0 <= self.seed < SEEDS):
            raise OptionError(f"seed {self.seed!r} is not an integer in 0..2**63-1")
        if not all(isinstance(text, str) and text for text in self.stop_strings):
            raise OptionError(f"stop_strings {list(self.stop_strings)!r} must be texts that are not empty")
        if not all(_is_int(token) for token in self.eos_token_id or ()):
            raise OptionError(f"eos_token_id {self.eos_token_id!r} holds something that is no token id")

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn; else the most likely one is taken."""
        if self.do_sample is False or (self.temperature is not None and self.temperature < COLD):
            return False
        given = (self.temperature, self.top_k, self.top_p, self.min_p, self.typical_p)
        return self.do_sample is True or any(value is not None for value in given)


@dataclasses.dataclass(frozen=True)
class EngineOptions(Options):
    """How an engine shares the machine.

    `max_batch`: requests that decode together. `kv_memory`: bytes of the KV pool, None for what `max_batch` requests
    of the whole context can need, at most half of what the device has free. `admission`: a request starts when its
    worst case (all open layers full) fits, or when the case its budget lets expect fits; then it may be put back and
    computed again where pages run out. `max_decode_stall_ms`: how long a prefill may keep running answers waiting,
    as far as the layers of the model can be told apart. `turn_tokens`: a further turn is computed in pieces of that
    many tokens, decode steps between them. `context`: most tokens of a request, None for the model's own limit.
    """

    max_batch: int = 16
    kv_memory: int | None = None
    admission: Literal["worst", "expected"] = "worst"
    max_decode_stall_ms: float = 50.0
    turn_tokens: int = 1024
    context: int | None = None

    def __post_init__(self) -> None:
        _integers(self, {"max_batch": 1, "kv_memory": 1, "turn_tokens": 1, "context": 2})
        _number(self, "max_decode_stall_ms", lambda x: x >= 0, "0 or above")
        if self.admission not in ("worst", "expected"):
            raise OptionError(f"admission {self.admission!r} is not worst or expected")

    def context_of(self, model: int) -> int:
        """Most tokens of a request to a model whose own limit is `model`; 0 for neither."""
        known = [limit for limit in (self.context, model) if limit]
        return min(known, default=0)


def _as_tuple(name: str, value: Any) -> Any:
    if name not in ("stop_strings", "eos_token_id") or (name == "eos_token_id" and value is None):
        return value
    if value is None or isinstance(value, (str, int)):
        return () if value is None else (value,)
    return tuple(value) if isinstance(value, Sequence) else value


def _integers(options: Options, least: dict[str, int]) -> None:
    for name, low in least.items():
        value = getattr(options, name)
        if value is not None and not (_is_int(value) and value >= low):
            raise OptionError(f"{name} {value!r} is not an integer >= {low}")


def _number(options: Options, name: str, holds: Any, wanted: str) -> None:
    value = getattr(options, name)
    if value is None:
        return
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not holds(value):
        raise OptionError(f"{name} {value!r} is not a number {wanted}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
