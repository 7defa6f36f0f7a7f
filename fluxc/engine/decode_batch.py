"""The inputs of decode steps of the same requests: what changes with the token is computed for all layers at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fluxc.engine.geometry import lens_of, physical, slots_of
from fluxc.engine.sequence import TokenSequence
from fluxc.errors import InternalError

Key = tuple[tuple[int, int], ...]


class DecodeBatch:
    """Sizes and pages of B sequences, valid as long as `key` is: sinks, windows i64[A,B], table i32[A,B,P]."""

    def __init__(self, sequences: Sequence[TokenSequence]) -> None:
        self.key = DecodeBatch.key_of(sequences)
        # Kept, so that no other sequence can take the place of one in `key`.
        self._sequences = tuple(sequences)
        geometries = [sequence.geometry for sequence in sequences if sequence.geometry is not None]
        self._sinks = np.stack([geometry.sinks for geometry in geometries], axis=1)
        self._windows = np.stack([geometry.windows for geometry in geometries], axis=1)
        self._table = _tables(sequences)
        self._pages = self._table.astype(np.int64)  # what slots are computed with; too large to be cast every step

    @staticmethod
    def key_of(sequences: Sequence[TokenSequence]) -> Key:
        """Equal as long as the sequences and their pages are the same."""
        return tuple((id(sequence), sequence.holding.version if sequence.holding else -1) for sequence in sequences)

    def inputs(self, sequences: Sequence[TokenSequence]) -> tuple[np.ndarray, ...]:
        """input_ids, position_ids i64[B,1], slots i64[A,B], page_table i32[A,B,P], lens i32[A,B]."""
        ids = np.array([[sequence.tokens[-1]] for sequence in sequences])
        positions = np.array([sequence.cached for sequence in sequences])
        slots = physical(self._pages, slots_of(positions, self._sinks, self._windows)[..., None])[..., 0]
        lens = lens_of(positions + 1, self._sinks, self._windows).astype(np.int32)
        return ids, positions[:, None], slots, self._table, lens


def _tables(sequences: Sequence[TokenSequence]) -> np.ndarray:
    """i32[A,B,P], P the pages of the longest layer of all."""
    holdings = [sequence.holding for sequence in sequences if sequence.holding is not None]
    if len(holdings) < len(sequences):
        raise InternalError("a sequence is decoded that was not admitted")
    width = max(int(holding.counts.max()) for holding in holdings)
    tables = np.zeros((len(holdings[0].table), len(holdings), width), np.int32)
    for at, holding in enumerate(holdings):
        own = min(width, holding.table.shape[1])
        tables[:, at, :own] = holding.table[:, :own]
    return tables
