"""Head norms, RoPE, KV write and the router's pool in Triton: from the projections to attention in one pass.

A program takes a tile of tokens of one head of q, k or v. Tiles of q that lie in the pooled rows also sum them; a
second, small sum adds those up in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fluxc.kernels import triton_config as config
from fluxc.kernels.schemas import PAGE
from fluxc.kernels.triton_launch import interpreted

ROWS = 32


@triton.jit
def _normed(x, weight, i, stride, rows, c, scale, D: tl.constexpr, HAS_WEIGHT: tl.constexpr, DTYPE: tl.constexpr):
    """Columns c of rows i of one head, times the row's `scale` and the weight, fp32."""
    inside = (i < rows)[:, None] & (c < D)[None, :]
    value = tl.load(x + i.to(tl.int64)[:, None] * stride + c[None, :], mask=inside, other=0.0).to(tl.float32)
    if HAS_WEIGHT:
        w = tl.load(weight + c, mask=c < D, other=0.0).to(tl.float32)
        value = ((value * scale[:, None]).to(DTYPE).to(tl.float32) * w[None, :]).to(DTYPE).to(tl.float32)
    return value


@triton.jit
def _scale(x, i, stride, rows, c, eps, D: tl.constexpr):
    """1 / RMS of rows i of one head."""
    inside = (i < rows)[:, None] & (c < D)[None, :]
    value = tl.load(x + i.to(tl.int64)[:, None] * stride + c[None, :], mask=inside, other=0.0).to(tl.float32)
    return tl.rsqrt(tl.sum(value * value, 1) / D + eps)


