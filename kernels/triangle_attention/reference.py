"""Reference of `fluxc::triangle_attention`: a dense mask, plain torch, fp32 or wider."""

from __future__ import annotations

from torch import Tensor

from fluxc.kernels.dense_reference import masked_attention, positions, streaming_set


def triangle_attention(
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
) -> Tensor:
    """Streaming rows, the last rows of the prompt (and those after it, with decode_full) dense -> [B,S,H,Dv]."""
    i, j = positions(q, k)
    prompt = prompt_lens[:, None, None]
    dense = (i >= prompt - last) & (i < prompt)
    if decode_full:
        dense = dense | (i >= prompt)
    visible = streaming_set(i, j, sink, window) | (dense & (j <= i))
    return masked_attention(q, k, v, visible, scale, softcap, sink_logits)
