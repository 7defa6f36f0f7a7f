"""The pages of the cache: who holds which, how many are promised, and that none is lost.

A page is PAGE slots of one layer of one request. A `Holding` is what one request holds: a row of pages for each
attention layer, that grows as its tokens come, and a promise of pages it may still take (admission).
"""

from __future__ import annotations

import numpy as np

from fluxc.engine.geometry import pages_of
from fluxc.errors import InternalError


class Holding:
    """The pages of one request. `table` i32[A,P] names them layer by layer, the first counts[a] of row a are its own.

    `reserved`: pages promised to it, held ones included; what it holds beyond that is counted as well. `version`
    changes whenever the pages do.
    """

    def __init__(self, layers: int, reserved: int = 0) -> None:
        self.table = np.zeros((layers, 1), np.int32)
        self.counts = np.zeros(layers, np.int64)
        self.reserved = reserved
        self.version = 0

    @property
    def pages(self) -> int:
        """Pages it holds now."""
        return int(self.counts.sum())

    @property
    def claim(self) -> int:
        """Pages that nobody else may count on."""
        return max(self.pages, self.reserved)

    def numbers(self) -> list[int]:
        """The pages themselves."""
        return [page for row, count in zip(self.table, self.counts, strict=True) for page in row[:count].tolist()]


class PagePool:
    """`total` pages. Every page is free or in exactly one open holding."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._free = list(range(total - 1, -1, -1))
        self._open: dict[int, Holding] = {}

    @property
    def free(self) -> int:
        """Pages in no holding."""
        return len(self._free)

    @property
    def used(self) -> int:
        """Pages in holdings."""
        return self.total - self.free

    @property
    def unclaimed(self) -> int:
        """Pages neither held nor promised; below 0 where more was promised than there is."""
        return self.total - sum(holding.claim for holding in self._open.values())

    def open(self, layers: int, reserved: int = 0) -> Holding:
        """A new holding without pages, to which `reserved` pages are promised."""
        holding = Holding(layers, reserved)
        self._open[id(holding)] = holding
        return holding

    def grow(self, holding: Holding, lens: np.ndarray) -> bool:
        """Give every layer pages for lens i64[A] slots; False, and nothing changed, where too few are free."""
        self._check(holding)
        wanted = pages_of(lens)
        missing = np.maximum(wanted - holding.counts, 0)
        total = int(missing.sum())
        if total > self.free:
            return False
        if total:
            self._hand_out(holding, missing)
        return True

    def _hand_out(self, holding: Holding, missing: np.ndarray) -> None:
        counts = holding.counts + missing
        _widen(holding, int(counts.max()))
        for layer in np.flatnonzero(missing).tolist():
            old, new = int(holding.counts[layer]), int(counts[layer])
            pages = [self._free.pop() for _ in range(new - old)]
            holding.table[layer, old:new] = pages
        holding.counts = counts
        holding.version += 1

    def clear(self, holding: Holding) -> list[int]:
        """Take back all pages of a holding that stays open; returns them."""
        self._check(holding)
        pages = holding.numbers()
        self._free.extend(reversed(pages))
        if len(self._free) > self.total:
            raise InternalError(f"{len(self._free)} pages are free in a pool of {self.total}")
        holding.counts = np.zeros_like(holding.counts)
        holding.version += 1
        return pages

    def close(self, holding: Holding) -> list[int]:
        """Take back all pages of a holding and forget it; returns the pages."""
        pages = self.clear(holding)
        del self._open[id(holding)]
        return pages

    def _check(self, holding: Holding) -> None:
        if self._open.get(id(holding)) is not holding:
            raise InternalError("a holding was used after its pages were given back")


def _widen(holding: Holding, width: int) -> None:
    """Room for `width` pages a row; doubled, so that growing page by page copies little."""
    have = holding.table.shape[1]
    if width > have:
        wider = np.zeros((len(holding.table), max(width, 2 * have)), np.int32)
        wider[:, :have] = holding.table
        holding.table = wider
