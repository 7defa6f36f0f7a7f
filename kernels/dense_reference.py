"""What the attention references share: softmax over a dense mask, in fp32 or wider. For tests and reading only."""

from __future__ import annotations

import torch
from torch import Tensor


def positions(q: Tensor, k: Tensor, q_start: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Absolute positions of the queries, i [B,S,1], and of the keys, j [1,1,T]."""
    start = torch.zeros(q.shape[0], dtype=torch.int64, device=q.device) if q_start is None else q_start
    row = torch.arange(q.shape[2], device=q.device)
    return (start[:, None] + row)[:, :, None], torch.arange(k.shape[2], device=q.device)[None, None]


def streaming_set(i: Tensor, j: Tensor, sink: int, window: int) -> Tensor:
    """Which keys j each query i sees under (sink, window): bool [B,S,T]."""
    return (j <= i) & ((j < sink) | (i - j < window))


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float, softcap: float, sink_logits: Tensor | None
) -> Tensor:
    """Attention of q [B,H,S,D] over k [B,Hk,T,D], v [B,Hk,T,Dv] where visible [B,S,T] -> [B,S,H,Dv] in q's dtype."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    groups = q.shape[1] // k.shape[1]
    k, v = (x.to(wide).repeat_interleave(groups, 1) for x in (k, v))
    scores = q.to(wide) @ k.transpose(-1, -2) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible[:, None], -torch.inf)
    if sink_logits is not None:
        extra = sink_logits.to(wide)[None, :, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, extra], -1)
    weights = scores.softmax(-1)[..., : k.shape[2]]
    return (weights @ v).to(q.dtype).transpose(1, 2).contiguous()
