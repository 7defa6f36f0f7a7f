"""Reference of `fluxc::append_attention`: every slot gets its position, then a dense mask; plain torch in fp32."""

from __future__ import annotations

import torch
from torch import Tensor

from fluxc.kernels.decode_attention.reference import cached
from fluxc.kernels.dense_reference import masked_attention, streaming_set


def slot_position(slot: int, start: int, sink: int, window: int) -> int:
    """The position whose key the slot holds before a turn that begins at `start` (kernels/schemas.py)."""
    if window == 0 or slot < sink:
        return slot
    return max(p for p in range(sink, start) if (p - sink) % window == slot - sink)


def append_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: Tensor,
    page_table: Tensor,
    lens: Tensor,
    start: Tensor,
    sinks: Tensor,
    windows: Tensor,
    *,
    scale: float,
    layer: int,
    softcap: float = 0.0,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Attention of a turn, q [B,H,S,D] with its own k, v [B,Hk,S,D], over cached slots and itself -> [B,S,H,D]."""
    row, rows = torch.arange(q.shape[2], device=q.device), []
    numbers = zip(lens.tolist(), start.tolist(), sinks.tolist(), windows.tolist(), strict=True)
    for b, (slots, begin, sink, window) in enumerate(numbers):
        old_k, old_v = cached(cache, page_table[b], slots)
        old = torch.tensor([slot_position(s, begin, sink, window) for s in range(slots)], dtype=torch.int64)
        i, j = begin + row[None, :, None], torch.cat([old.to(q.device), begin + row])[None, None]
        seen = streaming_set(i, j, sink, window) if window else j <= i
        keys, values = torch.cat([old_k, k[b, None]], 2), torch.cat([old_v, v[b, None]], 2)
        rows.append(masked_attention(q[b, None], keys, values, seen, scale, softcap, sink_logits))
    return torch.cat(rows)
