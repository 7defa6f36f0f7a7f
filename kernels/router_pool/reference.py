"""Reference of `fluxc::router_pool`: plain torch, fp32 or wider."""

from __future__ import annotations

import torch
from torch import Tensor


def router_pool(q: Tensor, prompt_lens: Tensor, *, pool: int) -> Tensor:
    """Mean of the prefix mean and the suffix mean of q [B,H,S,D], over heads and `pool` rows -> [B,D].

    prompt_lens i64[B]. Rows in both prefix and suffix count twice, as in the paper (section "Layer Router").
    """
    q = q.double() if q.dtype == torch.float64 else q.float()
    pooled = []
    for b, length in enumerate(prompt_lens.tolist()):
        prefix = q[b, :, : min(pool, length)]
        suffix = q[b, :, max(0, length - pool) : length]
        pooled.append(torch.cat([prefix, suffix], 1).mean((0, 1)))
    return torch.stack(pooled)
