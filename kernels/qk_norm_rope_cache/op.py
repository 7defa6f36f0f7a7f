"""`fluxc::qk_norm_rope_cache`: head norms, RoPE, KV write and the router's pool in one pass after the projections."""

from __future__ import annotations

import torch
from torch import Tensor

from fluxc.errors import UserError
from fluxc.kernels.define import Provider, choose, triton_provider
from fluxc.kernels.explicit import sum_dtype
from fluxc.kernels.kv_write import op as kv_write
from fluxc.kernels.qk_norm_rope_cache.reference import turn
from fluxc.kernels.router_pool import op as router_pool
from fluxc.kernels.schemas import NAMESPACE, SCHEMAS

OP = "qk_norm_rope_cache"


def define() -> None:
    """Define torch.ops.fluxc.qk_norm_rope_cache."""
    op = torch.library.custom_op(f"{NAMESPACE}::{OP}", run, mutates_args={"cache"}, schema=SCHEMAS[OP])
    op.register_fake(_fake)


def providers() -> tuple[Provider, ...]:
    """In order of preference."""
    return triton_provider(OP), Provider("torch", lambda *args, **kwargs: None, _composed)


def run(
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
    """(q, k, pooled) by the first provider that takes the call; raises UserError for arguments that do not fit."""
    if pool:
        router_pool.check(OP, q, prompt_lens, pool)
    kv_write.check(OP, cache, k, v, slots)
    _check(q, k, q_weight, k_weight, cos, sin)
    args = (q, k, v, q_weight, k_weight, cos, sin, cache, slots, prompt_lens)
    return choose(OP, providers(), *args, eps=eps, pool=pool).run(*args, eps=eps, pool=pool)


def rows_first(x: Tensor) -> Tensor:
    """Memory for an output like x [B,H,S,D], laid out [B,S,H,D]."""
    B, H, S, D = x.shape
    return x.new_empty(B, S, H, D).transpose(1, 2)


def nothing_pooled(q: Tensor) -> Tensor:
    """The third result of a call with pool 0: [0,D]."""
    return q.new_empty(0, q.shape[3], dtype=sum_dtype(q.dtype))


def _fake(q: Tensor, k: Tensor, *args: object, eps: float, pool: int) -> tuple[Tensor, Tensor, Tensor]:
    pooled = q.new_empty(q.shape[0], q.shape[3], dtype=sum_dtype(q.dtype)) if pool else nothing_pooled(q)
    return rows_first(q), rows_first(k), pooled


def _composed(
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
    normed = _normalised(q, q_weight, eps)
    turned = rows_first(q).copy_(turn(normed, cos, sin))
    keys = rows_first(k).copy_(turn(_normalised(k, k_weight, eps), cos, sin))
    kv_write.run(cache, keys, v, slots)
    pooled = router_pool.run(normed, prompt_lens, pool=pool) if pool else nothing_pooled(q)
    return turned, keys, pooled


def _normalised(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    if weight is None:
        return x
    wide = x.to(sum_dtype(x.dtype))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def _check(q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor, sin: Tensor) -> None:
    B, _, S, D = q.shape
    if k.shape[0] != B or k.shape[2:] != q.shape[2:] or k.dtype != q.dtype:
        raise UserError(f"fluxc::{OP}: k is {k.dtype} {tuple(k.shape)}, q is {q.dtype} {tuple(q.shape)}")
    R = cos.shape[-1]
    if R % 2 or not 0 < R <= D:
        raise UserError(f"fluxc::{OP}: cos has {R} columns, must be even and at most {D}")
    wanted = {"q_weight": (D,), "k_weight": (D,), "cos": (B, S, R), "sin": (B, S, R)}
    for (name, shape), x in zip(wanted.items(), (q_weight, k_weight, cos, sin), strict=True):
        if x is not None and (x.shape != shape or x.dtype != q.dtype):
            raise UserError(f"fluxc::{OP}: {name} is {x.dtype} {tuple(x.shape)}, must be {q.dtype} {shape}")
