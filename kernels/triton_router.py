"""The Layer Router's pool, alone and fused with its encoder and head, in Triton.

Several programs share a request. The pool's each sum their share of the pooled rows. The router's each own a slice of
the encoder's hidden layer, later of the head's first one, and multiply it at once into the next layer: partial sums of
all programs are added in a fixed order, so scores do not change from run to run. They wait for each other once, with
all weights read before; the last to finish computes the logits.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fluxc.kernels import triton_config as config
from fluxc.kernels.triton_config import RouterTiles

WEIGHTS = 10


@triton.jit
def _arrive(counter):
    """Announce that everything this program stored may be read; the number of programs before it."""
    tl.debug_barrier()
    return tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")


@triton.jit
def _meet(counter, parts):
    """Wait until all programs of the request have come here."""
    _arrive(counter)
    seen = tl.atomic_add(counter, 0, sem="acquire", scope="gpu")
    while seen < parts:
        seen = tl.atomic_add(counter, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()


@triton.jit
def _pool_part(q, part, b, q_batch, q_head, q_row, heads, length, pool, PARTS: tl.constexpr, ROWS: tl.constexpr,
               D: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """Sum of this program's share of the pooled rows: heads x (first and last `pool` rows), in one long list."""
    c = tl.arange(0, WIDTH)
    take = tl.minimum(pool, length)
    n = heads * 2 * take
    share = tl.cdiv(n, PARTS)
    stop = tl.minimum((part + 1) * share, n)
    total = tl.zeros([WIDTH], tl.float32)
    for first in tl.range(part * share, stop, ROWS, num_stages=1):
        i = first + tl.arange(0, ROWS)
        rest = i % (2 * take)
        row = tl.where(rest < take, rest, length - 2 * take + rest)
        pointers = q + b * q_batch + (i // (2 * take)).to(tl.int64) * q_head + row.to(tl.int64) * q_row
        x = tl.load(pointers[:, None] + c[None, :], mask=(i < stop)[:, None] & (c < D)[None, :], other=0.0)
        total += tl.sum(x.to(tl.float32), 0)
    return total


@triton.jit
def _sum_parts(scratch, columns, PARTS: tl.constexpr, PADDED: tl.constexpr):
    """fp32 [PARTS, columns] -> [PADDED], past the first-level cache: other programs wrote it during this launch."""
    g = tl.arange(0, PARTS)
    c = tl.arange(0, PADDED)
    x = tl.load(scratch + g[:, None] * columns + c[None, :], mask=(c < columns)[None, :], other=0.0,
                cache_modifier=".cg")  # fmt: skip
    return tl.sum(x, 0)


@triton.jit
def pool_kernel(q, lens, scratch, counters, out, q_batch, q_head, q_row, heads, rows, pool,
                LAST_ADDS: tl.constexpr, DEPENDENT: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr,
                D: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """q [B,H,S,D] -> sums of the parts, scratch fp32 [B,PARTS,D].

    LAST_ADDS: the last program writes the mean, out fp32 [B,D], with counters i32[B] zero. Else counters i32[B,2] are
    cleared for the kernel that follows; DEPENDENT: it may start at once and waits for this one, as this one does for
    the kernel ahead. A length outside 1..rows gives NaN: the host does not read it.
    """
    part = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()
    length = tl.load(lens + b).to(tl.int32)
    inside = (length >= 1) & (length <= rows)
    length = tl.minimum(tl.maximum(length, 1), rows)
    total = _pool_part(q, part, b, q_batch, q_head, q_row, heads, length, pool, PARTS, ROWS, D, WIDTH)
    c = tl.arange(0, WIDTH)
    mine = scratch + b * PARTS * D
    tl.store(mine + part * D + c, tl.where(inside, total, float("nan")), mask=c < D)
    if LAST_ADDS:
        if _arrive(counters + b) == PARTS - 1:
            tl.debug_barrier()
            tl.store(out + b * D + c, _mean(mine, heads, length, pool, D, PARTS, WIDTH), mask=c < D)
    elif part == 0:
        tl.store(counters + b * 2 + tl.arange(0, 2), tl.zeros([2], tl.int32))


@triton.jit
def _mean(scratch, heads, length, pool, D: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr):
    return _sum_parts(scratch, D, PARTS, WIDTH) / (2 * heads * tl.minimum(pool, length)).to(tl.float32)


@triton.jit
def _weights(weight, rows, columns, row_stride, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    r = tl.arange(0, BLOCK_R)
    c = tl.arange(0, BLOCK_C)
    return tl.load(weight + r[:, None] * row_stride + c[None, :], mask=(r < rows)[:, None] & (c < columns)[None, :],
                   other=0.0)  # fmt: skip


@triton.jit
def _bias(bias, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    return tl.load(bias + i, mask=i < n, other=0.0)


@triton.jit
def _silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def _hidden(weight, x, bias):
    """A slice of a hidden layer: silu(weight @ x + bias)."""
    return _silu(tl.sum(weight * x[None, :], 1) + bias)


@triton.jit
def router_kernel(lens, pooled, w0, b0, w1, b1, w2, b2, w3, b3, w4, b4, scratch, counters, out, heads, pool,
                  PHASE: tl.constexpr, DEPENDENT: tl.constexpr, PARTS: tl.constexpr, POOL_PARTS: tl.constexpr,
                  D: tl.constexpr, WIDTH: tl.constexpr, E: tl.constexpr, T: tl.constexpr):  # fmt: skip
    """pooled fp32 [B,POOL_PARTS,D], sums of the pool's parts -> logits fp32 [B,2].

    E, T: slices of the hidden layers (8D, 4D over PARTS), WIDTH: D, all padded. PHASE -1 runs everything in one launch;
    0 .. 2 run one phase, for a grid too large to wait for itself. counters i32[B,2] zero; scratch fp32 [B,PARTS,3D]: a
    part's share of the encoder's output and of the head's second layer. DEPENDENT: started while the pool, the kernel
    before this one, is running; reads the weights, which the pool does not write, then waits for it.
    """
    part = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    H1: tl.constexpr = 8 * D // PARTS
    H2: tl.constexpr = 4 * D // PARTS
    c = tl.arange(0, WIDTH)
    c2 = tl.arange(0, 2 * WIDTH)
    encoded = scratch + b * PARTS * 3 * D
    headed = encoded + PARTS * 2 * D
    counters += b * 2
    if (PHASE == 0) | (PHASE == -1):
        b_w0 = _weights(w0 + part * H1 * D, H1, D, D, E, WIDTH)
        b_b0 = _bias(b0 + part * H1, H1, E)
        b_w1 = _weights(w1 + part * H1, 2 * D, H1, 8 * D, 2 * WIDTH, E)
    if (PHASE == 1) | (PHASE == -1):
        b_b1 = _bias(b1, 2 * D, 2 * WIDTH)
        b_w2 = _weights(w2 + part * H2 * 2 * D, H2, 2 * D, 2 * D, T, 2 * WIDTH)
        b_b2 = _bias(b2 + part * H2, H2, T)
        b_w3 = _weights(w3 + part * H2, D, H2, 4 * D, WIDTH, T)
    if DEPENDENT:
        gdc_wait()
    if (PHASE == 0) | (PHASE == -1):
        length = tl.load(lens + b).to(tl.int32)
        mean = _mean(pooled + b * POOL_PARTS * D, heads, length, pool, D, POOL_PARTS, WIDTH)
        h1 = _hidden(b_w0, mean, b_b0)
        tl.store(encoded + part * 2 * D + c2, tl.sum(b_w1 * h1[None, :], 1), mask=c2 < 2 * D)
    if PHASE == -1:
        _meet(counters, PARTS)
    if (PHASE == 1) | (PHASE == -1):
        h2 = _hidden(b_w2, _sum_parts(encoded, 2 * D, PARTS, 2 * WIDTH) + b_b1, b_b2)
        tl.store(headed + part * D + c, tl.sum(b_w3 * h2[None, :], 1), mask=c < D)
    before = PARTS - 1
    if PHASE == -1:
        before = _arrive(counters + 1)
    if (PHASE == 2) | (PHASE == -1):  # noqa: SIM102 (decided when compiled, the next one when run)
        if before == PARTS - 1:
            tl.debug_barrier()
            h3 = _silu(_sum_parts(headed, D, PARTS, WIDTH) + _bias(b3, D, WIDTH))
            logits = tl.sum(_weights(w4, 2, D, D, 2, WIDTH) * h3[None, :], 1) + _bias(b4, 2, 2)
            tl.store(out + b * 2 + tl.arange(0, 2), logits)


def router_pool(q: Tensor, prompt_lens: Tensor, *, pool: int, tiles: RouterTiles | None = None) -> Tensor:
    """`fluxc::router_pool` -> fp32 [B,D]: one launch, and one that clears its counters."""
    batch, _, _, width = q.shape
    counters = torch.zeros(batch, dtype=torch.int32, device=q.device)
    out = torch.empty(batch, width, dtype=torch.float32, device=q.device)
    _pool(q, prompt_lens, counters, out, pool, tiles or _tiles(q))
    return out


def _pool(q: Tensor, lens: Tensor, counters: Tensor, out: Tensor | None, pool: int, tiles: RouterTiles) -> Tensor:
    batch, heads, rows, width = q.shape
    scratch = torch.empty(batch, tiles.pool_parts, width, dtype=torch.float32, device=q.device)
    early = tiles.dependent and out is None
    pool_kernel[(tiles.pool_parts, batch)](
        q, lens, scratch, counters, out, *q.stride()[:3], heads, rows, pool, LAST_ADDS=out is not None,
        DEPENDENT=early, PARTS=tiles.pool_parts, ROWS=tiles.rows, D=width, WIDTH=triton.next_power_of_2(width),
        num_warps=tiles.pool_warps, **({"launch_pdl": True} if early else {}),
    )  # fmt: skip
    return scratch


def router(
    q: Tensor,
    prompt_lens: Tensor,
    *weights: Tensor,
    pool: int,
    fused: bool | None = None,
    tiles: RouterTiles | None = None,
) -> Tensor:
    """`fluxc::router` -> fp32 logits [B,2], full first; `weights` as in the schema, fp32, contiguous.

    fused: two launches, the pool and the rest. The programs of the second wait for each other, so all of them must
    fit on the device at once; by default that decides.
    """
    batch, heads, _, width = q.shape
    tiles = tiles or _tiles(q)
    parts = tiles.parts
    whole = _fits(q, fused, parts)
    tiles = tiles if whole else dataclasses.replace(tiles, dependent=False)
    counters = torch.empty(batch, 2, dtype=torch.int32, device=q.device)
    pooled = _pool(q, prompt_lens, counters, None, pool, tiles)
    scratch = torch.empty(batch, parts, 3 * width, dtype=torch.float32, device=q.device)
    out = torch.empty(batch, 2, dtype=torch.float32, device=q.device)
    padded = triton.next_power_of_2(width)
    for phase in (-1,) if whole else (0, 1, 2):
        router_kernel[(1 if phase == 2 else parts, batch)](
            prompt_lens, pooled, *weights, scratch, counters, out, heads, pool, PHASE=phase,
            DEPENDENT=tiles.dependent, PARTS=parts, POOL_PARTS=tiles.pool_parts, D=width, WIDTH=padded,
            E=max(1, 8 * padded // parts), T=max(1, 4 * padded // parts), num_warps=tiles.warps,
            **({"launch_pdl": True} if tiles.dependent else {}),
        )  # fmt: skip
    return out


def _tiles(q: Tensor) -> RouterTiles:
    major, _ = torch.cuda.get_device_capability(q.device) if q.is_cuda else (8, 0)
    return config.router_for(10 * major)


def _fits(q: Tensor, fused: bool | None, parts: int) -> bool:
    if fused is not None:
        return fused
    return q.is_cuda and q.shape[0] * parts <= torch.cuda.get_device_properties(q.device).multi_processor_count


def unsupported(q: Tensor, *weights: Tensor) -> str | None:
    """Why the kernels cannot serve this call, or None if they can."""
    width = q.shape[-1]
    if not q.is_cuda and not triton.knobs.runtime.interpret:
        return "needs a CUDA device"
    if q.stride(-1) != 1:
        return "the last dimension of q is not contiguous"
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"dtype {q.dtype} is not fp16, bf16 or fp32"
    step = _tiles(q).parts // 4
    if weights and (len(weights) != WEIGHTS or width % step or width > 256):
        return f"head dim {width} is not a multiple of {step} up to 256"
    if any(w.dtype != torch.float32 or not w.is_contiguous() for w in weights):
        return "the router's weights are not contiguous fp32"
    return None
