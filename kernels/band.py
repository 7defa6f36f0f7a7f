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

# The CPU flash kernel works in blocks of 64 rows from 192 on, of 32 below; fewer tokens than 64 cost too many calls.
FOLDED_ROWS = 192
FEW_TOKENS = 64
FEWEST_TOKENS = 32  # for windows narrower than twice this


@dataclass(frozen=True)
class Chunk:
    """Rows `rows` (absolute) with their keys k [Hk,T,D], v [Hk,T,Dv], and mask [G*R,T].

    `keys` says where the keys after the sink lie in the whole. The G query heads of a key/value head stand one after
    the other as rows (`fold`), so that few tokens still fill the kernel's blocks.
    """

    rows: slice
    keys: slice
    k: Tensor
    v: Tensor
    mask: Tensor


def chunks(band: Segment, k: Tensor, v: Tensor, groups: int) -> Iterator[Chunk]:
    """Cut a band into chunks; k [Hk,T,D] and v [Hk,T,Dv] are read only. A chunk is valid until the next is asked."""
    sink, window = band.sink, band.window
    step = min(chunk_rows(window, groups), band.end - band.begin)
    first = band.begin - window + 1 - sink
    sides = [(x[:, :sink], x[:, first : band.end].clone(memory_format=torch.contiguous_format)) for x in (k, v)]
    mask = band_mask(step, sink, window, k)
    folded = mask.repeat(groups, 1)
    for begin in range(band.begin, band.end, step):
        end = min(begin + step, band.end)
        at = begin - band.begin
        for kept, copy in sides:
            copy[:, at : at + sink] = kept
        width = sink + window - 1 + end - begin
        b_k, b_v = (copy[:, at : at + width] for _, copy in sides)
        if end - begin < step:
            folded = mask[: end - begin, :width].repeat(groups, 1)
        yield Chunk(slice(begin, end), slice(begin - window + 1, end), b_k, b_v, folded)


def fold(x: Tensor) -> Tensor:
    """[Hk,G,R,..] -> [Hk,1,G*R,..]"""
    return x.flatten(1, 2).unsqueeze(1)


def unfold(x: Tensor, groups: int) -> Tensor:
    """[Hk,1,G*R,..] -> [Hk,G,R,..]"""
    return x.squeeze(1).unflatten(1, (groups, -1))


def chunk_rows(window: int, groups: int) -> int:
    """Tokens of a chunk: all heads of a group together fill the kernel's blocks, and the mask hides little."""
    return max(FEWEST_TOKENS, min(max(FEW_TOKENS, FOLDED_ROWS // groups), window // 2))


def band_mask(rows: int, sink: int, window: int, like: Tensor) -> Tensor:
    """Additive mask [rows, sink + window - 1 + rows] in the dtype of `like`: 0 where visible, else -inf."""
    row = torch.arange(rows, device=like.device).unsqueeze(1)
    key = torch.arange(window - 1 + rows, device=like.device)
    mask = like.new_full((rows, sink + window - 1 + rows), 0.0)
    mask[:, sink:].masked_fill_((key < row) | (key >= row + window), -torch.inf)
    return mask
