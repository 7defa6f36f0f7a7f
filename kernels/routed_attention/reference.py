"""Reference of `fluxc::routed_attention`: per request, the reference of its branch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fluxc.kernels.attention.reference import attention
from fluxc.kernels.block_attention.reference import block_attention
from fluxc.kernels.block_scores.reference import block_scores
from fluxc.kernels.triangle_attention.reference import triangle_attention


def routed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    route: Tensor,
    prompt_lens: Tensor,
    *,
    scale: float,
    layer: int,
    kind: str,
    sink: int,
    window: int,
    last: int,
    decode_full: bool = False,
    softcap: float = 0.0,
    sink_logits: Tensor | None = None,
    block: int = 0,
    stride: int = 0,
    threshold: float = 0.0,
    full_kind: str = "dense",
) -> Tensor:
    """Full attention where route[b], else the sparse kind -> [B,S,H,Dv]. Streaming is triangle with last = 0."""
    how: dict[str, Any] = {"scale": scale, "layer": layer, "softcap": softcap, "sink_logits": sink_logits}
    full = attention(q, k, v, **how)
    if "block" in (kind, full_kind):
        by_blocks = full.clone()
        for b, n in enumerate(prompt_lens.tolist()):
            if n:
                one = slice(b, b + 1)
                b_q, b_k, b_v = (x[one, :, :n] for x in (q, k, v))
                sizes: dict[str, Any] = {"block": block, "stride": stride, "threshold": threshold}
                index, count = block_scores(b_q, b_k, scale=scale, layer=layer, **sizes)
                by_blocks[one, :n] = block_attention(b_q, b_k, b_v, index, count, block=block, **how)
        if kind == "block":
            return torch.where(route[:, None, None, None], full, by_blocks)
        full = by_blocks
    last = last if kind == "triangle" else 0
    rows: dict[str, Any] = {"sink": sink, "window": window, "last": last, "decode_full": decode_full}
    sparse = triangle_attention(q, k, v, prompt_lens, **rows, **how)
    return torch.where(route[:, None, None, None], full, sparse)
