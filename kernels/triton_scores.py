"""Block scores in Triton: the weight of each block of keys for each block of queries, then the blocks to keep.

Two launches. The first runs over the chunks twice, once for the maximum and the sum of each row's softmax and once for
the weights, which it sums over blocks at once. The second bisects the cut of each row of blocks and lists those above
it; nothing is sorted.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fluxc.kernels import triton_config as config
from fluxc.kernels.triton_launch import LOG2E, input_precision, interpreted

BISECTIONS = tl.constexpr(24)


@triton.jit
def _chunk_scores(q, k, q_row, k_row, rows, first_m, first_n, scale, D: tl.constexpr, WIDTH: tl.constexpr,
                  STRIDE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Scores [BM,BN] of chunks of queries and keys in units of log2(e), -inf where a chunk of keys comes later."""
    m = first_m + tl.arange(0, BM)
    n = first_n + tl.arange(0, BN)
    c = tl.arange(0, WIDTH)
    s = tl.zeros([BM, BN], tl.float32)
    for r in tl.range(0, STRIDE):
        i = m * STRIDE + r
        j = n * STRIDE + STRIDE - 1 - r
        b_q = tl.load(q + i.to(tl.int64)[:, None] * q_row + c[None, :], mask=(i < rows)[:, None] & (c < D)[None, :],
                      other=0.0)  # fmt: skip
        b_k = tl.load(k + j.to(tl.int64)[:, None] * k_row + c[None, :], mask=(j < rows)[:, None] & (c < D)[None, :],
                      other=0.0)  # fmt: skip
        s = tl.dot(b_q, b_k.T, s, input_precision=PRECISION)
    return tl.where(n[None, :] <= m[:, None], s * scale, float("-inf"))


