"""Banded rows: each sees the first `sink` keys and its last `window`, computed a chunk of rows at a time.

A chunk's keys are put side by side, [sink keys | keys of the chunk's windows], so that one flash call with one small
mask, the same for all chunks, computes it: nothing to merge, no work beyond a chunk's own rows.

    row t of the chunk, key u after the sink:  visible when t <= u < t + window

To bring the sink next to the windows without gathering each chunk, the keys are copied once and the sink is written
over the keys just before the chunk's windows. Chunks run in order, so no later chunk reads what is overwritten.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fluxc.kernels.row_plan import Segment

CHUNK_ROWS = 256
MIN_CHUNK_ROWS = 32


@dataclass(frozen=True)
class Chunk:
    """Rows `rows` (absolute), their keys k [Hk,T,D], v [Hk,T,Dv], mask [R,T]; `keys`: the others than the sink."""

    rows: slice
    keys: slice
    k: Tensor
    v: Tensor
    mask: Tensor


def chunks(band: Segment, k: Tensor, v: Tensor) -> Iterator[Chunk]:
    """Cut a band into chunks; k [Hk,T,D] and v [Hk,T,Dv] are read only. A chunk is valid until the next is asked."""
    sink, window = band.sink, band.window
    step = chunk_rows(window)
    first = band.begin - window + 1 - sink
    sides = [(x[:, :sink], x[:, first : band.end].clone(memory_format=torch.contiguous_format)) for x in (k, v)]
    mask = band_mask(min(step, band.end - band.begin), sink, window, k)
    for begin in range(band.begin, band.end, step):
        end = min(begin + step, band.end)
        at = begin - band.begin
        for kept, copy in sides:
            copy[:, at : at + sink] = kept
        width = sink + window - 1 + end - begin
        b_k, b_v = (copy[:, at : at + width] for _, copy in sides)
        yield Chunk(slice(begin, end), slice(begin - window + 1, end), b_k, b_v, mask[: end - begin, :width])


def chunk_rows(window: int) -> int:
    """Rows of a chunk: as many as the kernel likes, few enough that the mask hides little."""
    return min(CHUNK_ROWS, max(MIN_CHUNK_ROWS, window // 2))


def band_mask(rows: int, sink: int, window: int, like: Tensor) -> Tensor:
    """Additive mask [rows, sink + window - 1 + rows] in the dtype of `like`: 0 where visible, else -inf."""
    row = torch.arange(rows, device=like.device).unsqueeze(1)
    key = torch.arange(window - 1 + rows, device=like.device)
    mask = like.new_full((rows, sink + window - 1 + rows), 0.0)
    mask[:, sink:].masked_fill_((key < row) | (key >= row + window), -torch.inf)
    return mask
