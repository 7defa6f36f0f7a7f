"""`fluxc::streaming_attention`: every row sees the first `sink` keys and its last `window` keys."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fluxc.kernels.define import Provider, choose, define_attention, pieces_provider, triton_provider
from fluxc.kernels.row_call import RowCall, RowOptions


def define() -> None:
    """Define torch.ops.fluxc.streaming_attention."""
    define_attention("streaming_attention", row_call, run)


def row_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    layer: int,
    sink: int,
    window: int,
    softcap: float = 0.0,
    sink_logits: Tensor | None = None,
    q_start: Tensor | None = None,
) -> RowCall:
    """The op's arguments as a RowCall."""
    options = RowOptions(scale, softcap, sink=sink, window=window)
    return RowCall(q, k, v, options, q_start=q_start, sink_logits=sink_logits)


def providers() -> tuple[Provider, ...]:
    """In order of preference."""
    return triton_provider("streaming_attention"), pieces_provider(row_call)


def run(*args: Any, **kwargs: Any) -> Tensor:
    """Output [B,S,H,Dv] by the first provider that takes the call."""
    return choose("streaming_attention", providers(), *args, **kwargs).run(*args, **kwargs)