@triton.jit(do_not_specialize=("heads", "group", "rows", "chunks", "blocks"))
def sums_kernel(q, k, sums, scale, q_batch, q_head, q_row, k_batch, k_head, k_row, heads, group, rows, chunks, blocks,
                D: tl.constexpr, WIDTH: tl.constexpr, STRIDE: tl.constexpr, PER: tl.constexpr, BM: tl.constexpr,
                BN: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """q [B,H,S,D], k [B,Hk,S,D] -> sums fp32 [B,H,blocks,blocks], written up to the rows' own blocks. PER: chunks of a
    block; the last rows, which see most keys, are launched first."""
    first_m = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM
    h = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    q += b * q_batch + h.to(tl.int64) * q_head
    k += b * k_batch + (h // group).to(tl.int64) * k_head
    tiles = tl.cdiv(min(first_m + BM, chunks), BN)
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    for tile in tl.range(0, tiles):
        s = _chunk_scores(q, k, q_row, k_row, rows, first_m, tile * BN, scale, D, WIDTH, STRIDE, BM, BN, PRECISION)
        new = tl.maximum(top, tl.max(s, 1))
        total = total * tl.exp2(top - new) + tl.sum(tl.exp2(s - new[:, None]), 1)
        top = new
    weight = tl.where(first_m + tl.arange(0, BM) < chunks, 1.0 / total, 0.0)
    y = first_m // PER + tl.arange(0, BM // PER)[:, None]
    sums += (b * heads + h) * blocks.to(tl.int64) * blocks
    for tile in tl.range(0, tiles):
        s = _chunk_scores(q, k, q_row, k_row, rows, first_m, tile * BN, scale, D, WIDTH, STRIDE, BM, BN, PRECISION)
        p = tl.exp2(s - top[:, None]) * weight[:, None]
        of_blocks = tl.sum(tl.reshape(p, [BM // PER, PER, BN // PER, PER]), 3)
        x = tile * (BN // PER) + tl.arange(0, BN // PER)[None, :]
        tl.store(sums + y.to(tl.int64) * blocks + x, tl.sum(of_blocks, 1), mask=(y < blocks) & (x < blocks))


@triton.jit(do_not_specialize=("blocks",))
def keep_kernel(sums, index, count, threshold, blocks, PADDED: tl.constexpr):
    """sums fp32 [..,blocks,blocks] -> index i32 of the same shape, ascending, count i32 [..,blocks]."""
    own = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64) * blocks + own
    n = tl.arange(0, PADDED)
    x = tl.load(sums + row * blocks + n, mask=n <= own, other=0.0)
    wanted = threshold * tl.sum(x, 0)
    low = -1.0
    high = tl.max(x, 0)
    for _ in tl.range(0, BISECTIONS):
        middle = (low + high) / 2
        enough = tl.sum(tl.where(x > middle, x, 0.0), 0) >= wanted
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    kept = ((x > low) | (n == 0) | (n == own)) & (n <= own)
    place = tl.cumsum(kept.to(tl.int32), 0) - 1
    tl.store(index + row * blocks + place, n, mask=kept)
    tl.store(count + row, tl.sum(kept.to(tl.int32), 0))


def block_scores(
    q: Tensor, k: Tensor, *, scale: float, block: int, stride: int, threshold: float, scorer: str
) -> tuple[Tensor, Tensor]:
    """`fluxc::block_scores` -> block_index i32[B,H,Sb,Sb], block_count i32[B,H,Sb]."""
    batch, heads, rows, width = q.shape
    per, chunks, blocks = block // stride, triton.cdiv(rows, stride), triton.cdiv(rows, block)
    if scorer == "pooled":
        from fluxc.kernels.block_scores.op import chunks as pooled

        q, k = pooled(q, stride, scorer, keys=False), pooled(k, stride, scorer, keys=True)
        rows, stride = chunks, 1
    tile, stages = _tiles(q)
    tile = max(tile, per)
    sums = torch.empty(batch, heads, blocks, blocks, dtype=torch.float32, device=q.device)
    sums_kernel[(triton.cdiv(chunks, tile), heads, batch)](
        q, k, sums, scale / stride * LOG2E, *q.stride()[:3], *k.stride()[:3], heads, heads // k.shape[1], rows, chunks,
        blocks, D=width, WIDTH=config.padded(width), STRIDE=stride, PER=per, BM=tile, BN=tile,
        PRECISION=input_precision(q), num_warps=8 if tile >= 128 else 4, num_stages=stages,
    )  # fmt: skip
    # Entries past a row's count mean nothing and stay as they are.
    index = torch.empty(batch, heads, blocks, blocks, dtype=torch.int32, device=q.device)
    count = torch.empty(batch, heads, blocks, dtype=torch.int32, device=q.device)
    keep_kernel[(blocks, batch * heads)](
        sums, index, count, threshold, blocks, PADDED=triton.next_power_of_2(blocks), num_warps=4
    )
    return index, count


def unsupported(q: Tensor, k: Tensor, *, block: int, stride: int) -> str | None:
    """Why the kernels cannot serve this call, or None if they can."""
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"dtype {q.dtype} is not fp16, bf16 or fp32"
    if interpreted() and q.dtype == torch.bfloat16:
        return "bf16 is wrong in the Triton interpreter"
    if any(x.stride(-1) != 1 for x in (q, k)):
        return "the last dimension of q or k is not contiguous"
    if q.shape[-1] * q.element_size() > 512:
        return f"{q.dtype} heads of {q.shape[-1]} do not fit the shared memory"
    return None if block // stride <= config.SCORE_CHUNKS else f"more than {config.SCORE_CHUNKS} chunks of a block"


def _tiles(q: Tensor) -> tuple[int, int]:
    if interpreted():
        return 16, 1
    major, minor = torch.cuda.get_device_capability(q.device)
    row_bytes = config.padded(q.shape[-1]) * q.element_size()
    # Three TF32 products keep the parts of each operand as well.
    return config.scores_for(10 * major + minor, row_bytes * (2 if q.dtype == torch.float32 else 1))
