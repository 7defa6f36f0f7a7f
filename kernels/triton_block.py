"""Block-sparse attention in Triton: each tile of rows of a head visits the key blocks of its list.

The rows' own block, the last of its list, is visited first and with the causal mask; the blocks before it need none.
On sm_90 triton_hopper_block.py does the same where a block holds whole work items of 128 rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fluxc.kernels import triton_config as config
from fluxc.kernels.triton_config import Tiles
from fluxc.kernels.triton_forward import LOG2E as LOG2E_T
from fluxc.kernels.triton_forward import _load_rows, _visit
from fluxc.kernels.triton_launch import (
    LOG2E,
    Call,
    descriptors,
    gluon_descriptors,
    input_precision,
    interpreted,
    not_gluon,
    not_tma,
)
from fluxc.kernels.triton_launch import unsupported as unsupported_call


@triton.jit(do_not_specialize=("heads", "group", "batch_heads", "rows", "n_tiles", "n_blocks", "width_m"))
def block_kernel(q, k, v, out_ptr, index_ptr, count_ptr, sink_logits_ptr, scale, q_batch, q_head, q_row, k_batch,
                 k_head, k_row, v_batch, v_head, v_row, heads, group, batch_heads, rows, n_tiles, n_blocks, width_m,
                 D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, BLOCK: tl.constexpr,
                 BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr,
                 SINK_LOGITS: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """q [B,H,S,D], k [B,Hk,S,D], v [B,Hk,S,DV], index i32[B,H,n_blocks,width_m], count i32[B,H,n_blocks] -> out
    [B,S,H,DV], contiguous. `scale` includes log2(e). A list that breaks the schema's rules reads no key outside the
    sequence and gives NaN: the host does not see its values."""
    pid = tl.program_id(0)
    row = (n_tiles - 1 - pid // batch_heads) * BM
    b = pid % batch_heads // heads
    h = pid % heads
    hk = h // group
    own = row // BLOCK
    PER: tl.constexpr = BLOCK // BN
    listed = (b * heads + h).to(tl.int64) * n_blocks + own
    given = tl.load(count_ptr + listed)
    count = min(max(given, 0), width_m)
    index_ptr += listed * width_m
    has_own = ((count > 0) & (tl.load(index_ptr + max(count - 1, 0)) == own)).to(tl.int32)
    n_whole = min(count - has_own, own)
    spoiled = tl.where((given != count) | (n_whole != count - has_own), float("nan"), 0.0)
    i = row + tl.arange(0, BM)
    upper = tl.minimum(i, rows - 1)
    q_base = b.to(tl.int64) * q_batch + h.to(tl.int64) * q_head
    k_base = b.to(tl.int64) * k_batch + hk.to(tl.int64) * k_head
    v_base = b.to(tl.int64) * v_batch + hk.to(tl.int64) * v_head
    b_q = _load_rows(q, q_base, b, h, row, q_row, rows, D, WIDTH, BM, TMA, True)
    m = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    if SINK_LOGITS:
        m = tl.zeros([BM], tl.float32) + tl.load(sink_logits_ptr + h).to(tl.float32) * LOG2E_T
        total += 1.0
    acc = tl.zeros([BM, WIDTH_V], tl.float32)
    n_own = tl.cdiv(min(row + BM, rows) - own * BLOCK, BN) * has_own
    for step in tl.range(0, n_own, num_stages=STAGES):
        acc, m, total = _visit(acc, m, total, b_q, own * PER + step, k, v, k_base, v_base, k_row, v_row, b, hk, rows,
                               i, upper, 0, scale, D, DV, WIDTH, WIDTH_V, BN, TMA, True, False, SOFTCAP,
                               PRECISION)  # fmt: skip
    for step in tl.range(0, n_whole * PER, num_stages=STAGES):
        number = tl.load(index_ptr + step // PER)
        inside = min(max(number, 0), own - 1)
        spoiled += tl.where(number == inside, 0.0, float("nan"))
        acc, m, total = _visit(acc, m, total, b_q, inside * PER + step % PER, k, v, k_base, v_base, k_row, v_row, b,
                               hk, rows, i, upper, 0, scale, D, DV, WIDTH, WIDTH_V, BN, TMA, False, False, SOFTCAP,
                               PRECISION)  # fmt: skip
    total = tl.where(total == 0.0, 1.0, total)
    acc = acc / total[:, None] + spoiled
    c = tl.arange(0, WIDTH_V)
    pointers = out_ptr + ((b * rows.to(tl.int64) + i)[:, None] * heads.to(tl.int64) + h) * DV + c[None, :]
    tl.store(pointers, acc.to(out_ptr.dtype.element_ty), mask=(i < rows)[:, None] & (c < DV)[None, :])


def block_attention(
    q: Tensor, k: Tensor, v: Tensor, block_index: Tensor, block_count: Tensor, *, scale: float, block: int,
    softcap: float = 0.0, sink_logits: Tensor | None = None, tiles: Tiles | None = None,
) -> Tensor:  # fmt: skip
    """`fluxc::block_attention` -> [B,S,H,Dv], contiguous. `tiles` overrides the pinned sizes (benchmarks)."""
    tiles = tiles or _tiles(q, k, v, block)
    out = torch.empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3], dtype=q.dtype, device=q.device)
    launch = _launch_gluon if tiles.loader == "gluon" else _launch_plain
    lists = block_index.contiguous(), block_count.contiguous()
    launch(q, k, v, out, *lists, scale * LOG2E, block, float(softcap), sink_logits, tiles)
    return out


def _launch_plain(q: Tensor, k: Tensor, v: Tensor, out: Tensor, index: Tensor, count: Tensor, scale: float,
                  block: int, softcap: float, sink_logits: Tensor | None, tiles: Tiles) -> None:  # fmt: skip
    batch, heads, rows, _ = q.shape
    m, n = min(tiles.rows, block), min(tiles.keys, block)
    n_tiles = triton.cdiv(rows, m)
    operands = descriptors(q, k, v, m, n) if tiles.loader == "tma" else (q, k, v)
    block_kernel[(n_tiles * batch * heads,)](
        *operands, out, index, count, sink_logits, scale, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], heads,
        heads // k.shape[1], batch * heads, rows, n_tiles, count.shape[2], index.shape[3], D=q.shape[3], DV=v.shape[3],
        WIDTH=config.padded(q.shape[3]), WIDTH_V=config.padded(v.shape[3]), BLOCK=block, BM=m, BN=n,
        STAGES=tiles.stages, TMA=tiles.loader == "tma", SINK_LOGITS=sink_logits is not None, SOFTCAP=softcap,
        PRECISION=input_precision(q), num_warps=tiles.warps if m * n > 64 * 64 else 4, num_stages=tiles.stages,
    )  # fmt: skip


def _launch_gluon(q: Tensor, k: Tensor, v: Tensor, out: Tensor, index: Tensor, count: Tensor, scale: float,
                  block: int, softcap: float, sink_logits: Tensor | None, tiles: Tiles) -> None:  # fmt: skip
    from fluxc.kernels.triton_hopper_block import hopper_blocks

    batch, heads, rows, _ = q.shape
    n_tiles = triton.cdiv(rows, tiles.rows)
    n_items = n_tiles * batch * heads
    counter = torch.zeros(1, dtype=torch.int32, device=q.device)
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count
    hopper_blocks[(min(n_items, processors),)](
        *gluon_descriptors(q, k, v, out, tiles.keys), index, count, sink_logits, counter, scale, heads,
        heads // k.shape[1], rows, n_tiles, n_items, count.shape[2], index.shape[3],
        D=max(64, config.padded(q.shape[3])), BLOCK=block, BN=tiles.keys, STAGES=tiles.stages,
        WAIT_LAST=tiles.wait_last, HEAD_MAJOR=tiles.head_major, SINK_LOGITS=sink_logits is not None, SOFTCAP=softcap,
        enable_fp_fusion=True, num_warps=4, maxnreg=168,
    )  # fmt: skip


def unsupported(q: Tensor, k: Tensor, v: Tensor, scale: float, block: int) -> str | None:
    """Why the kernel cannot serve this call, or None if it can."""
    return unsupported_call(q, k, v, Call(scale))


def _tiles(q: Tensor, k: Tensor, v: Tensor, block: int) -> Tiles:
    """The Hopper kernel where a block holds whole work items, else plain Triton."""
    if interpreted():
        return config.INTERPRETED
    major, minor = torch.cuda.get_device_capability(q.device)
    capability, width = 10 * major + minor, max(q.shape[-1], v.shape[-1])
    if q.dtype == torch.float32:
        return config.full_precision_for(capability, width)
    tiles = config.blocks_for(capability, width)
    if tiles.loader == "gluon" and (block % tiles.rows or not_gluon(q, k, v)):
        tiles = config.PLAIN_TMA[max(64, config.padded(width))]
    if tiles.loader == "tma" and not_tma(q, k, v):
        tiles = config.POINTER_90[max(64, config.padded(width))]
    return tiles
