"""Pass `last-rows`: what follows the last attention is computed for the rows whose logits are asked for."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from fluxc.ir.graph import is_call, walk_back
from fluxc.ir.pass_base import Note
from fluxc.ir.phases import LayerPieces, Phases, Piece
from fluxc.ir.rowwise import ROWS, row_inputs
from fluxc.passes.chunk_rows import Chunked

aten = torch.ops.aten
AT = "logits_at"
TAKEN = "logits_rows"
"""The rows of what the last layer leaves that the LM head reads, i64[1,N]."""


@dataclasses.dataclass(frozen=True)
class LastRows:
    """Take the rows `logits_at` before the last layer's output projection and MLP, not before the LM head.

    1. Of a prompt one row reaches the LM head: the rest of what follows the last attention is never read.
    2. Where that part, or what stands before the head, mixes rows, nothing is changed, and a note says why.
    3. Prompts of up to `rows` tokens run as before, bit for bit. A GEMM over fewer rows may round differently.

        after:    %out, %hidden -> %hidden'               after:    %out[at], %hidden[at] -> %hidden', 0..N-1
        epilogue: %hidden', %logits_at -> %logits   =>    epilogue: %hidden', 0..N-1 -> %logits
    """

    rows: int = 1024  # prompts up to this long stay whole

    name: ClassVar[str] = "last-rows"
    runs_after: ClassVar[tuple[str, ...]] = ("split-phases", "chunk-rows")

    def apply(self, phases: Phases, notes: list[Note] | None = None) -> Phases:
        """The same phases; one note says what was done."""
        said = notes if notes is not None else []
        *others, last = phases.layers
        reason = _refusal(last, phases.epilogue)
        said.append(Note(last.k, reason is None, reason or f"prompts of more than {self.rows} rows: those asked for"))
        if reason:
            return phases  # case 2
        module: Any = last.after.module
        after = Piece(SomeRows(module, self.rows), (*last.after.enters, AT), (*last.after.leaves, TAKEN))
        enters = tuple(TAKEN if name == AT else name for name in phases.epilogue.enters)
        return dataclasses.replace(
            phases,
            layers=(*others, dataclasses.replace(last, after=after)),
            epilogue=dataclasses.replace(phases.epilogue, enters=enters),
        )


class SomeRows(nn.Module):
    """`part` of the rows that its last input names, i64[1,N], where there are more than `limit`; those of N rows."""

    def __init__(self, part: Chunked, limit: int) -> None:
        super().__init__()
        self.part, self.limit = part, limit

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The values that `part` leaves, and where the rows `at` are in them."""
        *values, at = inputs
        pairs = list(zip(values, self.part.has_rows, strict=True))
        if next(x.shape[ROWS] for x, cut in pairs if cut) <= self.limit:
            return (*self.part.forward(*values), at)
        taken = [x.index_select(ROWS, at[0]) if cut else x for x, cut in pairs]
        return (*self.part.forward(*taken), torch.arange(at.shape[1], device=at.device)[None])


def _refusal(last: LayerPieces, epilogue: Piece) -> str | None:
    """Why the rows cannot be taken earlier, or None."""
    if not isinstance(last.after.module, Chunked):
        return "what follows the last attention mixes rows"
    module: Any = epilogue.module
    nodes = {node.name: node for node in module.graph.nodes if node.op == "placeholder"}
    gathers = [node for node in module.graph.nodes if is_call(node, aten.gather)]
    if AT not in nodes or len(gathers) != 1 or gathers[0].args[1] != ROWS:
        return "the rows of the LM head are not gathered once"
    index: Node = gathers[0].args[2]
    if nodes[AT] not in (index, *walk_back(index, lambda _: False)):
        return "the gathered rows are not those asked for"
    return _before_head(module, gathers[0], set(last.after.leaves))


def _before_head(module: GraphModule, gather: Node, left: set[str]) -> str | None:
    """Why what leads to the rows of the head, and nothing else, cannot take fewer rows; `left`: by the last layer."""
    source: Node = gather.args[0]  # type: ignore[assignment]
    path = {source, *walk_back(source, lambda _: False)}
    readers = {user for node in path for user in node.users if _has_rows(node)} - path - {gather}
    others = [node.name for node in readers if not is_call(node, aten.sym_size)]
    if others:
        return f"node {others[0]} reads all rows too"
    graph = Graph()
    copies: dict[Node, Any] = {}
    for node in module.graph.nodes:
        if node in path:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output((copies[source],))
    found = row_inputs(GraphModule(module, graph))
    if isinstance(found, str):
        return f"what stands before the LM head stays whole: {found}"
    names = [node.name for node in graph.nodes if node.op == "placeholder"]
    strange = [name for name, has in zip(names, found, strict=True) if has and name not in left]
    return f"{strange[0]} is not left by the last layer" if strange else None


def _has_rows(node: Node) -> bool:
    shape = getattr(node.meta.get("val"), "shape", ())
    return len(shape) > ROWS and isinstance(shape[ROWS], torch.SymInt)
