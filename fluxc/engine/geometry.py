"""Which slots of its cache each attention layer gives to which tokens (DESIGN section 4, decode).

A full layer keeps every token: token p owns slot p. A ring of `sink` and `window` keeps what a streaming row can see:
token p < sink owns slot p, a later one slot sink + (p - sink) % window, the place of token p - window, which no later
row sees. A layer with a window of its own is a ring with sink 0.

Slots here are logical: 0..pages*PAGE-1 of one layer and request. `physical` maps them into the pool. These are numbers
of the host: numpy's, whatever the programs compute with (tensors of the CPU are taken as well).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fluxc.engine.shapes import LayerShape
from fluxc.kernels.schemas import PAGE
from fluxc.plan import Plan

Array = np.ndarray


@dataclasses.dataclass(frozen=True)
class Geometry:
    """The layers of one request: sinks, windows i64[A]. Window 0: the layer keeps every token."""

    sinks: Array
    windows: Array

    @classmethod
    def of(cls, layers: Sequence[LayerShape], plan: Plan, routes: Iterable[Any]) -> Geometry:
        """The geometry under `routes` bool[L] (True: full)."""
        flags = [bool(route) for route in routes]
        rings = [ring(shape, plan, flags) for shape in layers]
        sinks, windows = np.array(rings, np.int64).T
        return cls(sinks, windows)

    def turn(self, start: int, count: int) -> Array:
        """Slots i64[A,count] of the tokens start..start+count-1, written together after `start` others.

        -1 for a token whose slot a later one of the same turn takes; every slot appears once at most.
        """
        positions = np.arange(start, start + count)
        sinks, windows = self.sinks[:, None], self.windows[:, None]
        gone = (windows > 0) & (positions >= sinks) & (positions + windows < start + count)
        return np.where(gone, -1, slots_of(positions, sinks, windows))

    def lens(self, tokens: int) -> Array:
        """Slots in use i64[A] after `tokens` tokens."""
        return lens_of(tokens, self.sinks, self.windows)

    def pages(self, tokens: int) -> Array:
        """Pages i64[A] that `tokens` tokens need."""
        return pages_of(self.lens(tokens))


def ring(shape: LayerShape, plan: Plan, routes: Sequence[bool] | Mapping[int, bool]) -> tuple[int, int]:
    """Sink and window of one layer, (0, 0) where it keeps every token."""
    if shape.row is None:
        return 0, shape.window
    layer = plan.layers[shape.row]
    return (0, 0) if routes[shape.row] or plan.decode == "full" else (layer.sink, layer.window)


def slots_of(positions: ArrayLike, sinks: ArrayLike, windows: ArrayLike) -> Array:
    """The slot of the token at each position; i64 arrays that broadcast."""
    at, sink, window = (np.asarray(x) for x in (positions, sinks, windows))
    beyond = sink + (at - sink) % np.maximum(window, 1)
    return np.where((window > 0) & (at >= sink), beyond, at)


def lens_of(tokens: ArrayLike, sinks: ArrayLike, windows: ArrayLike) -> Array:
    """Slots in use after `tokens` tokens; i64 arrays that broadcast."""
    count, sink, window = (np.asarray(x) for x in (tokens, sinks, windows))
    return np.where(window > 0, np.minimum(count, sink + window), count)


def pages_of(lens: ArrayLike) -> Array:
    """Pages that `lens` slots fill, the last one perhaps partly."""
    return (np.asarray(lens) + PAGE - 1) // PAGE


def physical(page_table: ArrayLike, slots: ArrayLike) -> Array:
    """Slots i64[...,n] of layers with the pages page_table [...,P], as slots of the pool; -1 stays -1."""
    own = np.asarray(slots)
    known = np.maximum(own, 0)
    page = np.take_along_axis(np.asarray(page_table, np.int64), known // PAGE, axis=-1)
    return np.where(own < 0, own, page * PAGE + known % PAGE)
