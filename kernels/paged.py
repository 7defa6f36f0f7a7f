"""What decode and append attention share: checks of a paged cache's arguments, and gathering a request's slots."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from fluxc.errors import UserError
from fluxc.kernels.row_call import DTYPES
from fluxc.kernels.schemas import PAGE


def gather(cache: Tensor, pages: Tensor, slots: int) -> Tensor:
    """Keys and values [2,Hk,slots,D] of a request whose slots lie on `pages` i32[P], in slot order: one copy."""
    count, _, heads, page, width = cache.shape
    pages = pages[: -(-slots // page)].long()
    if not cache.is_contiguous():
        return cache[pages].permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :slots]
    # Rows of one head of one page: the copy comes out in the order that attention reads.
    side_and_head = torch.arange(2 * heads, device=cache.device)
    rows = pages * (2 * heads) + side_and_head[:, None]
    gathered = cache.view(count * 2 * heads, page * width).index_select(0, rows.flatten())
    return gathered.view(2, heads, -1, width)[:, :, :slots]


def check(op: str, q: Tensor, cache: Tensor, page_table: Tensor, lens: Tensor, sink_logits: Tensor | None) -> None:
    """Raise UserError, naming op, argument and limit, unless q [B,H,..,D] fits the cache, its table and lengths.

    The values of page_table and lens are read, so they are checked on the CPU only: elsewhere that would stall the
    device, and its kernels answer a length past the table with NaN.
    """
    problem = _cache_problem(q, cache) or _table_problem(q, page_table, lens, sink_logits)
    if not problem and not lens.is_cuda:
        problem = _range_problem(cache, page_table, lens)
    if problem:
        refuse(op, problem)


def refuse(op: str, problem: str) -> NoReturn:
    """Raise the UserError of a call that breaks the schema's rules."""
    raise UserError(f"fluxc::{op}: {problem}")


def _cache_problem(q: Tensor, cache: Tensor) -> str | None:
    if cache.dim() != 5 or cache.shape[1] != 2 or cache.shape[3] != PAGE:
        return f"cache must be [pages,2,Hk,{PAGE},D], is {tuple(cache.shape)}"
    if q.dtype not in DTYPES:
        return f"q is {q.dtype}, must be one of {', '.join(map(str, DTYPES))}"
    if (cache.dtype, cache.device) != (q.dtype, q.device):
        return f"cache is {cache.dtype} on {cache.device}, q is {q.dtype} on {q.device}"
    if q.numel() == 0:
        return f"q is empty: {tuple(q.shape)}"
    if q.shape[-1] != cache.shape[-1]:
        return f"q has width {q.shape[-1]}, the cache {cache.shape[-1]}"
    if q.shape[1] % cache.shape[2]:
        return f"q has {q.shape[1]} heads, no multiple of the cache's {cache.shape[2]}"
    return None


def _table_problem(q: Tensor, page_table: Tensor, lens: Tensor, sink_logits: Tensor | None) -> str | None:
    batch, heads = q.shape[:2]
    if page_table.dim() != 2 or page_table.shape[0] != batch:
        return f"page_table must be [{batch},P], is {tuple(page_table.shape)}"
    if lens.shape != (batch,):
        return f"lens must be [{batch}], is {tuple(lens.shape)}"
    for name, x in (("page_table", page_table), ("lens", lens)):
        if x.dtype != torch.int32:
            return f"{name} must be int32, is {x.dtype}"
    if sink_logits is not None and sink_logits.shape != (heads,):
        return f"sink_logits must be [{heads}], is {tuple(sink_logits.shape)}"
    return None


def _range_problem(cache: Tensor, page_table: Tensor, lens: Tensor) -> str | None:
    low, high, capacity = int(lens.min()), int(lens.max()), page_table.shape[1] * PAGE
    if low < 0 or high > capacity:
        return f"lens must lie in 0..{capacity}, the slots of {page_table.shape[1]} pages, found {low}..{high}"
    columns = torch.arange(page_table.shape[1], device=lens.device)
    read = page_table[columns < -(-lens[:, None] // PAGE)]
    if read.numel() and (int(read.min()) < 0 or int(read.max()) >= cache.shape[0]):
        return f"page_table must lie in 0..{cache.shape[0] - 1}, found {int(read.min())}..{int(read.max())}"
    return None
