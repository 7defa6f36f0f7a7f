"""Which key tiles a tile of query rows visits: one rule for every attention kernel, full or sparse.

A tile of rows sees the sink, its window, the diagonal, and (dense rows: triangle's last rows, a route that says full)
all keys before it. The visible key tiles fall into ranges, and only those at an edge need a mask:

    0 .. head         sink tiles every row sees whole                          no mask
    head .. +n_sink   the tile where the sink ends                             mask
    edge .. body      tiles where the window of some row begins                mask
    body .. diag      tiles every row sees whole                               no mask
    diag .. end       tiles the diagonal crosses                               mask

The masked ranges are visited first, the diagonal before all others, so that a row's running maximum is finite before
the loop without masks begins.

The functions are plain Python over scalars; the Triton and the Gluon kernels compile the same text.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.experimental import gluon

FAR = tl.constexpr(1 << 30)  # a position past every key; twice this still fits an int32

COUNTS = ("heads", "group", "batch_heads", "rows", "keys", "n_tiles", "sink", "window", "last")
"""Kernel arguments that must not start a compilation of their own for each kind of value."""


def _dense_rows(b, route_ptr, prompt_ptr, last, HAS_ROUTE: tl.constexpr, HAS_PROMPT: tl.constexpr,
                DECODE_FULL: tl.constexpr):  # fmt: skip
    """The rows [first, stop) of sample b that see every key before them."""
    first = b * 0
    stop = b * 0
    if HAS_PROMPT:
        prompt_len = tl.load(prompt_ptr + b).to(tl.int32)
        first = prompt_len - last
        stop = prompt_len
        if DECODE_FULL:
            stop = prompt_len + FAR
    if HAS_ROUTE:
        full = tl.load(route_ptr + b).to(tl.int32)
        first = first * (1 - full)
        stop = stop * (1 - full) + full * FAR
    return first, stop


def _tile_ranges(low, high, keys, sink, window, first_dense, stop_dense, BLOCK: tl.constexpr):
    """Key tiles of `BLOCK` keys for the rows [low, high]: (head, n_sink, edge, body, diag, end) as pictured above."""
    end = min(high, keys - 1) // BLOCK + 1
    diag = min(min((low + 1) // BLOCK, keys // BLOCK), end)
    any_dense = (max(low, first_dense) < min(high + 1, stop_dense)).to(tl.int32)
    all_dense = ((first_dense <= low) & (high < stop_dense)).to(tl.int32)
    sink = sink * (1 - all_dense)  # visited in the order of full attention, so that the sums are the same bits
    begins = max(low - window + 1, 0) // BLOCK * (1 - any_dense)
    whole = (max(high - window + 1, 0) + BLOCK - 1) // BLOCK * (1 - all_dense)
    head = min(sink // BLOCK, diag)
    edge = min(max(begins, head), diag)
    n_sink = max(min(min((sink + BLOCK - 1) // BLOCK, end), edge) - head, 0)
    body = min(max(whole, edge), diag)
    return head, n_sink, edge, body, diag, end


def _masked_tile(step, head, edge, body, diag, end):
    """The key tile of the `step`-th visit with a mask: diagonal, window edge, sink edge."""
    n_diag = end - diag
    n_edge = body - edge
    in_edge = (step >= n_diag).to(tl.int32)
    in_sink = (step >= n_diag + n_edge).to(tl.int32)
    return (diag + step) * (1 - in_edge) + (edge + step - n_diag) * (in_edge - in_sink) + head * in_sink


def _whole_tile(step, body, diag):
    """The key tile of the `step`-th visit without a mask: window, then sink."""
    n_body = diag - body
    in_head = (step >= n_body).to(tl.int32)
    return (body + step) * (1 - in_head) + (step - n_body) * in_head


dense_rows = triton.jit(_dense_rows)
tile_ranges = triton.jit(_tile_ranges)
masked_tile = triton.jit(_masked_tile)
whole_tile = triton.jit(_whole_tile)
gluon_dense_rows = gluon.jit(_dense_rows)
gluon_tile_ranges = gluon.jit(_tile_ranges)
gluon_masked_tile = gluon.jit(_masked_tile)
gluon_whole_tile = gluon.jit(_whole_tile)
