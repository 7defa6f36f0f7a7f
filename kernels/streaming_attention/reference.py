"""Reference of `fluxc::streaming_attention`: a dense mask, plain torch, fp32 or wider."""

from __future__ import annotations

from torch import Tensor

from fluxc.kernels.dense_reference import masked_attention, positions, streaming_set


def streaming_attention(
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
) -> Tensor:
    """Attention over the streaming set of (sink, window) -> [B,S,H,Dv]."""
    visible = streaming_set(*positions(q, k, q_start), sink, window)
    return masked_attention(q, k, v, visible, scale, softcap, sink_logits)
