"""Reference of `fluxc::block_scores`: every score in memory, the cut found by sorting; plain torch in fp32 or wider."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def chunk_scores(q: Tensor, k: Tensor, scale: float, stride: int, scorer: str) -> Tensor:
    """Scores [B,H,C,C] of chunks of `stride` queries and keys, before the softmax."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    tail = -q.shape[2] % stride
    q, k = (F.pad(x.to(wide), (0, 0, 0, tail)).unflatten(2, (-1, stride)) for x in (q, k))
    if scorer == "pooled":
        return q.mean(3) @ k.mean(3).transpose(-1, -2) * scale
    pairs = torch.einsum("bhmrd,bhnsd->bhmnrs", q, k)
    return pairs.flip(-1).diagonal(dim1=-2, dim2=-1).mean(-1) * scale


def block_sums(q: Tensor, k: Tensor, scale: float, block: int, stride: int, scorer: str) -> Tensor:
    """Weight [B,H,Sb,Sb] of each block of keys for each block of queries."""
    scores = chunk_scores(q, k, scale, stride, scorer)
    chunks, per = scores.shape[2], block // stride
    hidden = torch.ones(chunks, chunks, dtype=torch.bool, device=q.device).triu(1)
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    tail = -chunks % per
    blocks = F.pad(weights, (0, tail, 0, tail)).unflatten(3, (-1, per)).unflatten(2, (-1, per))
    return blocks.sum((3, 5))


def block_scores(
    q: Tensor,
    k: Tensor,
    *,
    scale: float,
    layer: int,
    block: int,
    stride: int,
    threshold: float,
    scorer: str = "antidiagonal",
) -> tuple[Tensor, Tensor]:
    """Key blocks kept for each block of queries, q [B,H,S,D] and k [B,Hk,S,D]: index i32[B,H,Sb,Sb], count i32[B,H,Sb].

    Unused entries of the index are 0.
    """
    sums = block_sums(q, k, scale, block, stride, scorer)
    ordered, order = sums.sort(-1, descending=True)
    needed = ordered.cumsum(-1) - ordered < threshold * sums.sum(-1, keepdim=True)
    kept = torch.zeros_like(needed).scatter(-1, order, needed)
    kept[..., 0] = True
    kept |= torch.eye(sums.shape[-1], dtype=torch.bool, device=q.device)
    kept &= torch.ones_like(kept).tril()
    count = kept.sum(-1)
    index = kept.int().argsort(dim=-1, descending=True, stable=True)
    index = index.masked_fill(torch.arange(index.shape[-1], device=q.device) >= count[..., None], 0)
    return index.int(), count.int()
