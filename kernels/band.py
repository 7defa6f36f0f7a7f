"""Banded rows: each sees the first `sink` keys and its last `window`, computed many small chunks of rows at a time.

Two pieces cover a group of chunks, and are merged by log-sum-exp:

1. the windows: chunk c of C rows reads the window - 1 + C keys that end with its last row. All chunks look alike, so
   one flash call with one small mask computes them side by side over overlapping views of the keys, without a copy:

       row t of the chunk, key u of its view:  visible when t <= u < t + window

2. the sink: all rows see all of its keys.

The G query heads of a key/value head stand one after the other as rows of a chunk, so that few tokens, which waste
little on the mask, still fill the kernel's blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fluxc.kernels.row_plan import Segment

CHUNK_TOKENS = 64
GROUP_TOKENS = 4096  # rows of a call: few calls, yet their outputs stay in the cache until they are merged
GROUP_KEYS = 16384  # keys of a call, where the views of the keys are copied


@dataclass(frozen=True)
class Group:
    """`count` chunks of `tokens` rows each, from absolute row `begin` on, of a band."""

    begin: int
    tokens: int
    count: int
    band: Segment

    @property
    def end(self) -> int:
        return self.begin + self.tokens * self.count

    @property
    def views(self) -> list[slice]:
        """The keys each chunk reads besides the sink."""
        last = range(self.begin + self.tokens, self.end + 1, self.tokens)
        return [slice(at - self.tokens - self.band.window + 1, at) for at in last]

    def fold(self, x: Tensor) -> Tensor:
        """Rows of the group, [Hk,G,R,..] -> [count,Hk,G*tokens,..]."""
        return x.unflatten(2, (self.count, self.tokens)).movedim(2, 0).flatten(2, 3)

    def unfold(self, x: Tensor) -> Tensor:
        """[count,Hk,G*tokens,..] -> [Hk,G,count,tokens,..]"""
        return x.unflatten(2, (-1, self.tokens)).movedim(0, 2)

    def windows(self, x: Tensor) -> Tensor:
        """Keys or values x [Hk,1,T,D] as the chunks' overlapping views [count,Hk,window-1+tokens,D]."""
        keys = x[:, 0, self.views[0].start : self.end]
        return keys.unfold(1, self.band.window - 1 + self.tokens, self.tokens).permute(1, 0, 3, 2)

    def sinks(self, x: Tensor) -> Tensor:
        """Keys or values x [Hk,1,T,D] of the sink, the same for all chunks: [count,Hk,sink,D]."""
        return x[None, :, 0, : self.band.sink].expand(self.count, -1, -1, -1)


def groups(band: Segment, *, views_are_copied: bool) -> Iterator[Group]:
    """Cut a band into groups of equal chunks; the rows left over are a chunk of their own."""
    most = GROUP_KEYS // (band.window - 1 + CHUNK_TOKENS) if views_are_copied else GROUP_TOKENS // CHUNK_TOKENS
    whole, begin = (band.end - band.begin) // CHUNK_TOKENS, band.begin
    while whole:
        group = Group(begin, CHUNK_TOKENS, min(whole, max(1, most)), band)
        yield group
        whole, begin = whole - group.count, group.end
    if begin < band.end:
        yield Group(begin, band.end - begin, 1, band)


def window_mask(group: Group, heads: int, like: Tensor) -> Tensor:
    """Additive mask [heads*tokens, window-1+tokens] in the dtype of `like`: 0 where visible, else -inf."""
    row = torch.arange(group.tokens, device=like.device).unsqueeze(1)
    key = torch.arange(group.band.window - 1 + group.tokens, device=like.device)
    hidden = (key < row) | (key >= row + group.band.window)
    mask = like.new_zeros(hidden.shape).masked_fill_(hidden, -torch.inf)
    return mask.repeat(heads, 1)
