"""Whether a part of a program treats the rows of a text one by one, so that it may run on some rows at a time."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from fluxc.ir.nodes import is_call
from fluxc.ir.parts import is_size

aten = torch.ops.aten
ROWS = 1  # the axis of the rows, in all tensors that have any: [1,S,...]

# Element by element; tensors of other ranks than the rows' own line up with the axes behind them.
_POINTWISE = frozenset(
    (
        *("add", "sub", "mul", "div", "neg", "pow", "rsqrt", "sqrt", "reciprocal", "exp", "square", "abs", "where"),
        *("silu", "swiglu", "gelu", "relu", "sigmoid", "tanh", "clamp", "clamp_min", "clamp_max", "maximum", "minimum"),
        *("to", "_to_copy", "type_as", "clone", "contiguous"),
    )
)
_NORMS = frozenset(("rms_norm", "layer_norm"))
_RESHAPES = frozenset(("view", "reshape", "flatten"))
_ALONG_AXES = frozenset(
    (
        *("mean", "sum", "amax", "softmax", "log_softmax"),
        *("chunk", "split", "split_with_sizes", "slice", "cat", "select", "narrow", "unsqueeze"),
    )
)


def row_inputs(module: GraphModule) -> list[bool] | str:
    """Which of the inputs hold rows, or why the part cannot be computed some rows at a time."""
    inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
    symbols = {str(node.meta["val"].shape[ROWS]) for node in inputs if _is_symbolic(node)}
    if len(symbols) != 1:
        return f"its inputs have rows {', '.join(sorted(symbols)) or 'of no free number'}"
    judge = _Judge(symbols.pop())
    for node in module.graph.nodes:
        reason = judge.refusal(node)
        if reason:
            return reason
    return [judge.has_rows(node) for node in inputs]


def _is_symbolic(node: Node) -> bool:
    shape = getattr(node.meta.get("val"), "shape", ())
    return len(shape) > ROWS and isinstance(shape[ROWS], torch.SymInt)


class _Judge:
    """Goes over the nodes of a part. `rows` is the text of the symbol that counts them."""

    def __init__(self, rows: str) -> None:
        self._rows = rows

    def has_rows(self, node: Node) -> bool:
        return any(self._rows in str(size) for size in self._shapes(node))

    def refusal(self, node: Node) -> str | None:
        if node.op == "output":
            apart = [leaf for leaf in pytree.tree_leaves(node.args) if not self.has_rows(leaf)]
            return f"node {apart[0].name} is left and has no rows" if apart else None
        if is_size(node):
            is_count = is_call(node, aten.sym_size) and node.args[1] == ROWS
            return None if is_count else f"node {node.name} computes with sizes"
        if not self.has_rows(node) and not any(self.has_rows(i) for i in node.all_input_nodes):
            return None
        if not all(self._in_place(shape) for shape in self._all_shapes(node)):
            return f"node {node.name} has its rows on another axis"
        return None if node.op == "placeholder" or self._is_rowwise(node) else f"node {node.name} mixes rows"

    def _is_rowwise(self, node: Node) -> bool:
        name = getattr(node.target, "_opname", "")
        tensors = [item for item in node.all_input_nodes if not is_size(item)]
        rows = [item for item in tensors if self.has_rows(item)]
        if node.target is operator.getitem or name == "linear":
            return rows == tensors[:1]
        rank = len(self._all_shapes(node)[0])
        if name in _POINTWISE:
            return all(len(item.meta["val"].shape) == rank for item in rows)
        if name == "add_rms_norm":  # along the last axis
            return rank - ROWS > 1 and rows == tensors[:2]
        if name in _NORMS:
            return len(node.args[1]) < rank - ROWS  # type: ignore[arg-type]
        if name in _ALONG_AXES:
            return _axes(node, len(rows[0].meta["val"].shape)).isdisjoint({0, ROWS})
        return name in _RESHAPES  # [1,S,...] before and after: the rows stay whole

    def _in_place(self, shape: Any) -> bool:
        places = [axis for axis, size in enumerate(shape) if self._rows in str(size)]
        return places == [ROWS] and str(shape[ROWS]) == self._rows and str(shape[0]) == "1"

    def _all_shapes(self, node: Node) -> list[Any]:
        return [v.shape for v in pytree.tree_leaves(node.meta.get("val")) if isinstance(v, torch.Tensor)]

    def _shapes(self, node: Node) -> list[Any]:
        return [size for shape in self._all_shapes(node) for size in shape]


def _axes(node: Node, rank: int) -> set[int]:
    """The axes a call works along, from 0; all of them where it names none."""
    schema: Any = node.target._schema  # type: ignore[union-attr]
    for index, argument in enumerate(schema.arguments):
        if argument.name == "dim":
            default = argument.default_value if argument.has_default_value() else None
            given = node.kwargs.get("dim", node.args[index] if index < len(node.args) else default)
            dims = given if isinstance(given, (list, tuple)) else [given]
            return {dim % rank for dim in dims if isinstance(dim, int)} or set(range(rank))
    return set(range(rank))
