"""Block scores in Triton: the weight of each block of keys for each block of queries, then the blocks to keep.

Two launches for some rows of chunks at a time. The first multiplies tiles of chunks of queries and keys, once, and
sums the exponentials of each row over blocks of keys, relative to the row's maximum in that tile. The second brings a
row's parts to the row's own maximum and total, sums rows over a block, bisects the cut and lists the blocks above it;
nothing is sorted. Between the two lie PARTS_BYTES at most, or the parts of one tile of rows where those are more.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fluxc.kernels import triton_config as config
from fluxc.kernels.triton_config import ScoreTiles
from fluxc.kernels.triton_launch import LOG2E, input_precision, interpreted, not_tma

BISECTIONS = tl.constexpr(24)
NEIGHBOURS = tl.constexpr(8)  # tiles of rows that run side by side over the same keys, so that L2 holds both
PARTS_BYTES = 256 << 20


@triton.jit
def _load(x, base, b, h, first, r, c, row_stride, rows, D: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr,
          BK: tl.constexpr, TMA: tl.constexpr):  # fmt: skip
    """[BLOCK,BK]: columns from c on of row r of each of the chunks from `first` on; 0 past the tensor."""
    if TMA:
        tile = x.load([b, h, r, first, c]).reshape(BLOCK, BK)
    else:
        i = (first + tl.arange(0, BLOCK)) * STRIDE + r
        column = c + tl.arange(0, BK)
        pointers = x + base + i.to(tl.int64)[:, None] * row_stride + column[None, :]
        tile = tl.load(pointers, mask=(i < rows)[:, None] & (column < D)[None, :], other=0.0)
    return tile


@triton.jit(do_not_specialize=("heads", "group", "rows", "chunks", "first_row", "kept_rows", "n_tiles"))
def parts_kernel(q, k, parts, tops, scale, q_batch, q_head, q_row, k_batch, k_head, k_row, heads, group, rows, chunks,
                 first_row, kept_rows, n_tiles, D: tl.constexpr, WIDTH: tl.constexpr, STRIDE: tl.constexpr,
                 PER: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr,
                 PRECISION: tl.constexpr):  # fmt: skip
    """q [B,H,S,D], k [B,Hk,S,D] -> parts fp32 [B*H,kept_rows,X]: sums over the PER chunks of a block of
    exp2(score - top) of the rows of chunks from first_row on; tops fp32 [B*H,kept_rows,n_tiles]: the row's maximum in
    a tile of BN chunks, in units of log2(e), -inf where no chunk of it is visible. Tiles after all rows stay unwritten.
    """
    band = NEIGHBOURS * n_tiles
    pid = tl.program_id(0)
    tile = pid % band // NEIGHBOURS
    local = (pid // band * NEIGHBOURS + pid % NEIGHBOURS) * BM
    first_m = first_row + local
    first_n = tile * BN
    if (local >= kept_rows) | (first_n >= min(first_m + BM, chunks)):
        return
    bh = tl.program_id(1)
    b = bh // heads
    h = bh % heads
    q_base = b.to(tl.int64) * q_batch + h.to(tl.int64) * q_head
    k_base = b.to(tl.int64) * k_batch + (h // group).to(tl.int64) * k_head
    s = tl.zeros([BM, BN], tl.float32)
    for step in tl.range(0, STRIDE * (WIDTH // BK)):
        r = step // (WIDTH // BK)
        c = step % (WIDTH // BK) * BK
        b_q = _load(q, q_base, b, h, first_m, r, c, q_row, rows, D, STRIDE, BM, BK, TMA)
        b_k = _load(k, k_base, b, h // group, first_n, STRIDE - 1 - r, c, k_row, rows, D, STRIDE, BN, BK, TMA)
        s = tl.dot(b_q, b_k.T, s, input_precision=PRECISION)
    m = first_m + tl.arange(0, BM)
    n = first_n + tl.arange(0, BN)
    s = tl.where(n[None, :] <= m[:, None], s * scale, float("-inf"))
    top = tl.max(s, 1)
    p = tl.exp2(s - tl.where(top == float("-inf"), 0.0, top)[:, None])
    of_blocks = tl.sum(tl.reshape(p, [BM, BN // PER, PER]), 2)
    i = local + tl.arange(0, BM)
    inside = i < kept_rows
    row = bh.to(tl.int64) * kept_rows + i
    x = tile * (BN // PER) + tl.arange(0, BN // PER)
    tl.store(parts + row[:, None] * (n_tiles * (BN // PER)) + x[None, :], of_blocks, mask=inside[:, None])
    tl.store(tops + row * n_tiles + tile, top, mask=inside)


@triton.jit(do_not_specialize=("chunks", "blocks", "first_block", "kept_rows", "n_tiles"))
def keep_kernel(parts, tops, index, count, threshold, chunks, blocks, first_block, kept_rows, n_tiles,
                PER: tl.constexpr, BN: tl.constexpr, PADDED: tl.constexpr):  # fmt: skip
    """What parts_kernel wrote of the blocks of queries from first_block on -> their rows of index i32
    [B*H,blocks,blocks], ascending, and of count i32 [B*H,blocks]."""
    own = first_block + tl.program_id(0)
    n = tl.arange(0, PADDED)
    visible = n <= own
    x = tl.zeros([PADDED], tl.float32)
    for i in tl.range(0, PER):
        seen = n <= tl.where(own * PER + i < chunks, own, -1)
        row = tl.program_id(1).to(tl.int64) * kept_rows + tl.program_id(0) * PER + i
        part = tl.load(parts + row * (n_tiles * (BN // PER)) + n, mask=seen, other=0.0)
        top = tl.load(tops + row * n_tiles + n // (BN // PER), mask=seen, other=float("-inf"))
        # The row's own chunk is visible: only a row past the chunks has no maximum.
        highest = tl.max(top, 0)
        weight = part * tl.exp2(top - tl.where(highest == float("-inf"), 0.0, highest))
        total = tl.sum(weight, 0)
        x += weight / tl.where(total == 0.0, 1.0, total)
    wanted = threshold * tl.sum(x, 0)
    low = -1.0
    high = tl.max(x, 0)
    for _ in tl.range(0, BISECTIONS):
        middle = (low + high) / 2
        enough = tl.sum(tl.where(x > middle, x, 0.0), 0) >= wanted
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    kept = ((x > low) | (n == 0) | (n == own)) & visible
    place = tl.cumsum(kept.to(tl.int32), 0) - 1
    listed = tl.program_id(1).to(tl.int64) * blocks + own
    tl.store(index + listed * blocks + place, n, mask=kept)
    tl.store(count + listed, tl.sum(kept.to(tl.int32), 0))


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of chunks of one launch, and how they are cut."""

    first: int
    count: int
    tiles: ScoreTiles

    @property
    def n_tiles(self) -> int:
        """Tiles of keys that the last of the rows sees."""
        return triton.cdiv(self.first + self.count, self.tiles.keys)


