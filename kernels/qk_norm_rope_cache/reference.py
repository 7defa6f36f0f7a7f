"""Reference of `fluxc::qk_norm_rope_cache`: its parts one after the other, fp32 or wider."""

from __future__ import annotations

import torch
from torch import Tensor

from fluxc.kernels.kv_write.reference import kv_write
from fluxc.kernels.router_pool.reference import router_pool


def qk_norm_rope_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    cache: Tensor,
    slots: Tensor,
    prompt_lens: Tensor,
    *,
    eps: float,
    pool: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normed and turned q [B,H,S,D] and k [B,Hk,S,D], and the pooled q [B,D]; writes k and v to the cache."""
    wide = torch.promote_types(q.dtype, torch.float32)
    normed = normalised(q.to(wide), q_weight, eps)
    turned, keys = (turn(x, cos.to(wide), sin.to(wide)) for x in (normed, normalised(k.to(wide), k_weight, eps)))
    kv_write(cache, keys.to(cache.dtype), v, slots)
    return turned, keys, router_pool(normed, prompt_lens, pool=pool) if pool else normed.new_empty(0, q.shape[3])


def normalised(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """RMSNorm of each head of x [B,H,S,D], or x itself."""
    if weight is None:
        return x
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.to(x.dtype)


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on the first R columns of x [B,H,S,D], with cos and sin [B,S,R]."""
    width = cos.shape[-1]
    turning, rest = x[..., :width], x[..., width:]
    first, second = turning.chunk(2, -1)
    turned = turning * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]
    return torch.cat([turned, rest], -1)
