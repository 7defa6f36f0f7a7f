"""Reference of `fluxc::attention`: a dense mask, plain torch, fp32 or wider."""

from __future__ import annotations

from torch import Tensor

from fluxc.kernels.dense_reference import masked_attention, positions


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    layer: int,
    window: int = 0,
    softcap: float = 0.0,
    sink_logits: Tensor | None = None,
    q_start: Tensor | None = None,
) -> Tensor:
    """Causal attention -> [B,S,H,Dv]; with a window, query i sees key j only when i - j < window."""
    i, j = positions(q, k, q_start)
    visible = (j <= i) & (i - j < window) if window else j <= i
    return masked_attention(q, k, v, visible, scale, softcap, sink_logits)
