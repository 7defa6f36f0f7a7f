"""What differs between programs that compute on torch tensors and those that compute on arrays without torch.

The engine's own numbers (slots, pages, lengths) are numpy's either way. Programs whose `dtype` is one of numpy are run
without importing torch: they bring the store of their cache (`open_store`), and tokens are chosen by `ArraySampler`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from fluxc.engine.options import GenerationOptions
from fluxc.engine.programs import LayerKV, Prefilled

Array = np.ndarray


class Store(Protocol):
    """One paged cache and the programs over it. Its calls take arrays of the host and return what the programs do."""

    cache: Any

    def prefill(self, tokens: Sequence[int], prompt: int, bias: Array, dense: bool) -> Iterator[LayerKV | Prefilled]:
        """See `Programs.prefill`; bias f32[L,1]. `Prefilled` holds the logits of the last token, and host values."""

    def write(self, k: Any, v: Any, slots: Array) -> None:
        """k, v [1,Hk,S,D] to slots i64[1,S] of the cache; slots of -1 are dropped."""

    def decode(self, ids: Array, positions: Array, slots: Array, table: Array, lens: Array) -> Any:
        """See `Programs.decode`. An unchanged `table` is the same object as in the call before."""

    def append(self, *inputs: Array) -> Any:
        """See `Programs.append`, all inputs after the cache."""


class Sampler(Protocol):
    """Chooses the tokens of one request; see `sampling.Sampler`."""

    eos_ids: frozenset[int]

    @property
    def greedy(self) -> bool:
        """Whether the token is the largest logit as it is."""

    def choose(self, logits: Any) -> int:
        """The next token by logits [V]."""

    def ends(self, token: int) -> bool:
        """Take note of the chosen token; whether the answer ends with it."""


def computes_on_arrays(programs: Any) -> bool:
    """Whether the programs run without torch."""
    return isinstance(programs.dtype, np.dtype)


def open_store(programs: Any, pages: int) -> Store:
    """A cache of `pages` pages for the programs."""
    if computes_on_arrays(programs):
        own: Store = programs.open_store(pages)
        return own
    from fluxc.engine.torch_store import TorchStore

    return TorchStore(programs, pages)


def make_sampler(
    programs: Any, options: GenerationOptions, prompt: Sequence[int], eos_ids: Iterable[int], tokenizer: Any
) -> Sampler:
    """The sampler of one request."""
    if computes_on_arrays(programs):
        from fluxc.engine.array_sampling import ArraySampler

        return ArraySampler(options, prompt, eos_ids, tokenizer)
    from fluxc.engine import sampling

    return sampling.Sampler(options, prompt, eos_ids, tokenizer, programs.device)


def stack_routes(programs: Any, routes: Sequence[Any], rows: int) -> Any:
    """Routes bool[rows,N] of N requests with bool[rows] each: an array, or a tensor where the programs have tensors."""
    if computes_on_arrays(programs):
        return np.stack(routes, axis=1) if routes else np.zeros((rows, 0), bool)
    import torch

    return torch.stack(list(routes), dim=1) if routes else torch.zeros(rows, 0, dtype=torch.bool)
