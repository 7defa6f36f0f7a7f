"""Reference of `fluxc::block_attention`: the lists as a dense mask, plain torch, fp32 or wider."""

from __future__ import annotations

import torch
from torch import Tensor

from fluxc.kernels.dense_reference import masked_attention


def visible(block_index: Tensor, block_count: Tensor, rows: int, block: int) -> Tensor:
    """Which keys each query sees: bool [B,H,S,S]."""
    used = torch.arange(block_index.shape[-1], device=block_index.device) < block_count[..., None]
    blocks = torch.zeros(*block_count.shape, block_count.shape[-1] + 1, dtype=torch.bool, device=block_index.device)
    spare = torch.where(used, block_index.long(), block_count.shape[-1])
    seen = blocks.scatter(-1, spare, True)[..., :-1]
    seen = seen.repeat_interleave(block, -1).repeat_interleave(block, -2)[..., :rows, :rows]
    return seen & torch.ones_like(seen).tril()


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_index: Tensor,
    block_count: Tensor,
    *,
    scale: float,
    layer: int,
    block: int,
    softcap: float = 0.0,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Causal attention over the listed blocks of keys -> [B,S,H,Dv]; rows that see no key are 0."""
    seen = visible(block_index, block_count, q.shape[2], block)
    heads, group = [], q.shape[1] // k.shape[1]
    for h in range(q.shape[1]):
        kv = slice(h // group, h // group + 1)
        sinks = None if sink_logits is None else sink_logits[h : h + 1]
        out = masked_attention(q[:, h : h + 1], k[:, kv], v[:, kv], seen[:, h], scale, softcap, sinks)
        heads.append(out.nan_to_num(0) * seen[:, h].any(-1)[:, :, None, None])
    return torch.cat(heads, 2)
