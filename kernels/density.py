"""The exact share of causal (query, key) pairs that a kind of attention computes: what `ideal` is made of."""

from __future__ import annotations

from fluxc.errors import UserError

KINDS = ("full", "streaming", "triangle")


def density(kind: str, S: int, sink: int = 0, window: int = 0, last: int = 0) -> float:
    """Pairs seen over pairs of causal attention, for a prompt of S tokens; in (0, 1].

    kind "full" | "streaming" | "triangle" (whose last rows of the prompt see all). Sizes are in tokens, window 0 means
    none. Raises UserError for another kind, an empty prompt or a negative size.
    """
    if kind not in KINDS:
        raise UserError(f"density: kind is {kind!r}", hint=f"Use one of {', '.join(KINDS)}")
    if S < 1 or min(sink, window, last) < 0:
        raise UserError(f"density: S={S}, sink={sink}, window={window}, last={last}: a size is too small")
    if kind == "full" or window == 0:
        return 1.0
    dense = min(last, S) if kind == "triangle" else 0
    pairs = _streaming_pairs(S - dense, sink + window) + _causal_pairs(S) - _causal_pairs(S - dense)
    return pairs / _causal_pairs(S)


def _causal_pairs(rows: int) -> int:
    return rows * (rows + 1) // 2


def _streaming_pairs(rows: int, seen: int) -> int:
    """Row i sees min(i + 1, seen) keys."""
    full = min(rows, seen)
    return _causal_pairs(full) + (rows - full) * seen
