"""Pass `chunk-rows`: computes what follows an attention some rows of the prompt at a time."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fluxc.ir.pass_base import Note
from fluxc.ir.phases import LayerPieces, Phases, Piece
from fluxc.ir.rowwise import ROWS, row_inputs

_MULTIPLE = 128  # rows of a chunk: what tiles of GEMMs divide


@dataclasses.dataclass(frozen=True)
class ChunkRows:
    """Run output projection, norm and MLP of each layer on at most `rows` rows at a time.

    1. The MLP's inner values are several times as wide as the hidden state: at 256K tokens they, and not the cache,
       decide what fits.
    2. A part that mixes rows (experts sort the tokens of all rows) stays whole, with the reason in the notes.
    3. Prompts of up to `rows` tokens run as before, bit for bit. A GEMM over fewer rows may round differently.

        after: %out, %hidden -> %hidden'     =>     the same for rows 0..8191, 8192..16383, ...
    """

    rows: int = 8192  # of a chunk; 8K rows of an 8B model's MLP are about 1 GB

    name: ClassVar[str] = "chunk-rows"
    runs_after: ClassVar[tuple[str, ...]] = ("split-phases",)

    def apply(self, phases: Phases, notes: list[Note] | None = None) -> Phases:
        """The same phases over chunks; a note says of each layer what was done."""
        said = notes if notes is not None else []
        layers = [self._chunked(layer, said) for layer in phases.layers]
        return dataclasses.replace(phases, layers=tuple(layers))

    def _chunked(self, layer: LayerPieces, notes: list[Note]) -> LayerPieces:
        module: Any = layer.after.module
        found = row_inputs(module)
        if isinstance(found, str):
            notes.append(Note(layer.k, False, f"what follows the attention stays whole: {found}"))  # case 2
            return layer
        notes.append(Note(layer.k, True, f"what follows the attention runs on {self.rows} rows at a time"))
        after = Piece(Chunked(module, found, self.rows), layer.after.enters, layer.after.leaves)
        return dataclasses.replace(layer, after=after)


class Chunked(nn.Module):
    """`part` over chunks of at most `limit` rows; `has_rows` says which of its inputs are [1,S,...]."""

    def __init__(self, part: GraphModule, has_rows: list[bool], limit: int) -> None:
        super().__init__()
        self.part, self.has_rows, self.limit = part, has_rows, limit

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The values that `part` leaves, for all rows."""
        rows = next(x.shape[ROWS] for x, cut in zip(inputs, self.has_rows, strict=True) if cut)
        if rows <= self.limit:
            return self.part.forward(*inputs)
        size = _size(rows, self.limit)
        whole: tuple[Tensor, ...] = ()
        for start in range(0, rows, size):
            left = self.part.forward(*self._cut(inputs, start, min(size, rows - start)))
            whole = whole or tuple(x.new_empty(x.shape[0], rows, *x.shape[2:]) for x in left)
            for target, x in zip(whole, left, strict=True):
                target.narrow(ROWS, start, x.shape[ROWS]).copy_(x)
        return whole

    def _cut(self, inputs: tuple[Tensor, ...], start: int, size: int) -> list[Tensor]:
        pairs = zip(inputs, self.has_rows, strict=True)
        return [torch.narrow(x, ROWS, start, size) if cut else x for x, cut in pairs]


def _size(rows: int, limit: int) -> int:
    """Rows of a chunk, so that the last one is about as long as the others."""
    even = -(-rows // -(-rows // limit))
    return min(limit, -(-even // _MULTIPLE) * _MULTIPLE)
