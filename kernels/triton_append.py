"""Append attention in Triton: a further turn over the slots of a paged cache and over its own keys.

A program computes a tile of a turn's rows of one head: first the pages of the cache, whose slots it turns back into
positions (kernels/schemas.py), then the turn's own tiles of keys. Lengths, pages, sinks and windows are read on the
device: one launch serves full layers and rings, wrapped or not.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fluxc.kernels import triton_config as config
from fluxc.kernels.schemas import PAGE
from fluxc.kernels.triton_decode import LOG2E, LOG2E_T, _capped
from fluxc.kernels.triton_decode import unsupported as unsupported_cache
from fluxc.kernels.triton_launch import input_precision, interpreted


@triton.jit
def _add(acc, m, total, q, k, v, seen, scale, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr):
    """One tile of keys and values [N,WIDTH], where seen [M,N], added to the running output of a tile of rows."""
    s = _capped(tl.dot(q, k.T, input_precision=PRECISION), scale, SOFTCAP)
    s = tl.where(seen, s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, 1))
    shift = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(s - shift[:, None])
    alpha = tl.exp2(m - shift)
    total = total * alpha + tl.sum(p, 1)
    return tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION), m_new, total


@triton.jit(do_not_specialize=("rows", "pages", "columns", "table_row"))
def append_kernel(q, k, v, cache, table, lens, starts, sinks, windows, sink_logits, out, scale, q_batch, q_head,
                  q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, table_row, heads, kv_heads, rows, pages,
                  columns, D: tl.constexpr, WIDTH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                  PAGE: tl.constexpr, SINK_LOGITS: tl.constexpr, SOFTCAP: tl.constexpr,
                  PRECISION: tl.constexpr):  # fmt: skip
    """q [B,H,S,D], k and v [B,Hk,S,D], cache [pages,2,Hk,PAGE,D], table i32[B,columns], lens i32[B], starts, sinks and
    windows i64[B] -> out [B,S,H,D], contiguous. `scale` includes log2(e). A length past the table, or a page past the
    cache, is not read and gives NaN: the host does not see the values."""
    row = tl.program_id(0) * BM
    h = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    hk = h // (heads // kv_heads)
    length = tl.load(lens + b)
    start = tl.load(starts + b).to(tl.int32)
    sink = tl.load(sinks + b).to(tl.int32)
    window = tl.load(windows + b).to(tl.int32)
    r = row + tl.arange(0, BM)
    c = tl.arange(0, WIDTH)
    i = (start + r)[:, None]
    n = tl.arange(0, BN)
    slot_in_page = tl.arange(0, PAGE)
    at = q + b * q_batch + h.to(tl.int64) * q_head + r.to(tl.int64)[:, None] * q_row + c[None, :]
    b_q = tl.load(at, mask=(r < rows)[:, None] & (c < D)[None, :], other=0.0)
    m = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    if SINK_LOGITS:
        m = tl.zeros([BM], tl.float32) + tl.load(sink_logits + h).to(tl.float32) * LOG2E_T
        total += 1.0
    acc = tl.zeros([BM, WIDTH], tl.float32)
    spoiled = tl.where((length < 0) | (length > columns * PAGE) | (start < 0) | (window < 0), float("nan"), 0.0)
    for page in tl.range(0, tl.minimum(tl.cdiv(length, PAGE), columns)):
        slot = page * PAGE + slot_in_page
        number = tl.load(table + b * table_row + page)
        known = (number >= 0) & (number < pages)
        spoiled += tl.where(known, 0.0, float("nan"))
        keep = slot < tl.where(known, length, 0)
        inside = keep[:, None] & (c < D)[None, :]
        base = cache + (number.to(tl.int64) * 2 * kv_heads + hk) * (PAGE * D) + slot_in_page[:, None] * D + c[None, :]
        b_k = tl.load(base, mask=inside, other=0.0)
        b_v = tl.load(base + kv_heads * (PAGE * D), mask=inside, other=0.0)
        # In a ring the newest position before the turn that falls on this slot; nothing moves while window is 0.
        newest = start - 1 - (start - 1 - slot) % tl.maximum(window, 1)
        position = tl.where((window == 0) | (slot < sink), slot, newest)[None, :]
        seen = keep[None, :] & ((window == 0) | (position < sink) | (i - position < window))
        acc, m, total = _add(acc, m, total, b_q, b_k, b_v, seen, scale, SOFTCAP, PRECISION)
    hidden = ((window > 0) & (start >= sink)).to(tl.int32)
    first = tl.maximum(row - window + 1, 0) // BN * hidden
    for tile in tl.range(first, tl.cdiv(tl.minimum(row + BM, rows), BN)):
        j = tile * BN + n
        inside = (j < rows)[:, None] & (c < D)[None, :]
        j64 = j.to(tl.int64)[:, None]
        b_k = tl.load(k + b * k_batch + hk.to(tl.int64) * k_head + j64 * k_row + c[None, :], mask=inside, other=0.0)
        b_v = tl.load(v + b * v_batch + hk.to(tl.int64) * v_head + j64 * v_row + c[None, :], mask=inside, other=0.0)
        position = (start + j)[None, :]
        seen = (position <= i) & ((window == 0) | (position < sink) | (i - position < window))
        acc, m, total = _add(acc, m, total, b_q, b_k, b_v, seen, scale, SOFTCAP, PRECISION)
    acc = acc / (total + spoiled)[:, None]
    to = out + ((b * rows + r)[:, None] * heads + h) * D + c[None, :]
    tl.store(to, acc.to(out.dtype.element_ty), mask=(r < rows)[:, None] & (c < D)[None, :])


def append_attention(
    q: Tensor, k: Tensor, v: Tensor, cache: Tensor, page_table: Tensor, lens: Tensor, start: Tensor, sinks: Tensor,
    windows: Tensor, *, scale: float, softcap: float = 0.0, sink_logits: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`fluxc::append_attention` -> [B,S,H,D], contiguous."""
    batch, heads, rows, width = q.shape
    tiles = config.append_for(interpreted(), width)
    out = torch.empty(batch, rows, heads, width, dtype=q.dtype, device=q.device)
    append_kernel[(triton.cdiv(rows, tiles.rows), heads, batch)](
        q, k, v, cache, page_table, lens, start, sinks, windows, sink_logits, out, scale * LOG2E, *q.stride()[:3],
        *k.stride()[:3], *v.stride()[:3], page_table.stride(0), heads, cache.shape[2], rows, cache.shape[0],
        page_table.shape[1], D=width, WIDTH=config.padded(width), BM=tiles.rows, BN=tiles.keys, PAGE=PAGE,
        SINK_LOGITS=sink_logits is not None, SOFTCAP=float(softcap), PRECISION=input_precision(q),
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return out


def unsupported(q: Tensor, k: Tensor, v: Tensor, cache: Tensor, page_table: Tensor, lens: Tensor) -> str | None:
    """Why the kernel cannot serve this call, or None if it can."""
    if any(x.stride(-1) != 1 for x in (k, v)):
        return "the last dimension of k or v is not contiguous"
    return unsupported_cache(q, cache, page_table, lens)
