"""Writing keys and values to the slots of a paged cache, in Triton: no value is read on the host."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fluxc.kernels.schemas import PAGE


@triton.jit(do_not_specialize=("tokens", "row_count"))
def write_kernel(cache, k, v, slots, k_batch, k_head, k_row, v_batch, v_head, v_row, kv_heads, row_count, slots_row,
                 slots_column, capacity, D: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr,
                 PAGE: tl.constexpr):  # fmt: skip
    """k, v [B,Hk,S,D] of one token a program -> cache [pages,2,Hk,PAGE,D] at slots i64[B,S], unless outside it."""
    token = tl.program_id(0).to(tl.int64)
    b = token // row_count
    s = token % row_count
    slot = tl.load(slots + b * slots_row + s * slots_column)
    g = tl.arange(0, HEADS).to(tl.int64)[:, None]
    c = tl.arange(0, WIDTH)[None, :]
    inside = (g < kv_heads) & (c < tl.where((slot >= 0) & (slot < capacity), D, 0))
    to = cache + ((slot // PAGE * 2 * kv_heads + g) * PAGE + slot % PAGE) * D + c
    tl.store(to, tl.load(k + b * k_batch + s * k_row + g * k_head + c, mask=inside, other=0.0), mask=inside)
    b_v = tl.load(v + b * v_batch + s * v_row + g * v_head + c, mask=inside, other=0.0)
    tl.store(to + kv_heads * (PAGE * D), b_v, mask=inside)


def kv_write(cache: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    """`fluxc::kv_write`: in place. A slot outside the cache drops its token."""
    batch, heads, rows, width = k.shape
    write_kernel[(batch * rows,)](
        cache, k, v, slots, *k.stride()[:3], *v.stride()[:3], heads, rows, *slots.stride(), cache.shape[0] * PAGE,
        D=width, WIDTH=triton.next_power_of_2(width), HEADS=triton.next_power_of_2(heads), PAGE=PAGE, num_warps=4,
    )  # fmt: skip


def unsupported(cache: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why the kernel cannot serve this call, or None if it can."""
    if not cache.is_contiguous():
        return "the cache is not contiguous"
    if any(x.stride(-1) != 1 for x in (k, v)):
        return "the last dimension of k or v is not contiguous"
    return None if k.numel() else "no token to write"
