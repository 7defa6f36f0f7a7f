"""Which slots of its cache each attention layer gives to which tokens (DESIGN section 4, decode).

A full layer keeps every token: token p owns slot p. A ring of `sink` and `window` keeps what a streaming row can see:
token p < sink owns slot p, a later one slot sink + (p - sink) % window, the place of token p - window, which no later
row sees. A layer with a window of its own is a ring with sink 0.

Slots here are logical: 0..pages*PAGE-1 of one layer and request. `physical` maps them into the pool.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fluxc.engine.shapes import LayerShape
from fluxc.kernels.schemas import PAGE
from fluxc.plan import Plan


@dataclasses.dataclass(frozen=True)
class Geometry:
    """The layers of one request: sinks, windows i64[A] on the CPU. Window 0: the layer keeps every token."""

    sinks: Tensor
    windows: Tensor

    @classmethod
    def of(cls, layers: Sequence[LayerShape], plan: Plan, routes: Iterable[Any]) -> Geometry:
        """The geometry under `routes` bool[L] (True: full)."""
        flags = [bool(route) for route in routes]
        rings = [ring(shape, plan, flags) for shape in layers]
        sinks, windows = torch.tensor(rings, dtype=torch.int64).unbind(1)
        return cls(sinks, windows)

    def turn(self, start: int, count: int) -> Tensor:
        """Slots i64[A,count] of the tokens start..start+count-1, written together after `start` others.

        -1 for a token whose slot a later one of the same turn takes; every slot appears once at most.
        """
        positions = torch.arange(start, start + count)
        sinks, windows = self.sinks[:, None], self.windows[:, None]
        gone = (windows > 0) & (positions >= sinks) & (positions + windows < start + count)
        return slots_of(positions, sinks, windows).masked_fill(gone, -1)

    def lens(self, tokens: int) -> Tensor:
        """Slots in use i64[A] after `tokens` tokens."""
        return lens_of(torch.tensor(tokens), self.sinks, self.windows)

    def pages(self, tokens: int) -> Tensor:
        """Pages i64[A] that `tokens` tokens need."""
        return pages_of(self.lens(tokens))


def ring(shape: LayerShape, plan: Plan, routes: Sequence[bool] | Mapping[int, bool]) -> tuple[int, int]:
    """Sink and window of one layer, (0, 0) where it keeps every token."""
    if shape.row is None:
        return 0, shape.window
    layer = plan.layers[shape.row]
    return (0, 0) if routes[shape.row] or plan.decode == "full" else (layer.sink, layer.window)


def slots_of(positions: Tensor, sinks: Tensor, windows: Tensor) -> Tensor:
    """The slot of the token at each position; i64 tensors that broadcast."""
    beyond = sinks + (positions - sinks) % windows.clamp(min=1)
    return torch.where((windows > 0) & (positions >= sinks), beyond, positions)


def lens_of(tokens: Tensor, sinks: Tensor, windows: Tensor) -> Tensor:
    """Slots in use after `tokens` tokens; i64 tensors that broadcast."""
    return torch.where(windows > 0, torch.minimum(tokens, sinks + windows), tokens)


def pages_of(lens: Tensor) -> Tensor:
    """Pages that `lens` slots fill, the last one perhaps partly."""
    return (lens + PAGE - 1) // PAGE


def physical(page_table: Tensor, slots: Tensor) -> Tensor:
    """Slots i64[...,n] of layers with the pages page_table [...,P], as slots of the pool; -1 stays -1."""
    known = slots.clamp(min=0)
    page = page_table.to(torch.int64).gather(-1, known // PAGE)
    return torch.where(slots < 0, slots, page * PAGE + known % PAGE)
