"""Reference of `fluxc::router`: the pool's reference, then the encoder and the head in plain torch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fluxc.kernels.router_pool.reference import router_pool


def router(q: Tensor, prompt_lens: Tensor, *weights: Tensor, pool: int) -> Tensor:
    """Logits [B,2], full first, of q [B,H,S,D]; weights: weight and bias of encoder.0, .2, head.0, .2 and .4."""
    x = router_pool(q, prompt_lens, pool=pool)
    w0, b0, w1, b1, w2, b2, w3, b3, w4, b4 = (w.to(x.dtype) for w in weights)
    encoded = F.linear(F.silu(F.linear(x, w0, b0)), w1, b1)
    return F.linear(F.silu(F.linear(F.silu(F.linear(encoded, w2, b2)), w3, b3)), w4, b4)
