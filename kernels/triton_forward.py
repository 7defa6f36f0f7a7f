"""Attention forward in plain Triton: full, windowed, streaming, triangle and routed, on every architecture.

One program computes a tile of query rows of one head over the key tiles that triton_tiles.py lists: first those that
need a mask, then the whole ones in a loop without. Nothing of size rows x keys is stored, no head is repeated.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fluxc.kernels.triton_tiles import COUNTS, dense_rows, masked_tile, tile_ranges, whole_tile

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _load_rows(x, base, b, head, row, stride, n_rows, D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
               TMA: tl.constexpr, BOUND: tl.constexpr):  # fmt: skip
    """[BLOCK, WIDTH] rows of one head from `row` on; columns past D and, with BOUND or TMA, rows past n_rows are 0."""
    if TMA:
        tile = x.load([b, head, row, 0]).reshape(BLOCK, WIDTH)
    else:
        i = tl.arange(0, BLOCK)
        c = tl.arange(0, WIDTH)
        pointers = x + base + row.to(tl.int64) * stride + i[:, None] * stride + c[None, :]
        if BOUND:
            tile = tl.load(pointers, mask=(row + i < n_rows)[:, None] & (c < D)[None, :], other=0.0)
        elif D != WIDTH:
            tile = tl.load(pointers, mask=(c < D)[None, :], other=0.0)
        else:
            tile = tl.load(pointers)
    return tile


@triton.jit
def _softmax(s, m, scale, tile, lower, upper, sink, BN: tl.constexpr, MASKED: tl.constexpr, SPARSE: tl.constexpr,
             SOFTCAP: tl.constexpr):  # fmt: skip
    """exp2 of one key tile's scores against the new running maximum; the maximum; the factor for what came before."""
    factor = scale
    if SOFTCAP != 0.0:
        e = tl.exp2(s * (scale * (2.0 / SOFTCAP)))
        s = (SOFTCAP * LOG2E) * (1.0 - 2.0 / (e + 1.0))
        factor = 1.0
    if MASKED:
        col = tile * BN + tl.arange(0, BN)[None, :]
        s = tl.where(col <= upper[:, None], s, float("-inf"))
        if SPARSE:
            s = tl.where((col >= lower[:, None]) | (col < sink), s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, 1) * factor)
    shift = m_new
    if MASKED:
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
    return tl.exp2(s * factor - shift[:, None]), m_new, tl.exp2(m - shift)


@triton.jit
def _visit(acc, m, total, q, tile, k, v, k_base, v_base, k_stride, v_stride, b, hk, keys, lower, upper, sink, scale,
           D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, BN: tl.constexpr,
           TMA: tl.constexpr, MASKED: tl.constexpr, SPARSE: tl.constexpr, SOFTCAP: tl.constexpr,
           PRECISION: tl.constexpr):  # fmt: skip
    """One key tile added to the running output of a tile of rows."""
    b_k = _load_rows(k, k_base, b, hk, tile * BN, k_stride, keys, D, WIDTH, BN, TMA, MASKED)
    s = tl.dot(q, b_k.T, input_precision=PRECISION)
    p, m, alpha = _softmax(s, m, scale, tile, lower, upper, sink, BN, MASKED, SPARSE, SOFTCAP)
    b_v = _load_rows(v, v_base, b, hk, tile * BN, v_stride, keys, DV, WIDTH_V, BN, TMA, MASKED)
    total = total * alpha + tl.sum(p, 1)
    acc = tl.dot(p.to(b_v.dtype), b_v, acc * alpha[:, None], input_precision=PRECISION)
    return acc, m, total


