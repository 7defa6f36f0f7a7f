"""Reference of `fluxc::routed_attention`: per request, the reference of its branch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fluxc.kernels.attention.reference import attention
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
) -> Tensor:
    """Full attention where route[b], else the sparse kind -> [B,S,H,Dv]. Streaming is triangle with last = 0."""
    how: dict[str, Any] = {"scale": scale, "layer": layer, "softcap": softcap, "sink_logits": sink_logits}
    full = attention(q, k, v, **how)
    last = last if kind == "triangle" else 0
    sizes: dict[str, Any] = {"sink": sink, "window": window, "last": last, "decode_full": decode_full}
    sparse = triangle_attention(q, k, v, prompt_lens, **sizes, **how)
    return torch.where(route[:, None, None, None], full, sparse)
