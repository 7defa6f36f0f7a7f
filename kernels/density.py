"""The exact share of causal (query, key) pairs that a kind of attention computes: what `ideal` is made of."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fluxc.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

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


def block_density(block_count: Tensor, S: int, block: int) -> float:
    """Pairs seen over pairs of causal attention, averaged over heads and requests: in (0, 1].

    block_count i32[...,Sb]: key blocks of `block` tokens that each block of queries reads, its own among them, for a
    prompt of S tokens; as `fluxc::block_scores` gives them. Reads the counts on the host.
    """
    blocks = -(-S // block)
    if block_count.shape[-1] != blocks:
        raise UserError(f"block_density: {block_count.shape[-1]} blocks counted, {S} tokens have {blocks} of {block}")
    mean = block_count.double().flatten(0, -2).mean(0).tolist()
    rows = [min(block, S - n * block) for n in range(blocks)]
    pairs = sum((count - 1) * block * row + _causal_pairs(row) for count, row in zip(mean, rows, strict=True))
    return pairs / _causal_pairs(S)


def _causal_pairs(rows: int) -> int:
    return rows * (rows + 1) // 2


def _streaming_pairs(rows: int, seen: int) -> int:
    """Row i sees min(i + 1, seen) keys."""
    full = min(rows, seen)
    return _causal_pairs(full) + (rows - full) * seen
