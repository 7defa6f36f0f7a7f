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
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

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
def _prefetch(cache, table, lens, b, hk, kv_heads, pages, columns, split, splits, D: tl.constexpr, PAGE: tl.constexpr,
              AHEAD: tl.constexpr):  # fmt: skip
    """Ask for this program's first AHEAD pages in the L2 cache while the kernel before is still running.

    That kernel may yet write lengths, page numbers and pages. What is read here therefore only decides what is fetched
    early, and is read past the first-level cache, which would keep it.
    """
    LINE: tl.constexpr = 128 * 8 // cache.dtype.element_ty.primitive_bitwidth
    LINES: tl.constexpr = PAGE * D // LINE
    line = tl.arange(0, 2 * LINES)
    at = (line // LINES) * (kv_heads * PAGE * D) + (line % LINES) * LINE
    length = tl.load(lens + b, cache_modifier=".cg")
    for step in tl.static_range(AHEAD):
        page = split + step * splits
        number = tl.load(table + page, mask=page < columns, other=-1, cache_modifier=".cg")
        wanted = (number >= 0) & (number < pages) & (page * PAGE < length)
        pointers = cache + (number.to(tl.int64) * 2 * kv_heads + hk) * (PAGE * D) + at
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.b32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.b32 $0, 0; }", "=r,l,r",
            [pointers.to(tl.int64), wanted.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def _pages(q, cache, table, length, pages, columns, split, splits, hk, kv_heads, scale, W: tl.constexpr,
           G: tl.constexpr, R: tl.constexpr, M: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
           PAGE: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Attention of a tile of queries [W,M,WIDTH], of which G rows count, over every `splits`-th page: output without
    division [R,WIDTH], maximum and sum [M].

    Each of W warps keeps its own sums over its own slots of a page, so warps wait for nothing but the loads. A page
    past the cache is not read and makes the sum NaN.
    """
    KEYS: tl.constexpr = PAGE // W
    slot = tl.arange(0, W)[:, None] * KEYS + tl.arange(0, KEYS)[None, :]
    c = tl.arange(0, WIDTH)[None, None, :]
    inside = slot[:, :, None] * D + c
    m = tl.full([W, M], float("-inf"), tl.float32)
    total = tl.zeros([W, M], tl.float32)
    acc = tl.zeros([W, M, WIDTH], tl.float32)
    for page in tl.range(split, tl.minimum(tl.cdiv(length, PAGE), columns), splits):
        left = length - page * PAGE
        number = tl.load(table + page)
        known = (number >= 0) & (number < pages)
        keep = (slot < tl.where(known, left, 0))[:, :, None] & (c < D)
        base = cache + (number.to(tl.int64) * 2 * kv_heads + hk) * (PAGE * D)
        k = tl.load(base + inside, mask=keep, other=0.0)
        s = _capped(tl.dot(q, tl.permute(k, (0, 2, 1)), input_precision=PRECISION), scale, SOFTCAP)
        s = tl.where((slot < left)[:, None, :], s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 2))
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(s - shift[:, :, None])
        alpha = tl.exp2(m - shift)
        v = tl.load(base + kv_heads * (PAGE * D) + inside, mask=keep, other=0.0)
        total = total * alpha + tl.sum(p, 2) + tl.where(known, 0.0, float("nan"))
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, :, None], input_precision=PRECISION)
        m = m_new
    top = tl.max(m, 0)
    weight = tl.exp2(m - tl.where(top == float("-inf"), 0.0, top)[None, :])
    counts = (tl.arange(0, M) < G)[None, :, None]
    acc = tl.reshape(tl.where(counts, acc * weight[:, :, None], 0.0), (W, M // R, R, WIDTH))
    return tl.sum(tl.sum(acc, 1), 0), top, tl.sum(total * weight, 0)


@triton.jit
def _some_parts(parts, sums, first, splits, DEEP: tl.constexpr, SIDE: tl.constexpr, G: tl.constexpr, G2: tl.constexpr,
                D: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """Parts [SIDE,G2,DEEP,WIDTH] from `first` on and their maxima, past the first-level cache: other programs wrote
    them during this launch. SIDE parts lie side by side over the threads; a thread holds its columns of DEEP."""
    split = first + tl.arange(0, DEEP)[None, None, :] * SIDE + tl.arange(0, SIDE)[:, None, None]
    g = tl.arange(0, G2)[None, :, None]
    c = tl.arange(0, WIDTH)[None, None, None, :]
    some = (split < splits) & (g < G)
    x = tl.load(parts + (split * G + g)[:, :, :, None] * D + c, mask=some[:, :, :, None] & (c < D), other=0.0,
                cache_modifier=".cg")  # fmt: skip
    return x, tl.load(sums + split * (2 * G) + g, mask=some, other=float("-inf"), cache_modifier=".cg")


@triton.jit
def _combine(parts, sums, sink_logits, out, splits, S2: tl.constexpr, DEEP: tl.constexpr, SIDE: tl.constexpr,
             G: tl.constexpr, G2: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
             SINK_LOGITS: tl.constexpr):  # fmt: skip
    """Add up the parts [splits,G,D] of one key head, each scaled by its maximum and sum [splits,2,G]."""
    every = tl.arange(0, S2)
    g = tl.arange(0, G2)
    c = tl.arange(0, WIDTH)
    head = (every < splits)[:, None] & (g < G)[None, :]
    at = sums + every[:, None] * (2 * G) + g[None, :]
    m = tl.load(at, mask=head, other=float("-inf"), cache_modifier=".cg")
    part_sum = tl.load(at + G, mask=head, other=0.0, cache_modifier=".cg")
    x, x_m = _some_parts(parts, sums, 0, splits, DEEP, SIDE, G, G2, D, WIDTH)
    top = tl.max(m, 0)
    if SINK_LOGITS:
        sink = tl.load(sink_logits + g, mask=g < G, other=float("-inf")).to(tl.float32) * LOG2E_T
        top = tl.maximum(top, sink)
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(part_sum * tl.exp2(m - top[None, :]), 0)
    if SINK_LOGITS:
        total += tl.exp2(sink - top)
    o = tl.sum(x * tl.exp2(x_m - top[None, :, None])[:, :, :, None], 2)
    if DEEP * SIDE < S2:
        for first in tl.range(DEEP * SIDE, splits, DEEP * SIDE, num_stages=1):
            x, x_m = _some_parts(parts, sums, first, splits, DEEP, SIDE, G, G2, D, WIDTH)
            o += tl.sum(x * tl.exp2(x_m - top[None, :, None])[:, :, :, None], 2)
    y = tl.sum(o, 0) / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(out + g[:, None] * D + c[None, :], y.to(out.dtype.element_ty), mask=(g < G)[:, None] & (c < D)[None, :])


@triton.jit(do_not_specialize=("table_row", "pages", "columns", "splits"))
def decode_kernel(q, cache, table, lens, sink_logits, parts, sums, counters, out, q_batch, q_head, table_row,
                  kv_heads, pages, columns, splits, scale, S2: tl.constexpr, DEEP: tl.constexpr, SIDE: tl.constexpr,
                  W: tl.constexpr, G: tl.constexpr, G2: tl.constexpr, R: tl.constexpr, M: tl.constexpr,
                  D: tl.constexpr, WIDTH: tl.constexpr, PAGE: tl.constexpr, SINK_LOGITS: tl.constexpr,
                  SOFTCAP: tl.constexpr, DEPENDENT: tl.constexpr, AHEAD: tl.constexpr,
                  PRECISION: tl.constexpr):  # fmt: skip
    """q [B,H,D], cache [pages,2,Hk,PAGE,D], table i32[B,P], lens i32[B] -> out [B,H,D]; counters i32[B,Hk] zero,
    and zero again at the end.

    G: query heads of a key head, G2 the power of two above, M the rows of their tile, R those kept, S2 the power of two
    above splits, W: warps, DEEP * SIDE: the parts added up at once. `scale` includes log2(e).
    DEPENDENT: started before the kernel ahead of it has finished; waits for it here.
    A length past the table's columns, or a page past the cache's pages, is not read and gives NaN.
    """
    split = tl.program_id(0)
    hk = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    table += b * table_row
    if AHEAD != 0:
        _prefetch(cache, table, lens, b, hk, kv_heads, pages, columns, split, splits, D, PAGE, AHEAD)
    if DEPENDENT:
        gdc_wait()
    length = tl.load(lens + b)
    g = tl.arange(0, M)
    c = tl.arange(0, WIDTH)
    rows = tl.zeros([W], tl.int32)[:, None, None] + (hk * G + g)[None, :, None]
    b_q = tl.load(q + b * q_batch + rows * q_head + c[None, None, :], other=0.0,
                  mask=(g < G)[None, :, None] & (c < D)[None, None, :])  # fmt: skip
    acc, m, total = _pages(b_q, cache, table, length, pages, columns, split, splits, hk, kv_heads, scale, W, G, R,
                           M, D, WIDTH, PAGE, SOFTCAP, PRECISION)  # fmt: skip
    if DEPENDENT:
        gdc_launch_dependents()
    total += tl.where((length < 0) | (length > columns * PAGE), float("nan"), 0.0)
    row = b * kv_heads + hk
    parts += row * (splits * G * D)
    sums += row * (splits * 2 * G)
    r = tl.arange(0, R)
    tl.store(parts + (split * G + r)[:, None] * D + c[None, :], acc, mask=(r < G)[:, None] & (c < D)[None, :])
    tl.store(sums + split * 2 * G + g, m, mask=g < G)
    tl.store(sums + split * 2 * G + G + g, total, mask=g < G)
    tl.debug_barrier()
    if tl.atomic_add(counters + row, 1, sem="acq_rel", scope="gpu") == splits - 1:
        tl.debug_barrier()
        tl.store(counters + row, 0)
        _combine(parts, sums, sink_logits + hk * G if SINK_LOGITS else None, out + row * (G * D), splits, S2, DEEP,
                 SIDE, G, G2, D, WIDTH, SINK_LOGITS)  # fmt: skip


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
    heads_of = triton.next_power_of_2(group)
    deep, side = _at_once(splits, heads_of * padded, tiles)
    parts = torch.empty(batch, kv_heads, splits, group, width, dtype=torch.float32, device=q.device)
    sums = torch.empty(batch, kv_heads, splits, 2, group, dtype=torch.float32, device=q.device)
    counters = _counters(batch * kv_heads, q.device)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    decode_kernel[(splits, kv_heads, batch)](
        q, cache, page_table, lens, sink_logits, parts, sums, counters, out, q.stride(0), q.stride(1),
        page_table.stride(0), kv_heads, cache.shape[0], page_table.shape[1], splits, scale * LOG2E,
        S2=triton.next_power_of_2(splits), DEEP=deep, SIDE=side, W=tiles.warps, G=group,
        G2=heads_of, R=max(8, heads_of), M=max(16, heads_of), D=width, WIDTH=padded, PAGE=PAGE,
        SINK_LOGITS=sink_logits is not None, SOFTCAP=float(softcap), DEPENDENT=tiles.dependent, AHEAD=tiles.ahead,
        PRECISION=input_precision(q), num_warps=tiles.warps,
        # The page number is loaded ahead of its page: Triton shares the stages between the two.
        num_stages=2 * tiles.buffers + 1, **({"launch_pdl": True} if tiles.dependent else {}),
    )  # fmt: skip
    return out


def _at_once(splits: int, columns: int, tiles: DecodeTiles) -> tuple[int, int]:
    """Parts of `columns` numbers added up at once: those a thread holds, in `tiles.registers` registers, and those side
    by side, four columns to a thread."""
    every = triton.next_power_of_2(splits)
    side = max(1, min(128 * tiles.warps // columns, every))
    return max(1, min(32 * tiles.warps * tiles.registers // (side * columns), every // side)), side


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
    return config.decode_for(10 * major + minor, q.shape[-1], q.dtype == torch.float32)


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
