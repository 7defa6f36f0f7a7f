"""A prefill program in the pieces that the engine calls: each layer before, at and after its attention."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class Piece:
    """`module(*enters)` returns the values `leaves`; both are names."""

    module: nn.Module
    enters: tuple[str, ...]
    leaves: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class LayerPieces:
    """One layer. `before` computes q, k, v and the route; `attend` is the attention alone; `after` the rest.

    `k`, `v` and `route` ("" without a router; bool[1]) name values that `attend` takes.
    """

    before: Piece
    attend: Piece
    after: Piece
    k: str
    v: str
    route: str


@dataclasses.dataclass(frozen=True)
class Phases:
    """The whole prefill: prologue, layers, epilogue; `inputs` and `outputs` are those of the program by name.

    A value lives from the piece that leaves it to the last one that takes it. Outputs are left by the epilogue.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    prologue: Piece
    layers: tuple[LayerPieces, ...]
    epilogue: Piece

    def pieces(self) -> Iterator[Piece]:
        """All pieces in the order they run."""
        yield self.prologue
        for layer in self.layers:
            yield from (layer.before, layer.attend, layer.after)
        yield self.epilogue

    def last_uses(self) -> dict[str, int]:
        """The number of the last piece that takes each value; -1 for one that none takes."""
        last: dict[str, int] = {}
        for number, piece in enumerate(self.pieces()):
            last |= dict.fromkeys(piece.enters, number) | {name: -1 for name in piece.leaves if name not in last}
        return last


class PrefillRun:
    """The values alive in one prefill; pieces are run in order, each once."""

    def __init__(self, phases: Phases, inputs: Mapping[str, Tensor]) -> None:
        self._values: dict[str, Tensor] = dict(inputs)
        self._last = phases.last_uses()
        self._number = 0

    def step(self, piece: Piece, keep: tuple[str, ...] = ()) -> dict[str, Tensor]:
        """Run the next piece; returns the values named in `keep`, of those it takes and leaves."""
        taken = {name: self._values[name] for name in piece.enters}
        for name in [name for name in self._values if self._last.get(name, -1) <= self._number]:
            del self._values[name]
        left = dict(zip(piece.leaves, piece.module.forward(*taken.values()), strict=True))
        self._values |= {name: value for name, value in left.items() if self._last[name] > self._number}
        self._number += 1
        return {name: left[name] if name in left else taken[name] for name in keep}
