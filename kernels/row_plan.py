"""Which keys each row of one request sees, as a short list of row segments. Nothing here touches a tensor.

Rows and keys are counted in absolute positions: with a query offset, rows begin there. A segment is either full (its
rows see all keys j <= i) or a band (its rows see the streaming set, with something hidden in every row).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Segment:
    """Rows [begin, end). window 0: full. Else a band: begin >= sink + window, so sink and window never overlap."""

    begin: int
    end: int
    sink: int = 0
    window: int = 0


def plan_rows(begin: int, end: int, *, sink: int, window: int, dense: tuple[int, int] | None = None) -> list[Segment]:
    """Segments, in order, of rows [begin, end) that see the streaming set of (sink, window), those of `dense` all keys.

    window 0 makes every row full. Rows before sink + window are full as well: nothing is hidden from them yet.
    """
    if window == 0:
        return [Segment(begin, end)]
    low, high = dense if dense and dense[0] < dense[1] else (end, end)
    low, high = (min(max(at, begin), end) for at in (low, high))
    split = min(max(begin, sink + window), end)
    cuts = [
        Segment(begin, split),
        Segment(split, max(low, split), sink, window),
        Segment(max(low, split), max(high, split)),
        Segment(max(high, split), end, sink, window),
    ]
    return _joined([cut for cut in cuts if cut.begin < cut.end])


def dense_rows(prompt_len: int, end: int, *, last: int, decode_full: bool) -> tuple[int, int]:
    """Rows [low, high) of triangle attention that see all keys: the last of the prompt and, if asked, all after it."""
    return max(0, prompt_len - last), end if decode_full else prompt_len


def _joined(cuts: list[Segment]) -> list[Segment]:
    joined = cuts[:1]
    for cut in cuts[1:]:
        if cut.window == joined[-1].window == 0:
            joined[-1] = Segment(joined[-1].begin, cut.end)
        else:
            joined.append(cut)
    return joined
