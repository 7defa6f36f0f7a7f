"""`fluxc::triangle_attention`: streaming rows, except the last rows of the prompt, which see all keys."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fluxc.kernels.define import Provider, choose, define_attention, pieces_provider, triton_provider
from fluxc.kernels.row_call import RowCall, RowOptions


def define() -> None:
    """Define torch.ops.fluxc.triangle_attention."""
    define_attention("triangle_attention", row_call, run)


def row_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_lens: Tensor,
    *,
    scale: float,
    layer: int,
    sink: int,
    window: int,
    last: int,
    decode_full: bool = False,
    softcap: float = 0.0,
    sink_logits: Tensor | None = None,
) -> RowCall:
    """The op's arguments as a RowCall."""
    options = RowOptions(scale, softcap, "triangle", sink, window, last, decode_full)
    return RowCall(q, k, v, options, prompt_lens=prompt_lens, sink_logits=sink_logits)


def providers() -> tuple[Provider, ...]:
    """In order of preference."""
    return triton_provider("triangle_attention"), pieces_provider(row_call)


def run(*args: Any, **kwargs: Any) -> Tensor:
    """Output [B,S,H,Dv] by the first provider that takes the call."""
    return choose("triangle_attention", providers(), *args, **kwargs).run(*args, **kwargs)
