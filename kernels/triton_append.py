"""Append attention in Triton: a further turn over the slots of a paged cache and over its own keys.

A program computes a tile of a turn's rows, those of all query heads of a key head side by side: first the pages of the
cache, whose slots it turns back into positions (kernels/schemas.py), then the turn's own tiles of keys. Lengths, pages,
sinks and windows are read on the device: one launch serves full layers and rings, wrapped or not. Where a short turn
gives too few programs for the device, several share the pages of a tile, and a second kernel adds their parts up.
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

LEAST_PAGES = 8  # a part of fewer is not worth its own program
COMBINED = 16  # rows of a program that adds parts up


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


@triton.jit(do_not_specialize=("rows", "pages", "columns", "table_row", "n_parts"))
def append_kernel(q, k, v, cache, table, lens, starts, sinks, windows, sink_logits, out, parts, sums, scale, q_batch,
                  q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, table_row, heads, kv_heads, rows,
                  pages, columns, n_parts, D: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr,
                  BM: tl.constexpr, BN: tl.constexpr, PAGE: tl.constexpr, SPLIT: tl.constexpr,
                  SINK_LOGITS: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """q [B,H,S,D], k and v [B,Hk,S,D], cache [pages,2,Hk,PAGE,D], table i32[B,columns], lens i32[B], starts, sinks and
    windows i64[B] -> out [B,S,H,D], contiguous. `scale` includes log2(e). A length past the table, or a page past the
    cache, is not read and gives NaN: the host does not see the values.

    With SPLIT, instead of out: parts fp32 [n_parts,B,H,S,D], sums fp32 [2,n_parts,B,H,S]: maxima, then totals."""
    part = tl.program_id(0) % n_parts
    first = tl.program_id(0) // n_parts * BM
    hk = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    length = tl.load(lens + b)
    start = tl.load(starts + b).to(tl.int32)
    sink = tl.load(sinks + b).to(tl.int32)
    window = tl.load(windows + b).to(tl.int32)
    row = first // GROUP
    stop = tl.minimum((first + BM - 1) // GROUP + 1, rows)
    r = (first + tl.arange(0, BM)) // GROUP
    h = hk * GROUP + (first + tl.arange(0, BM)) % GROUP
    c = tl.arange(0, WIDTH)
    i = (start + r)[:, None]
    n = tl.arange(0, BN)
    slot_in_page = tl.arange(0, PAGE)
    at = q + b * q_batch + h.to(tl.int64)[:, None] * q_head + r.to(tl.int64)[:, None] * q_row + c[None, :]
    b_q = tl.load(at, mask=(r < rows)[:, None] & (c < D)[None, :], other=0.0)
    m = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    if SINK_LOGITS:
        m = tl.where(part == 0, tl.load(sink_logits + h).to(tl.float32) * LOG2E_T, m)
        total = tl.where(part == 0, total + 1.0, total)
    acc = tl.zeros([BM, WIDTH], tl.float32)
    spoiled = tl.where((length < 0) | (length > columns * PAGE) | (start < 0) | (window < 0), float("nan"), 0.0)
    filled = tl.minimum(tl.cdiv(length, PAGE), columns)
    share = tl.cdiv(filled, n_parts)
    for page in tl.range(part * share, tl.minimum(part * share + share, filled)):
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
    first_tile = tl.maximum(row - window + 1, 0) // BN * hidden
    for tile in tl.range(first_tile, tl.where(part == n_parts - 1, tl.cdiv(stop, BN), 0)):
        j = tile * BN + n
        inside = (j < rows)[:, None] & (c < D)[None, :]
        j64 = j.to(tl.int64)[:, None]
        b_k = tl.load(k + b * k_batch + hk.to(tl.int64) * k_head + j64 * k_row + c[None, :], mask=inside, other=0.0)
        b_v = tl.load(v + b * v_batch + hk.to(tl.int64) * v_head + j64 * v_row + c[None, :], mask=inside, other=0.0)
        position = (start + j)[None, :]
        seen = (position <= i) & ((window == 0) | (position < sink) | (i - position < window))
        acc, m, total = _add(acc, m, total, b_q, b_k, b_v, seen, scale, SOFTCAP, PRECISION)
    total += spoiled
    stored = (r < rows)[:, None] & (c < D)[None, :]
    if SPLIT:
        batch = tl.num_programs(2)
        to = ((part * batch + b) * heads + h) * rows + r
        tl.store(parts + to[:, None] * D + c[None, :], acc, mask=stored)
        tl.store(sums + to, m, mask=r < rows)
        tl.store(sums + n_parts * batch.to(tl.int64) * heads * rows + to, total, mask=r < rows)
    else:
        to = out + ((b * rows + r) * heads + h)[:, None] * D + c[None, :]
        tl.store(to, (acc / total[:, None]).to(out.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=("heads", "rows", "lines", "n_parts"))
def combine_kernel(parts, sums, out, heads, rows, lines, n_parts, D: tl.constexpr, WIDTH: tl.constexpr,
                   BM: tl.constexpr):  # fmt: skip
    """parts fp32 [n_parts,B,H,S,D] and sums fp32 [2,n_parts,B,H,S], `lines` = B x H x S -> out [B,S,H,D]."""
    x = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    c = tl.arange(0, WIDTH)
    stored = (x < lines)[:, None] & (c < D)[None, :]
    m = tl.full([BM], float("-inf"), tl.float32)
    for part in tl.range(0, n_parts):
        m = tl.maximum(m, tl.load(sums + part * lines + x, mask=x < lines, other=0.0))
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, WIDTH], tl.float32)
    for part in tl.range(0, n_parts):
        factor = tl.exp2(tl.load(sums + part * lines + x, mask=x < lines, other=0.0) - m)
        total += tl.load(sums + (n_parts + part) * lines + x, mask=x < lines, other=1.0) * factor
        acc += tl.load(parts + (part * lines + x)[:, None] * D + c[None, :], mask=stored, other=0.0) * factor[:, None]
    to = (x // (heads * rows) * rows + x % rows) * heads + x // rows % heads
    tl.store(out + to[:, None] * D + c[None, :], (acc / total[:, None]).to(out.dtype.element_ty), mask=stored)


def append_attention(
    q: Tensor, k: Tensor, v: Tensor, cache: Tensor, page_table: Tensor, lens: Tensor, start: Tensor, sinks: Tensor,
    windows: Tensor, *, scale: float, softcap: float = 0.0, sink_logits: Tensor | None = None, parts: int = 0,
) -> Tensor:  # fmt: skip
    """`fluxc::append_attention` -> [B,S,H,D], contiguous. `parts`: programs that share a tile's pages, 0 for as many as
    the device needs."""
    batch, heads, rows, width = q.shape
    group = heads // k.shape[1]
    tiles = config.append_for(_capability(q), width)
    n_tiles = triton.cdiv(rows * group, tiles.rows)
    parts = parts or _parts(q, n_tiles * k.shape[1] * batch, page_table.shape[1])
    out = torch.empty(batch, rows, heads, width, dtype=q.dtype, device=q.device)
    lines, split = batch * heads * rows, parts > 1
    scratch = torch.empty(parts * lines * (width + 2) if split else 0, dtype=torch.float32, device=q.device)
    own, sums = scratch[: parts * lines * width], scratch[parts * lines * width :]
    append_kernel[(n_tiles * parts, k.shape[1], batch)](
        q, k, v, cache, page_table, lens, start, sinks, windows, sink_logits, out, own, sums, scale * LOG2E,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], page_table.stride(0), heads, cache.shape[2], rows,
        cache.shape[0], page_table.shape[1], parts, D=width, WIDTH=config.padded(width), GROUP=group, BM=tiles.rows,
        BN=tiles.keys, PAGE=PAGE, SPLIT=split, SINK_LOGITS=sink_logits is not None, SOFTCAP=float(softcap),
        PRECISION=input_precision(q), num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    if split:
        combine_kernel[(triton.cdiv(lines, COMBINED),)](
            own, sums, out, heads, rows, lines, parts, D=width, WIDTH=config.padded(width), BM=COMBINED, num_warps=4
        )
    return out


def _parts(q: Tensor, programs: int, columns: int) -> int:
    """One wave of the device at most, and pages enough for each: known from shapes alone."""
    if interpreted():
        return 1
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count
    return max(1, min(processors // programs, columns // LEAST_PAGES))


def _capability(q: Tensor) -> int:
    """10 x major + minor where 16-bit operands are multiplied on a GPU; 0 elsewhere, 1 in the interpreter."""
    if interpreted():
        return 1
    major, minor = torch.cuda.get_device_capability(q.device)
    return 0 if q.dtype == torch.float32 else 10 * major + minor


def unsupported(q: Tensor, k: Tensor, v: Tensor, cache: Tensor, page_table: Tensor, lens: Tensor) -> str | None:
    """Why the kernel cannot serve this call, or None if it can."""
    if any(x.stride(-1) != 1 for x in (k, v)):
        return "the last dimension of k or v is not contiguous"
    return unsupported_cache(q, cache, page_table, lens)
