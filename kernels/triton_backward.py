"""Gradients of full, windowed, streaming, triangle and routed attention in Triton.

Two kernels recompute the probabilities from the forward's log-sum-exp: one owns a tile of query rows and visits the key
tiles of triton_tiles.py (dq), one owns a tile of keys and visits the rows that see it, over all query heads of its key
head (dk, dv). No atomics: gradients do not change from run to run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fluxc.kernels import triton_config as config
from fluxc.kernels.triton_config import BackwardTiles
from fluxc.kernels.triton_launch import Call, flag, input_precision, interpreted, shape_arguments
from fluxc.kernels.triton_launch import unsupported as unsupported_forward
from fluxc.kernels.triton_tiles import COUNTS, dense_rows, masked_tile, tile_ranges, whole_tile

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _tile_of(x, base, first, stride, n, D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """[BLOCK, WIDTH] rows of one head from `first` on; 0 past row n and column D."""
    i = tl.arange(0, BLOCK)
    c = tl.arange(0, WIDTH)
    pointers = x + base + first.to(tl.int64) * stride + i[:, None] * stride + c[None, :]
    return tl.load(pointers, mask=(first + i < n)[:, None] & (c < D)[None, :], other=0.0)


@triton.jit
def _probabilities(s, lse, i, j, first_dense, stop_dense, keys, sink, window, MASKED: tl.constexpr,
                   SPARSE: tl.constexpr):  # fmt: skip
    """exp2 of scaled scores s [rows i, keys j] against the rows' log-sum-exp, 0 where a row does not see a key."""
    p = tl.exp2(s - lse)
    if MASKED:
        seen = (j <= i) & (j < keys)
        if SPARSE:
            seen = seen & ((i - j < window) | (j < sink) | ((i >= first_dense) & (i < stop_dense)))
        p = tl.where(seen, p, 0.0)
    return p


@triton.jit(do_not_specialize=COUNTS)
def delta_kernel(out, grad, delta, g_batch, g_row, g_head, heads, rows, D: tl.constexpr, WIDTH: tl.constexpr,
                 BM: tl.constexpr):  # fmt: skip
    """out [B,S,H,D] contiguous, grad [B,S,H,D] -> delta fp32 [B,H,S]: the sum over D of their product."""
    r = tl.program_id(0) * BM + tl.arange(0, BM)
    b = tl.program_id(1).to(tl.int64) // heads
    h = tl.program_id(1).to(tl.int64) % heads
    c = tl.arange(0, WIDTH)
    seen = (r < rows)[:, None] & (c < D)[None, :]
    o = tl.load(out + ((b * rows + r)[:, None] * heads + h) * D + c[None, :], mask=seen, other=0.0)
    at = grad + b * g_batch + h * g_head + r.to(tl.int64)[:, None] * g_row + c[None, :]
    g = tl.load(at, mask=seen, other=0.0)
    tl.store(delta + (b * heads + h) * rows + r, tl.sum(o.to(tl.float32) * g.to(tl.float32), 1), mask=r < rows)


