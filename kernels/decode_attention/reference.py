"""Reference of `fluxc::decode_attention`: one slot at a time out of the pages, plain torch, fp32 or wider."""

from __future__ import annotations

import torch
from torch import Tensor

from fluxc.kernels.dense_reference import masked_attention
from fluxc.kernels.schemas import PAGE


def cached(cache: Tensor, pages: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """Keys and values [1,Hk,slots,D] of the first slots of a request, whose pages are i32[P]."""
    found = [cache[int(pages[slot // PAGE]), :, :, slot % PAGE] for slot in range(slots)]
    k, v = torch.stack(found, 2).unsqueeze(1) if found else cache.new_zeros(2, 1, cache.shape[2], 0, cache.shape[4])
    return k, v


def decode_attention(
    q: Tensor,
    cache: Tensor,
    page_table: Tensor,
    lens: Tensor,
    *,
    scale: float,
    layer: int,
    softcap: float = 0.0,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Attention of one query a request, q [B,H,D], over its first lens[b] slots -> [B,H,D]; zeros without slots."""
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    for b, slots in enumerate(lens.tolist()):
        if slots:
            k, v = cached(cache, page_table[b], slots)
            seen = torch.ones(1, 1, slots, dtype=torch.bool, device=q.device)
            out[b] = masked_attention(q[b, None, :, None], k, v, seen, scale, softcap, sink_logits)[0, 0]
    return out