@triton.jit(do_not_specialize=COUNTS)
def attention_forward(q, k, v, out_ptr, sink_logits_ptr, route_ptr, prompt_ptr, start_ptr, lse_ptr, scale, q_batch,
                      q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, heads, group, batch_heads, rows,
                      keys, n_tiles, sink, window, last, D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr,
                      WIDTH_V: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
                      TMA: tl.constexpr, SPARSE: tl.constexpr, HAS_ROUTE: tl.constexpr, HAS_PROMPT: tl.constexpr,
                      DECODE_FULL: tl.constexpr, HAS_START: tl.constexpr, SINK_LOGITS: tl.constexpr,
                      LSE: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """q [B,H,S,D], k [B,Hk,T,D], v [B,Hk,T,DV] (descriptors with TMA, else pointers) -> out [B,S,H,DV], contiguous.

    With LSE also the log-sum-exp of each row, fp32 [B,H,S]. `scale` includes log2(e). The programs of the last rows,
    which see most keys, are launched first.
    """
    pid = tl.program_id(0)
    row = (n_tiles - 1 - pid // batch_heads) * BM
    b = pid % batch_heads // heads
    h = pid % heads
    hk = h // group
    start = b * 0
    if HAS_START:
        start = tl.load(start_ptr + b).to(tl.int32)
    first_dense, stop_dense = dense_rows(b, route_ptr, prompt_ptr, last, HAS_ROUTE, HAS_PROMPT, DECODE_FULL)
    head, n_sink, edge, body, diag, end = tile_ranges(start + row, start + min(row + BM, rows) - 1, keys, sink, window,
                                                      first_dense, stop_dense, BN)  # fmt: skip
    n_masked = (end - diag) + (body - edge) + n_sink
    n_whole = (diag - body) + head

    i = start + row + tl.arange(0, BM)
    lower = tl.where((i >= first_dense) & (i < stop_dense), 0, i - window + 1)
    upper = tl.minimum(i, keys - 1)
    q_base = b.to(tl.int64) * q_batch + h.to(tl.int64) * q_head
    k_base = b.to(tl.int64) * k_batch + hk.to(tl.int64) * k_head
    v_base = b.to(tl.int64) * v_batch + hk.to(tl.int64) * v_head
    b_q = _load_rows(q, q_base, b, h, row, q_row, rows, D, WIDTH, BM, TMA, True)
    m = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    if SINK_LOGITS:
        m = tl.zeros([BM], tl.float32) + tl.load(sink_logits_ptr + h).to(tl.float32) * LOG2E
        total += 1.0
    acc = tl.zeros([BM, WIDTH_V], tl.float32)
    for step in tl.range(0, n_masked, num_stages=STAGES):
        acc, m, total = _visit(acc, m, total, b_q, masked_tile(step, head, edge, body, diag, end), k, v, k_base,
                               v_base, k_row, v_row, b, hk, keys, lower, upper, sink, scale, D, DV, WIDTH, WIDTH_V,
                               BN, TMA, True, SPARSE, SOFTCAP, PRECISION)  # fmt: skip
    for step in tl.range(0, n_whole, num_stages=STAGES):
        acc, m, total = _visit(acc, m, total, b_q, whole_tile(step, body, diag), k, v, k_base, v_base, k_row, v_row,
                               b, hk, keys, lower, upper, sink, scale, D, DV, WIDTH, WIDTH_V, BN, TMA, False, SPARSE,
                               SOFTCAP, PRECISION)  # fmt: skip
    total = tl.where(total == 0.0, 1.0, total)
    acc = acc / total[:, None]
    if LSE:
        lse = lse_ptr + (b * heads + h).to(tl.int64) * rows
        tl.store(lse + i - start, m / LOG2E + tl.log(total), mask=i - start < rows)
    r = row + tl.arange(0, BM)
    c = tl.arange(0, WIDTH_V)
    n_heads = heads.to(tl.int64)
    pointers = out_ptr + ((b * rows.to(tl.int64) + r)[:, None] * n_heads + h) * DV + c[None, :]
    tl.store(pointers, acc.to(out_ptr.dtype.element_ty), mask=(r < rows)[:, None] & (c < DV)[None, :])