@triton.jit
def _dq_visit(acc, q, grad, lse, delta, i, tile, k, v, k_base, v_base, k_row, v_row, keys, first_dense, stop_dense,
              sink, window, scale_log2, D: tl.constexpr, WIDTH: tl.constexpr, BN: tl.constexpr,
              MASKED: tl.constexpr, SPARSE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    b_k = _tile_of(k, k_base, tile * BN, k_row, keys, D, WIDTH, BN)
    b_v = _tile_of(v, v_base, tile * BN, v_row, keys, D, WIDTH, BN)
    s = tl.dot(q, b_k.T, input_precision=PRECISION) * scale_log2
    j = tile * BN + tl.arange(0, BN)[None, :]
    p = _probabilities(s, lse, i, j, first_dense, stop_dense, keys, sink, window, MASKED, SPARSE)
    dp = tl.dot(grad, b_v.T, input_precision=PRECISION)
    ds = p * (dp - delta)
    return tl.dot(ds.to(b_k.dtype), b_k, acc, input_precision=PRECISION)


@triton.jit(do_not_specialize=COUNTS)
def dq_kernel(q, k, v, grad, lse, delta, dq, route_ptr, prompt_ptr, scale, q_batch, q_head, q_row, k_batch, k_head,
              k_row, v_batch, v_head, v_row, g_batch, g_row, g_head, heads, group, batch_heads, rows, keys, n_tiles,
              sink, window, last, D: tl.constexpr, WIDTH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
              STAGES: tl.constexpr, SPARSE: tl.constexpr, HAS_ROUTE: tl.constexpr, HAS_PROMPT: tl.constexpr,
              DECODE_FULL: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """dq [B,H,S,D], contiguous. Programs in the order of the forward kernel."""
    pid = tl.program_id(0)
    row = (n_tiles - 1 - pid // batch_heads) * BM
    b = pid % batch_heads // heads
    h = pid % heads
    hk = h // group
    first_dense, stop_dense = dense_rows(b, route_ptr, prompt_ptr, last, HAS_ROUTE, HAS_PROMPT, DECODE_FULL)
    head, n_sink, edge, body, diag, end = tile_ranges(row, min(row + BM, rows) - 1, keys, sink, window, first_dense,
                                                      stop_dense, BN)  # fmt: skip
    n_masked = (end - diag) + (body - edge) + n_sink
    r = row + tl.arange(0, BM)
    i = r[:, None]
    stats = (b * heads + h).to(tl.int64) * rows
    b_lse = tl.load(lse + stats + r, mask=r < rows, other=0.0)[:, None] * LOG2E
    b_delta = tl.load(delta + stats + r, mask=r < rows, other=0.0)[:, None]
    b64, h64, hk64 = b.to(tl.int64), h.to(tl.int64), hk.to(tl.int64)
    b_q = _tile_of(q, b64 * q_batch + h64 * q_head, row, q_row, rows, D, WIDTH, BM)
    b_g = _tile_of(grad, b64 * g_batch + h64 * g_head, row, g_row, rows, D, WIDTH, BM)
    k_base = b64 * k_batch + hk64 * k_head
    v_base = b64 * v_batch + hk64 * v_head
    acc = tl.zeros([BM, WIDTH], tl.float32)
    for step in tl.range(0, n_masked, num_stages=STAGES):
        acc = _dq_visit(acc, b_q, b_g, b_lse, b_delta, i, masked_tile(step, head, edge, body, diag, end), k, v,
                        k_base, v_base, k_row, v_row, keys, first_dense, stop_dense, sink, window, scale * LOG2E, D,
                        WIDTH, BN, True, SPARSE, PRECISION)  # fmt: skip
    for step in tl.range(0, (diag - body) + head, num_stages=STAGES):
        acc = _dq_visit(acc, b_q, b_g, b_lse, b_delta, i, whole_tile(step, body, diag), k, v, k_base, v_base, k_row,
                        v_row, keys, first_dense, stop_dense, sink, window, scale * LOG2E, D, WIDTH, BN, False,
                        SPARSE, PRECISION)  # fmt: skip
    c = tl.arange(0, WIDTH)
    at = dq + (stats + r)[:, None] * D + c[None, :]
    tl.store(at, (acc * scale).to(dq.dtype.element_ty), mask=(r < rows)[:, None] & (c < D)[None, :])


@triton.jit
def _row_ranges(low, rows, sink, window, first_dense, stop_dense, BM: tl.constexpr, BN: tl.constexpr):
    """Row tiles that see the keys [low, low + BN): near ones [start, stop), of which [whole, whole_stop) need no mask,
    and [far, far_stop) past them where dense rows reach back."""
    n = (rows + BM - 1) // BM
    in_sink = (low < sink).to(tl.int32)
    all_sink = (low + BN <= sink).to(tl.int32)
    start = low // BM
    reach = min(low + BN - 1 + window, rows)
    stop = max(((reach + BM - 1) // BM) * (1 - in_sink) + n * in_sink, start)
    whole = min((low + BN - 1 + BM - 1) // BM, stop)
    last_whole = min((low + window) // BM, rows // BM) * (1 - all_sink) + rows // BM * all_sink
    whole_stop = max(min(last_whole, stop), whole)
    far = max(stop, first_dense // BM)
    far_stop = max(min((min(stop_dense, rows) + BM - 1) // BM, n), far)
    return start, whole, whole_stop, stop, far, far_stop


@triton.jit
def _dkv_visit(dk, dv, k, v, j, tile, q, grad, lse, delta, q_base, g_base, stats, q_row, g_row, rows, keys,
               first_dense, stop_dense, sink, window, scale_log2, D: tl.constexpr, WIDTH: tl.constexpr,
               BM: tl.constexpr, MASKED: tl.constexpr, SPARSE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    r = tile * BM + tl.arange(0, BM)
    b_q = _tile_of(q, q_base, tile * BM, q_row, rows, D, WIDTH, BM)
    b_g = _tile_of(grad, g_base, tile * BM, g_row, rows, D, WIDTH, BM)
    b_lse = tl.load(lse + stats + r, mask=r < rows, other=float("inf"))[None, :] * LOG2E
    b_delta = tl.load(delta + stats + r, mask=r < rows, other=0.0)[None, :]
    s = tl.dot(k, b_q.T, input_precision=PRECISION) * scale_log2
    p = _probabilities(s, b_lse, r[None, :], j, first_dense, stop_dense, keys, sink, window, MASKED, SPARSE)
    dv = tl.dot(p.to(b_g.dtype), b_g, dv, input_precision=PRECISION)
    dp = tl.dot(v, b_g.T, input_precision=PRECISION)
    ds = p * (dp - b_delta)
    return tl.dot(ds.to(b_q.dtype), b_q, dk, input_precision=PRECISION), dv


@triton.jit(do_not_specialize=COUNTS)
def dkv_kernel(q, k, v, grad, lse, delta, dk, dv, route_ptr, prompt_ptr, scale, q_batch, q_head, q_row, k_batch,
               k_head, k_row, v_batch, v_head, v_row, g_batch, g_row, g_head, heads, group, batch_heads, rows, keys,
               n_tiles, sink, window, last, D: tl.constexpr, WIDTH: tl.constexpr, BM: tl.constexpr,
               BN: tl.constexpr, STAGES: tl.constexpr, SPARSE: tl.constexpr, HAS_ROUTE: tl.constexpr,
               HAS_PROMPT: tl.constexpr, DECODE_FULL: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """dk, dv [B,Hk,T,D], contiguous. The first keys, which most rows see, are launched first."""
    pid = tl.program_id(0)
    kv_heads = heads // group
    low = pid // (batch_heads // group) * BN
    b = pid % (batch_heads // group) // kv_heads
    hk = pid % kv_heads
    first_dense, stop_dense = dense_rows(b, route_ptr, prompt_ptr, last, HAS_ROUTE, HAS_PROMPT, DECODE_FULL)
    first_dense = max(first_dense, 0)
    start, whole, whole_stop, stop, far, far_stop = _row_ranges(low, rows, sink, window, first_dense, stop_dense, BM,
                                                                BN)  # fmt: skip
    n_edge = (whole - start) + (stop - whole_stop)
    b64, hk64 = b.to(tl.int64), hk.to(tl.int64)
    b_k = _tile_of(k, b64 * k_batch + hk64 * k_head, low, k_row, keys, D, WIDTH, BN)
    b_v = _tile_of(v, b64 * v_batch + hk64 * v_head, low, v_row, keys, D, WIDTH, BN)
    j = low + tl.arange(0, BN)[:, None]
    acc_k = tl.zeros([BN, WIDTH], tl.float32)
    acc_v = tl.zeros([BN, WIDTH], tl.float32)
    # All query heads in one loop, so that its loads run ahead from one head into the next.
    n_masked = n_edge + (far_stop - far)
    for visit in tl.range(0, group * n_masked, num_stages=STAGES):
        member = visit // max(n_masked, 1)
        step = visit - member * n_masked
        h = hk64 * group + member
        after = (step >= whole - start).to(tl.int32)
        beyond = (step >= n_edge).to(tl.int32)
        tile = start + step + after * (whole_stop - whole) + beyond * (far - stop)
        acc_k, acc_v = _dkv_visit(acc_k, acc_v, b_k, b_v, j, tile, q, grad, lse, delta, b64 * q_batch + h * q_head,
                                  b64 * g_batch + h * g_head, (b64 * heads + h) * rows, q_row, g_row, rows, keys,
                                  first_dense, stop_dense, sink, window, scale * LOG2E, D, WIDTH, BM, True, SPARSE,
                                  PRECISION)  # fmt: skip
    n_whole = whole_stop - whole
    for visit in tl.range(0, group * n_whole, num_stages=STAGES):
        member = visit // max(n_whole, 1)
        tile = whole + visit - member * n_whole
        h = hk64 * group + member
        acc_k, acc_v = _dkv_visit(acc_k, acc_v, b_k, b_v, j, tile, q, grad, lse, delta, b64 * q_batch + h * q_head,
                                  b64 * g_batch + h * g_head, (b64 * heads + h) * rows, q_row, g_row, rows, keys,
                                  first_dense, stop_dense, sink, window, scale * LOG2E, D, WIDTH, BM, False, SPARSE,
                                  PRECISION)  # fmt: skip
    c = tl.arange(0, WIDTH)
    at = ((b64 * kv_heads + hk) * keys + low + tl.arange(0, BN))[:, None] * D + c[None, :]
    inside = (low + tl.arange(0, BN) < keys)[:, None] & (c < D)[None, :]
    tl.store(dk + at, (acc_k * scale).to(dk.dtype.element_ty), mask=inside)
    tl.store(dv + at, acc_v.to(dv.dtype.element_ty), mask=inside)


def unsupported(q: Tensor, k: Tensor, v: Tensor, call: Call) -> str | None:
    """Why the gradient kernels cannot serve this call, or None if they can."""
    if call.softcap or call.sink_logits is not None or call.q_start is not None:
        return "no gradient with a soft cap, sink logits or q_start"
    if q.shape[-1] != v.shape[-1]:
        return "the widths of q and v differ"
    if q.shape[2] != k.shape[2]:
        return "as many keys as queries needed"
    return unsupported_forward(q, k, v, call)


def gradients(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad: Tensor, call: Call,
    tiles: BackwardTiles | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv of a supported call, contiguous, from its output [B,S,H,D], log-sum-exp and output gradient."""
    batch, heads, rows, width = q.shape
    tiles = tiles or _tiles(q)
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    delta = torch.empty_like(lse)
    padded = config.padded(width)
    delta_kernel[(triton.cdiv(rows, 64), batch * heads)](
        out, grad, delta, *grad.stride()[:3], heads, rows, D=width, WIDTH=padded, BM=64
    )
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad.stride()[:3])
    flags = (flag(call.route), call.prompt_lens, call.scale)
    shared = {
        "D": width, "WIDTH": padded, "SPARSE": call.sparse, "HAS_ROUTE": call.route is not None,
        "HAS_PROMPT": call.prompt_lens is not None, "DECODE_FULL": call.decode_full,
        "PRECISION": input_precision(q),
    }  # fmt: skip
    sizes = shape_arguments(q, k, call, tiles.dq_rows)
    dq_kernel[(sizes["n_tiles"] * sizes["batch_heads"],)](
        q, k, v, grad, lse, delta, dq, *flags, *strides, **sizes, **shared, BM=tiles.dq_rows, BN=tiles.dq_keys,
        STAGES=tiles.dq_stages, num_warps=tiles.dq_warps,
    )  # fmt: skip
    dkv_kernel[(triton.cdiv(k.shape[2], tiles.dkv_keys) * batch * k.shape[1],)](
        q, k, v, grad, lse, delta, dk, dv, *flags, *strides, **sizes, **shared, BM=tiles.dkv_rows,
        BN=tiles.dkv_keys, STAGES=tiles.dkv_stages, num_warps=tiles.dkv_warps,
    )  # fmt: skip
    return dq, dk, dv


def _tiles(q: Tensor) -> BackwardTiles:
    if interpreted():
        return config.BACKWARD_INTERPRETED
    major, minor = torch.cuda.get_device_capability(q.device)
    if q.dtype == torch.float32:
        return config.backward_full_precision_for(10 * major + minor, q.shape[-1])
    return config.backward_for(10 * major + minor, q.shape[-1])