def block_scores(
    q: Tensor, k: Tensor, *, scale: float, block: int, stride: int, threshold: float, scorer: str,
    tiles: ScoreTiles | None = None, room: int = PARTS_BYTES,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`fluxc::block_scores` -> block_index i32[B,H,Sb,Sb], block_count i32[B,H,Sb].

    `tiles` overrides the pinned sizes (benchmarks), `room` the bytes between the launches (tests).
    """
    batch, heads, rows, _ = q.shape
    per, chunks, blocks = block // stride, triton.cdiv(rows, stride), triton.cdiv(rows, block)
    if scorer == "pooled":
        from fluxc.kernels.block_scores.op import chunks as pooled

        q, k = pooled(q, stride, scorer, keys=False), pooled(k, stride, scorer, keys=True)
        rows, stride = chunks, 1
    tiles = _at_least(per, tiles or _tiles(q, k))
    of_tile = tiles.keys // per
    row_bytes = 4 * batch * heads * of_tile * triton.cdiv(chunks, tiles.keys)
    launches = _launches(chunks, rows // stride, room // row_bytes, tiles)
    most = batch * heads * max(part.count * part.n_tiles for part in launches)
    parts = torch.empty(most * of_tile, dtype=torch.float32, device=q.device)
    tops = torch.empty(most, dtype=torch.float32, device=q.device)
    # Entries past a row's count mean nothing and stay as they are.
    index = torch.empty(batch, heads, blocks, blocks, dtype=torch.int32, device=q.device)
    count = torch.empty(batch, heads, blocks, dtype=torch.int32, device=q.device)
    for part in launches:
        _multiply(q, k, parts, tops, part, scale / stride * LOG2E, rows, chunks, stride, per)
        keep_kernel[(triton.cdiv(part.count, per), batch * heads)](
            parts, tops, index, count, threshold, chunks, blocks, part.first // per, part.count, part.n_tiles, PER=per,
            BN=tiles.keys, PADDED=triton.next_power_of_2(blocks), num_warps=4,
        )  # fmt: skip
    return index, count


def _launches(chunks: int, whole: int, room: int, tiles: ScoreTiles) -> list[Rows]:
    """Rows of chunks by launch, `room` of them or one tile; TMA cannot read the tile with a chunk that is cut off."""
    step = max(1, room // tiles.rows) * tiles.rows
    end = whole // tiles.rows * tiles.rows if tiles.tma and whole < chunks else chunks
    found = [Rows(first, min(step, end - first), tiles) for first in range(0, end, step)]
    if end < chunks:
        found.append(Rows(end, chunks - end, dataclasses.replace(tiles, tma=False)))
    return found


def _multiply(q: Tensor, k: Tensor, parts: Tensor, tops: Tensor, part: Rows, scale: float, rows: int, chunks: int,
              stride: int, per: int) -> None:  # fmt: skip
    batch, heads, _, width = q.shape
    tiles, wide = part.tiles, config.padded(width)
    depth = min(tiles.depth or wide, wide)
    operands: tuple[Any, Any] = (q, k)
    if tiles.tma:
        operands = _descriptor(q, stride, tiles.rows, depth), _descriptor(k, stride, tiles.keys, depth)
    bands = triton.cdiv(triton.cdiv(part.count, tiles.rows), NEIGHBOURS.value)
    parts_kernel[(bands * NEIGHBOURS.value * part.n_tiles, batch * heads)](
        *operands, parts, tops, scale, *q.stride()[:3], *k.stride()[:3], heads, heads // k.shape[1], rows, chunks,
        part.first, part.count, part.n_tiles, D=width, WIDTH=wide, STRIDE=stride, PER=per, BM=tiles.rows,
        BN=tiles.keys, BK=depth, TMA=tiles.tma, PRECISION=input_precision(q), num_warps=tiles.warps,
        num_stages=tiles.stages,
    )  # fmt: skip


def _descriptor(x: Tensor, stride: int, chunks: int, depth: int) -> Any:
    """x [B,H,S,D] by its whole chunks, [B,H,stride,C,D], for tiles of `chunks` of them and `depth` columns."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    step_b, step_h, step = (x.stride(d) if x.shape[d] > 1 else 16 for d in range(3))
    shape = [x.shape[0], x.shape[1], stride, x.shape[2] // stride, x.shape[3]]
    return TensorDescriptor(x, shape, [step_b, step_h, step, stride * step, 1], [1, 1, 1, chunks, depth])


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


def _tiles(q: Tensor, k: Tensor) -> ScoreTiles:
    """The pinned sizes for these operands, in whole blocks."""
    if interpreted():
        return config.SCORES_INTERPRETED
    major, minor = torch.cuda.get_device_capability(q.device)
    if major == 9 and q.dtype != torch.float32 and not not_tma(q, k, k):
        return config.SCORES_90
    row_bytes = config.padded(q.shape[-1]) * q.element_size()
    # Three TF32 products keep the parts of each operand as well.
    return config.scores_for(10 * major + minor, row_bytes * (2 if q.dtype == torch.float32 else 1))


def _at_least(per: int, tiles: ScoreTiles) -> ScoreTiles:
    return dataclasses.replace(tiles, rows=max(tiles.rows, per), keys=max(tiles.keys, per))
