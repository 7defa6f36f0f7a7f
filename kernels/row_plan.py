"""Which keys each row of one request sees, as row segments, and those segments cut into pieces without a mask.

Every attention of fluxc is a list of row segments in absolute positions: a segment is either full (all keys j <= i) or
streaming (sink, window). `plan_rows` says the segments of a kind, `tiles` cuts a segment into groups of unmasked
rectangles and triangles that a flash kernel computes without waste. Nothing here touches a tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

CHUNK_ROWS = 256
Shape = Literal["rectangle", "causal", "anticausal"]


@dataclass(frozen=True)
class Segment:
    """Rows [begin, end) that all see the streaming set of (sink, window); window 0: all keys j <= i."""

    begin: int
    end: int
    sink: int = 0
    window: int = 0


@dataclass(frozen=True)
class Tile:
    """Rows [row, row + rows) against keys [key, key + keys).

    rectangle: every row sees every key. causal (rows == keys): row t sees keys u <= t. anticausal (rows == keys): row
    t sees keys u >= t.
    """

    row: int
    rows: int
    key: int
    keys: int
    shape: Shape = "rectangle"


def plan_rows(
    begin: int, end: int, *, full: bool, sink: int, window: int, dense: tuple[int, int] | None = None
) -> list[Segment]:
    """Segments of rows [begin, end): all full, or streaming except the rows of `dense`, which are full."""
    if full or window == 0:
        return [Segment(begin, end)]
    low, high = dense or (end, end)
    low, high = min(max(low, begin), end), min(max(high, begin), end)
    cuts = [Segment(begin, low, sink, window), Segment(low, high), Segment(max(low, high), end, sink, window)]
    return [cut for cut in cuts if cut.end > cut.begin]


def dense_rows(prompt_len: int, end: int, *, last: int, decode_full: bool) -> tuple[int, int]:
    """Rows of triangle attention that see all keys: the last of the prompt and, if asked, all after it."""
    return max(0, prompt_len - last), end if decode_full else prompt_len


def tiles(segment: Segment, chunk: int = CHUNK_ROWS) -> Iterator[list[Tile]]:
    """Groups of tiles; the tiles of a group cover the same rows with disjoint keys, its first tile all of its rows."""
    if not segment.window:
        yield _full_tiles(segment.begin, segment.end)
        return
    # Up to sink + window keys nothing is hidden yet; past it the window no longer touches the sink.
    split = min(max(segment.begin, segment.sink + segment.window), segment.end)
    if split > segment.begin:
        yield _full_tiles(segment.begin, split)
    step = min(chunk, segment.window)
    for row in range(split, segment.end, step):
        yield _window_tiles(row, min(step, segment.end - row), segment.sink, segment.window)


def _full_tiles(begin: int, end: int) -> list[Tile]:
    rows = end - begin
    past = [Tile(begin, rows, 0, begin)] if begin else []
    return [Tile(begin, rows, begin, rows, "causal"), *past]


def _window_tiles(row: int, rows: int, sink: int, window: int) -> list[Tile]:
    edge = row - window  # key edge + u is seen by row t of the chunk when u > t
    found = [Tile(row, rows, row, rows, "causal")]
    if window > rows:
        found.append(Tile(row, rows, edge + rows, window - rows))
    if rows > 1:
        found.append(Tile(row, rows - 1, edge + 1, rows - 1, "anticausal"))
    if sink:
        found.append(Tile(row, rows, 0, sink))
    return found
