"""Decode attention in Triton: one query token per request over the slots of a paged cache.

The query heads of a key head are one tile, so the cache is read once. The pages of a request are split over programs;
the last of them to finish adds the parts up. Lengths and pages are read on the device: one captured CUDA graph serves
full and sparse layers, growing lengths and changing requests.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from fluxc.kernels import triton_config as config
from fluxc.kernels.schemas import PAGE
from fluxc.kernels.triton_config import DecodeTiles
from fluxc.kernels.triton_launch import input_precision

LOG2E = 1.4426950408889634
LOG2E_T = tl.constexpr(1.4426950408889634)


@triton.jit
def _capped(s, scale, SOFTCAP: tl.constexpr):
    """Scores in units of log2(e)."""
    s = s * scale
    if SOFTCAP != 0.0:
        s = (SOFTCAP * LOG2E_T) * (1.0 - 2.0 / (tl.exp2(s * (2.0 / SOFTCAP)) + 1.0))
    return s


@triton.jit
def _pages(q, cache, table, length, pages, first, stop, hk, kv_heads, scale, M: tl.constexpr, D: tl.constexpr,
           WIDTH: tl.constexpr, PAGE: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Attention of a tile of queries over the pages [first, stop): output without division, maximum, sum.

    A page past the cache is not read and makes the sum NaN.
    """
    slot = tl.arange(0, PAGE)
    c = tl.arange(0, WIDTH)
    inside = slot[:, None] * D + c[None, :]
    m = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, WIDTH], tl.float32)
    for page in tl.range(first, stop):
        valid = page * PAGE + slot < length
        number = tl.load(table + page)
        known = (number >= 0) & (number < pages)
        keep = (page * PAGE + slot < tl.where(known, length, 0))[:, None] & (c < D)[None, :]
        base = cache + (number.to(tl.int64) * 2 * kv_heads + hk) * (PAGE * D)
        k = tl.load(base + inside, mask=keep, other=0.0)
        s = _capped(tl.dot(q, k.T, input_precision=PRECISION), scale, SOFTCAP)
        s = tl.where(valid[None, :], s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        p = tl.exp2(s - m_new[:, None])
        alpha = tl.exp2(m - m_new)
        v = tl.load(base + kv_heads * (PAGE * D) + inside, mask=keep, other=0.0)
        total = total * alpha + tl.sum(p, 1) + tl.where(known, 0.0, float("nan"))
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
        m = m_new
    return acc, m, total


@triton.jit
def _combine(parts, sums, sink_logits, out, SPLITS: tl.constexpr, S2: tl.constexpr, CHUNK: tl.constexpr,
             G: tl.constexpr, G2: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
             SINK_LOGITS: tl.constexpr):  # fmt: skip
    """Add up the parts [SPLITS,G,D] of one key head, each scaled by its maximum and sum [SPLITS,2,G].

    CHUNK parts of all query heads are loaded at once, past the first-level cache: other programs wrote them during this
    launch. A thread holds its columns of every part, so adding them up needs no exchange.
    """
    every = tl.arange(0, S2)
    g = tl.arange(0, G2)
    c = tl.arange(0, WIDTH)
    head = (every < SPLITS)[:, None] & (g < G)[None, :]
    at = sums + every[:, None] * (2 * G) + g[None, :]
    m = tl.load(at, mask=head, other=float("-inf"), cache_modifier=".cg")
    part_sum = tl.load(at + G, mask=head, other=0.0, cache_modifier=".cg")
    top = tl.max(m, 0)
    if SINK_LOGITS:
        sink = tl.load(sink_logits + g, mask=g < G, other=float("-inf")).to(tl.float32) * LOG2E_T
        top = tl.maximum(top, sink)
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(part_sum * tl.exp2(m - top[None, :]), 0)
    if SINK_LOGITS:
        total += tl.exp2(sink - top)
    o = tl.zeros([G2, WIDTH], tl.float32)
    for first in tl.static_range(0, S2, CHUNK):
        split = first + tl.arange(0, CHUNK)
        some = (split < SPLITS)[:, None] & (g < G)[None, :]
        x = tl.load(parts + (split[:, None] * G + g[None, :])[:, :, None] * D + c[None, None, :],
                    mask=some[:, :, None] & (c < D)[None, None, :], other=0.0, cache_modifier=".cg")  # fmt: skip
        m = tl.load(sums + split[:, None] * (2 * G) + g[None, :], mask=some, other=float("-inf"), cache_modifier=".cg")
        o += tl.sum(x * tl.exp2(m - top[None, :])[:, :, None], 0)
    o = o / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(out + g[:, None] * D + c[None, :], o.to(out.dtype.element_ty), mask=(g < G)[:, None] & (c < D)[None, :])


@triton.jit(do_not_specialize=("table_row", "pages", "columns"))
def decode_kernel(q, cache, table, lens, sink_logits, parts, sums, counters, out, q_batch, q_head, table_row,
                  kv_heads, pages, columns, scale, SPLITS: tl.constexpr, S2: tl.constexpr, CHUNK: tl.constexpr,
                  G: tl.constexpr, G2: tl.constexpr, M: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
                  PAGE: tl.constexpr, SINK_LOGITS: tl.constexpr, SOFTCAP: tl.constexpr,
                  PRECISION: tl.constexpr):  # fmt: skip
    """q [B,H,D], cache [pages,2,Hk,PAGE,D], table i32[B,P], lens i32[B] -> out [B,H,D]; counters i32[B,Hk] zero,
    and zero again at the end.

    G: query heads of a key head, G2 the power of two above, M the rows of their tile, S2 the power of two above SPLITS,
    CHUNK the parts added up at once. `scale` includes log2(e).
    A length past the table's columns, or a page past the cache's pages, is not read and gives NaN.
    """
    split = tl.program_id(0)
    hk = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    length = tl.load(lens + b)
    n_pages = tl.minimum(tl.cdiv(length, PAGE), columns)
    each = tl.cdiv(n_pages, SPLITS)
    g = tl.arange(0, M)
    c = tl.arange(0, WIDTH)
    seen = (g < G)[:, None] & (c < D)[None, :]
    b_q = tl.load(q + b * q_batch + (hk * G + g)[:, None] * q_head + c[None, :], mask=seen, other=0.0)
    acc, m, total = _pages(b_q, cache, table + b * table_row, length, pages, split * each,
                           tl.minimum((split + 1) * each, n_pages), hk, kv_heads, scale, M, D, WIDTH, PAGE, SOFTCAP,
                           PRECISION)  # fmt: skip
    total += tl.where((length < 0) | (length > columns * PAGE), float("nan"), 0.0)
    row = b * kv_heads + hk
    parts += row * (SPLITS * G * D)
    sums += row * (SPLITS * 2 * G)
    tl.store(parts + (split * G + g)[:, None] * D + c[None, :], acc, mask=seen)
    tl.store(sums + split * 2 * G + g, m, mask=g < G)
    tl.store(sums + split * 2 * G + G + g, total, mask=g < G)
    tl.debug_barrier()
    if tl.atomic_add(counters + row, 1, sem="acq_rel", scope="gpu") == SPLITS - 1:
        tl.debug_barrier()
        tl.store(counters + row, 0)
        _combine(parts, sums, sink_logits + hk * G if SINK_LOGITS else None, out + row * (G * D), SPLITS, S2, CHUNK, G,
                 G2, D, WIDTH, SINK_LOGITS)  # fmt: skip


def decode_attention(
    q: Tensor,
    cache: Tensor,
    page_table: Tensor,
    lens: Tensor,
    *,
    scale: float,
    softcap: float = 0.0,
    sink_logits: Tensor | None = None,
    tiles: DecodeTiles | None = None,
) -> Tensor:
    """`fluxc::decode_attention` -> [B,H,D], contiguous; a request without slots gets zeros."""
    batch, heads, width = q.shape
    kv_heads, group = cache.shape[2], heads // cache.shape[2]
    padded = max(16, triton.next_power_of_2(width))
    tiles = tiles or _tiles(q)
    splits = _splits(q, page_table, kv_heads, tiles)
    parts = torch.empty(batch, kv_heads, splits, group, width, dtype=torch.float32, device=q.device)
    sums = torch.empty(batch, kv_heads, splits, 2, group, dtype=torch.float32, device=q.device)
    counters = _counters(batch * kv_heads, q.device)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    decode_kernel[(splits, kv_heads, batch)](
        q, cache, page_table, lens, sink_logits, parts, sums, counters, out, q.stride(0), q.stride(1),
        page_table.stride(0), kv_heads, cache.shape[0], page_table.shape[1], scale * LOG2E, SPLITS=splits,
        S2=triton.next_power_of_2(splits), CHUNK=_chunk(splits, group, padded, tiles),
        G=group, G2=triton.next_power_of_2(group), M=max(16, triton.next_power_of_2(group)), D=width, WIDTH=padded,
        PAGE=PAGE,
        SINK_LOGITS=sink_logits is not None,
        SOFTCAP=float(softcap), PRECISION=input_precision(q), num_warps=tiles.warps,
        # The page number is loaded ahead of its page: Triton shares the stages between the two.
        num_stages=2 * tiles.buffers + 1,
    )  # fmt: skip
    return out


def _chunk(splits: int, group: int, width: int, tiles: DecodeTiles) -> int:
    """Parts added up at once: as many as fit 64 registers of a thread."""
    room = 64 * 32 * tiles.warps // (triton.next_power_of_2(group) * width)
    return max(1, min(triton.next_power_of_2(splits), room))


@dataclasses.dataclass
class _Counters:
    """Zeroed counters of one device. Every call leaves its own at zero, so nobody clears them again.

    Calls on one stream come one after the other and share theirs. A call that is recorded into a graph gets counters of
    its own, because graphs may run side by side.
    """

    recorded: Tensor
    used: int = 0
    of_stream: dict[int, Tensor] = dataclasses.field(default_factory=dict)

    def record(self, count: int) -> Tensor | None:
        """Counters for one recorded call, None where all are given away."""
        found = self.recorded[self.used : self.used + count]
        self.used += count
        return found if found.numel() == count else None


@functools.cache
def _kept() -> dict[torch.device, _Counters]:
    return {}


def _counters(count: int, device: torch.device) -> Tensor:
    """`count` counters i32 at zero; a graph recorded before any other call, or after 1M counters, clears its own."""
    kept = _kept().get(device)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        found = kept.record(count) if kept else None
        return torch.zeros(count, dtype=torch.int32, device=device) if found is None else found
    if kept is None:
        kept = _kept()[device] = _Counters(torch.zeros(1 << 20, dtype=torch.int32, device=device))
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    found = kept.of_stream.get(stream)
    if found is None or found.numel() < count:
        found = kept.of_stream[stream] = torch.zeros(max(count, 1024), dtype=torch.int32, device=device)
    return found


def _tiles(q: Tensor) -> DecodeTiles:
    major, minor = torch.cuda.get_device_capability(q.device) if q.is_cuda else (8, 0)
    return config.decode_for(10 * major + minor, q.shape[-1] * q.element_size() // 2)


def _splits(q: Tensor, page_table: Tensor, kv_heads: int, tiles: DecodeTiles) -> int:
    """Programs a request's pages are cut into: enough to fill the device, from shapes alone."""
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 3
    return max(1, min(page_table.shape[1], tiles.waves * processors // (q.shape[0] * kv_heads), 128))


def unsupported(q: Tensor, cache: Tensor, page_table: Tensor, lens: Tensor) -> str | None:
    """Why the kernel cannot serve this call, or None if it can."""
    if not q.is_cuda and not triton.knobs.runtime.interpret:
        return "needs a CUDA device"
    if q.dtype != cache.dtype or q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"dtypes {q.dtype} and {cache.dtype} are not one of fp16, bf16 and fp32"
    if cache.dim() != 5 or cache.shape[3] != PAGE or not cache.is_contiguous():
        return f"the cache is not contiguous [pages, 2, Hk, {PAGE}, D]"
    if q.shape[-1] != cache.shape[-1] or q.shape[-1] > 256 or q.shape[1] % cache.shape[2]:
        return f"{q.shape[1]} heads of {q.shape[-1]} do not fit a cache of {cache.shape[2]} heads of {cache.shape[-1]}"
    if q.shape[-1] * q.element_size() > 512:
        return f"pages of {q.dtype} heads of {q.shape[-1]} do not fit the shared memory"
    if page_table.dtype != torch.int32 or lens.dtype != torch.int32 or page_table.stride(-1) != 1:
        return "page_table or lens is not i32, rows contiguous"
    if q.stride(-1) != 1:
        return "the last dimension of q is not contiguous"
    return None
