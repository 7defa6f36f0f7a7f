"""What the engine runs: the `Programs` protocol, and what its calls return."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from fluxc.engine.shapes import LayerShape


@dataclasses.dataclass(frozen=True)
class LayerKV:
    """Keys (after RoPE) and values of one attention layer of a prefill.

    `index` is a in 0..A-1; k, v [1,Hk,S,D]; `route`: full (True) or sparse (False), None for a layer that is not
    routable. k and v have storages of their own that nothing but the holder of this object keeps alive.
    """

    index: int
    k: Any
    v: Any
    route: bool | None


@dataclasses.dataclass(frozen=True)
class Prefilled:
    """The end of a prefill: logits [1,N,V], routes bool[L] and scores f32[L] (None where no router ran).

    Tensors, or arrays of programs that run without torch.
    """

    logits: Any
    routes: Any
    scores: Any


class Programs(Protocol):
    """Prefill, decode and append of one model over weights held once.

    A is the number of attention layers, L of routable ones, V the vocabulary, P the pages of the longest request.
    `cache` is one tensor [pages,2,Hk,PAGE,D] in `dtype` for all layers (kernels/schemas.py), written in place; slots
    are page * PAGE + offset, -1 drops a token. `context`: most tokens of a request, 0 where it is not known.
    `rope_limit`: 0, or the length in tokens past which all keys of a request are rotated differently (longrope's
    original context): a request that grows past it has to be prefilled again as a whole, under its routes.
    """

    layers: tuple[LayerShape, ...]
    vocabulary: int
    context: int
    rope_limit: int
    dtype: torch.dtype
    device: torch.device

    def prefill(
        self, input_ids: Tensor, prompt_lens: Tensor, route_bias: Tensor, logits_at: Tensor, *, dense: bool = False
    ) -> Iterator[LayerKV | Prefilled]:
        """One request, layer by layer: a LayerKV after each attention layer, a Prefilled at the end.

        input_ids i64[1,S], prompt_lens i64[1], route_bias f32[L,1], logits_at i64[1,N]. The caller may do other work
        between two items. `dense`: no router runs, every route is full, scores are None.
        """

    def decode(
        self, cache: Tensor, input_ids: Tensor, position_ids: Tensor, slots: Tensor, page_table: Tensor, lens: Tensor
    ) -> Tensor:
        """One token of each of B requests: logits [B,V].

        input_ids, position_ids i64[B,1]; slots i64[A,B] where the token's K and V go; page_table i32[A,B,P];
        lens i32[A,B] valid slots, this token's included.
        """

    def append(
        self,
        cache: Tensor,
        input_ids: Tensor,
        position_ids: Tensor,
        seq_lens: Tensor,
        slots: Tensor,
        page_table: Tensor,
        lens: Tensor,
        start: Tensor,
        sinks: Tensor,
        windows: Tensor,
        logits_at: Tensor,
    ) -> Tensor:
        """A further turn of up to S tokens on top of each request's cache: logits [B,N,V].

        input_ids, position_ids i64[B,S], right padded to seq_lens i64[B]; slots i64[A,B,S], -1 for padding and for
        what the ring overwrites within the turn; page_table i32[A,B,P]; lens i32[A,B] valid slots *before* the turn;
        start i64[B] tokens before the turn; sinks, windows i64[A,B] of layers cached as a ring, 0 and 0 for full
        ones; logits_at i64[B,N] rows of the turn.
        """
