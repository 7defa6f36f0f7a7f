"""What decode and append attention share: checks of a paged cache's arguments, and gathering a request's slots."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NoReturn

import torch
from torch import Tensor

from fluxc.errors import UserError
from fluxc.kernels.row_call import DTYPES
from fluxc.kernels.schemas import PAGE

PIECE_BYTES = 2 << 20  # of a copy: a large fresh one costs more in page faults than the copy itself


def gather(op: str, cache: Tensor, pages: Tensor, slots: int) -> Tensor:
    """Keys and values [2,Hk,slots,D] of a request whose slots lie on `pages` i32[P], in slot order: one copy.

    Raises UserError, naming the op, for a page that the cache does not have.
    """
    return next(_pieces(op, cache, pages, slots, -(-slots // PAGE) or 1))


def pieces(op: str, cache: Tensor, pages: Tensor, slots: int) -> Iterator[Tensor]:
    """`gather` some pages at a time, for readers that merge what they make of each: all lie in the same memory."""
    return _pieces(op, cache, pages, slots, max(1, PIECE_BYTES // (cache[0].numel() * cache.element_size())))


def _pieces(op: str, cache: Tensor, pages: Tensor, slots: int, each: int) -> Iterator[Tensor]:
    count, _, heads, page, width = cache.shape
    if not cache.is_contiguous():
        cache = cache.contiguous()
    # Rows of one head of one page: the copy comes out in the order that attention reads.
    source = cache.view(count * 2 * heads, page * width)
    pages = pages[: -(-slots // page)].long()
    rows = pages * (2 * heads) + torch.arange(2 * heads, device=cache.device)[:, None]
    room = source.new_empty(2 * heads * min(each, len(pages)), page * width)
    for first in range(0, max(1, len(pages)), each):
        chosen = rows[:, first : first + each].flatten()
        try:
            found = torch.index_select(source, 0, chosen, out=room[: len(chosen)])
        except IndexError as error:
            low, high = int(pages.min()), int(pages.max())
            raise UserError(f"fluxc::{op}: page_table must lie in 0..{count - 1}, found {low}..{high}") from error
        yield found.view(2, heads, -1, width)[:, :, : slots - first * page]


def check(op: str, q: Tensor, cache: Tensor, page_table: Tensor, lens: Tensor, sink_logits: Tensor | None) -> None:
    """Raise UserError, naming op, argument and limit, unless q [B,H,..,D] fits the cache, its table and lengths.

    The values of lens are read on the CPU only: elsewhere that would stall the device, whose kernels answer a length
    past the table with NaN.
    """
    problem = _cache_problem(q, cache) or _table_problem(q, page_table, lens, sink_logits)
    if not problem and not lens.is_cuda:
        problem = _range_problem(page_table, lens)
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


def _range_problem(page_table: Tensor, lens: Tensor) -> str | None:
    found, capacity = lens.tolist(), page_table.shape[1] * PAGE
    if min(found) < 0 or max(found) > capacity:
        pages = f"the slots of {page_table.shape[1]} pages"
        return f"lens must lie in 0..{capacity}, {pages}, found {min(found)}..{max(found)}"
    return None