@triton.jit
def _turned(x, weight, cos, sin, i, stride, angle_row, rows, c, scale, value, D: tl.constexpr, R: tl.constexpr,
            HAS_WEIGHT: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """RoPE of `value`, the normed rows i: columns c and c + R/2 turn together."""
    partner = tl.where(c < R // 2, c + R // 2, tl.where(c < R, c - R // 2, c))
    other = _normed(x, weight, i, stride, rows, partner, scale, D, HAS_WEIGHT, DTYPE)
    other = tl.where((c < R // 2)[None, :], -other, other)
    seen = (i < rows)[:, None] & (c < R)[None, :]
    at = i.to(tl.int64)[:, None] * angle_row + c[None, :]
    b_cos = tl.load(cos + at, mask=seen, other=1.0).to(tl.float32)
    b_sin = tl.load(sin + at, mask=seen, other=0.0).to(tl.float32)
    return value * b_cos + other * b_sin


@triton.jit(do_not_specialize=("heads", "kv_heads", "rows", "capacity", "pool"))
def qkv_kernel(q, k, v, q_weight, k_weight, cos, sin, cache, slots, lens, q_out, k_out, sums, q_batch, q_head, q_row,
               k_batch, k_head, k_row, v_batch, v_head, v_row, cos_batch, cos_row, sin_batch, sin_row, slots_batch,
               heads, kv_heads, rows, capacity, pool, eps, D: tl.constexpr, WIDTH: tl.constexpr, R: tl.constexpr,
               BM: tl.constexpr, PARTS: tl.constexpr, PAGE: tl.constexpr, Q_NORM: tl.constexpr,
               K_NORM: tl.constexpr):  # fmt: skip
    """Programs (token tile, head of q, then k, then v, request). sums fp32 [B,H,2*PARTS,D], zero: of each tile's rows
    that are pooled, at the start and at the end of the prompt; with PARTS 0 there are none, and lens is not read. cos
    and sin have one row stride."""
    tile = tl.program_id(0)
    head = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    i = tile * BM + tl.arange(0, BM)
    c = tl.arange(0, WIDTH)
    inside = (i < rows)[:, None] & (c < D)[None, :]
    i64 = i.to(tl.int64)[:, None]
    DTYPE: tl.constexpr = q_out.dtype.element_ty
    cos += b * cos_batch
    sin += b * sin_batch
    if head < heads:
        x = q + b * q_batch + head.to(tl.int64) * q_head
        scale = _scale(x, i, q_row, rows, c, eps, D)
        value = _normed(x, q_weight, i, q_row, rows, c, scale, D, Q_NORM, DTYPE)
        out = _turned(x, q_weight, cos, sin, i, q_row, cos_row, rows, c, scale, value, D, R, Q_NORM, DTYPE)
        tl.store(q_out + ((b * rows + i64) * heads + head) * D + c[None, :], out.to(DTYPE), mask=inside)
        if PARTS > 0:
            length = tl.load(lens + b).to(tl.int32)
            length = tl.minimum(tl.maximum(length, 0), rows)
            part = sums + ((b * heads + head) * 2 * PARTS) * D + c
            if tile * BM < tl.minimum(pool, length):
                early = (i < tl.minimum(pool, length))[:, None]
                tl.store(part + tile * D, tl.sum(tl.where(early, value, 0.0), 0), mask=c < D)
            first = tl.maximum(length - pool, 0)
            if (tile * BM < length) & (tile * BM + BM > first):
                late = ((i >= first) & (i < length))[:, None]
                at = PARTS + tile - first // BM
                tl.store(part + at * D, tl.sum(tl.where(late, value, 0.0), 0), mask=c < D)
    else:
        slot = tl.load(slots + b * slots_batch + i, mask=i < rows, other=-1)
        kept = ((slot >= 0) & (slot < capacity))[:, None] & (c < D)[None, :]
        hk = (head - heads) % kv_heads
        is_v = (head - heads) // kv_heads
        to = cache + (((slot // PAGE * 2 + is_v) * kv_heads + hk) * PAGE + slot % PAGE)[:, None] * D + c[None, :]
        if is_v == 0:
            y = k + b * k_batch + hk.to(tl.int64) * k_head
            k_scale = _scale(y, i, k_row, rows, c, eps, D)
            key = _normed(y, k_weight, i, k_row, rows, c, k_scale, D, K_NORM, DTYPE)
            key = _turned(y, k_weight, cos, sin, i, k_row, cos_row, rows, c, k_scale, key, D, R, K_NORM, DTYPE)
            tl.store(k_out + ((b * rows + i64) * kv_heads + hk) * D + c[None, :], key.to(DTYPE), mask=inside)
            tl.store(to, key.to(DTYPE), mask=kept)
        else:
            b_v = tl.load(v + b * v_batch + hk.to(tl.int64) * v_head + i64 * v_row + c[None, :], mask=inside, other=0.0)
            tl.store(to, b_v, mask=kept)


def qk_norm_rope_cache(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor, sin: Tensor,
    cache: Tensor, slots: Tensor, prompt_lens: Tensor, *, eps: float, pool: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`fluxc::qk_norm_rope_cache` -> (q, k, pooled)."""
    (batch, heads, rows, width), kv_heads = q.shape, k.shape[1]
    tile = 16 if interpreted() else ROWS
    q_out, k_out = (torch.empty(batch, rows, n, width, dtype=q.dtype, device=q.device) for n in (heads, kv_heads))
    parts = triton.cdiv(min(pool, rows), tile) + 1 if pool else 0
    sums = torch.zeros(batch if pool else 0, heads, 2 * parts, width, dtype=torch.float32, device=q.device)
    qkv_kernel[(triton.cdiv(rows, tile), heads + 2 * kv_heads, batch)](
        q, k, v, q_weight, k_weight, cos, sin, cache, slots, prompt_lens, q_out, k_out, sums, *q.stride()[:3],
        *k.stride()[:3], *v.stride()[:3], *cos.stride()[:2], *sin.stride()[:2], slots.stride(0), heads, kv_heads,
        rows, cache.shape[0] * PAGE, pool, eps, D=width, WIDTH=config.padded(width), R=cos.shape[-1], BM=tile,
        PARTS=parts, PAGE=PAGE, Q_NORM=q_weight is not None, K_NORM=k_weight is not None, num_warps=4,
    )  # fmt: skip
    pooled = _means(sums, prompt_lens, rows, pool) if pool else sums.new_empty(0, width)
    return q_out.transpose(1, 2), k_out.transpose(1, 2), pooled


def _means(sums: Tensor, prompt_lens: Tensor, rows: int, pool: int) -> Tensor:
    """[B,D] from the sums of heads and tiles; NaN for prompts out of range."""
    taken = 2 * sums.shape[1] * prompt_lens.clamp(max=pool)
    valid = (prompt_lens >= 1) & (prompt_lens <= rows)
    return sums.sum((1, 2)) / torch.where(valid, taken, torch.nan)[:, None]


def unsupported(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor, sin: Tensor,
    cache: Tensor, slots: Tensor, prompt_lens: Tensor,
) -> str | None:  # fmt: skip
    """Why the kernel cannot serve this call, or None if it can."""
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"dtype {q.dtype} is not fp16, bf16 or fp32"
    if interpreted() and q.dtype == torch.bfloat16:
        return "bf16 is wrong in the Triton interpreter"
    weights = [w for w in (q_weight, k_weight) if w is not None]
    if any(x.stride(-1) != 1 for x in (q, k, v, cos, sin, slots, *weights)) or cos.stride(1) != sin.stride(1):
        return "the last dimension of an operand is not contiguous"
    return None if cache.is_contiguous() else "the cache is not contiguous"
