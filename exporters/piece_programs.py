"""A piece of a program as a program of its own, for compilers that take a piece at a time."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import Tensor
from torch.export import Dim
from torch.export.exported_program import ExportedProgram
from torch.fx import GraphModule, Node

from fluxc.errors import InternalError

_FIRST_EXAMPLE = 3  # example of a free size: above 1, which torch would take for a constant


def export_piece(module: GraphModule, *, with_stand_ins: bool = False) -> ExportedProgram:
    """A piece as a program of its own, each free size at least 1.

    `with_stand_ins`: weights become random numbers, so that nothing of one layer's can be folded into the code that
    other layers run.
    """
    if with_stand_ins:
        module = GraphModule(_stand_ins(module), module.graph)
    sizes = _Sizes()
    vals = [node.meta["val"] for node in module.graph.nodes if node.op == "placeholder"]
    shapes = tuple(sizes.dims(val) for val in vals)
    with torch.no_grad():
        return torch.export.export(module, tuple(map(sizes.example, vals)), dynamic_shapes=shapes)


def weights_as_inputs(module: GraphModule) -> GraphModule:
    """The module with its tensors as inputs after the others, in their order: nothing can be folded into its graph."""
    graph = torch.fx.Graph()
    copies: dict[Node, Node] = {}
    held = [node for node in module.graph.nodes if _is_held(node) and isinstance(_value(module, node), Tensor)]
    for node in [*(node for node in module.graph.nodes if node.op == "placeholder"), *held]:
        copies[node] = graph.placeholder(str(node.target))
        copies[node].meta.update(node.meta)
    for node in module.graph.nodes:
        if node not in copies:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    return GraphModule(module, graph)


class _Sizes:
    """Numbers and torch's `Dim` for the symbols of some fake values."""

    def __init__(self) -> None:
        self._examples: dict[sympy.Symbol, int] = {}
        self._dims: dict[sympy.Symbol, Any] = {}

    def dims(self, val: Tensor) -> dict[int, Any]:
        """What `torch.export` wants to know of the free axes of an input."""
        sizes: list[Any] = list(val.shape)
        free = {axis: size.node.expr for axis, size in enumerate(sizes) if isinstance(size, torch.SymInt)}
        return {axis: self._dim(expr) for axis, expr in free.items()}

    def example(self, val: Tensor) -> Tensor:
        """A tensor of the same dtype, device and layout."""
        shape, stride = ([self._number(size) for size in sizes] for sizes in (val.shape, val.stride()))
        return torch.empty_strided(shape, stride, dtype=val.dtype, device=val.device)

    def _number(self, size: Any) -> int:
        if not isinstance(size, torch.SymInt):
            return int(size)
        expr = size.node.expr
        return int(expr.subs({symbol: self._example_of(symbol) for symbol in expr.free_symbols}))

    def _example_of(self, symbol: sympy.Symbol) -> int:
        return self._examples.setdefault(symbol, _FIRST_EXAMPLE + len(self._examples))

    def _dim(self, expr: sympy.Expr) -> Any:
        if not expr.is_symbol:
            raise InternalError(f"a layer takes a value of the size {expr}, which is no free size")
        self._example_of(expr)
        return self._dims.setdefault(expr, Dim(f"size_{len(self._dims)}", min=1))


def _stand_ins(module: GraphModule) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def stand_in(value: Tensor) -> Any:
        if not value.is_floating_point():
            return value
        noise = torch.rand(value.shape, generator=generator, dtype=torch.float32).to(value.dtype).to(value.device)
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device).copy_(noise)

    held = {str(node.target): _value(module, node) for node in module.graph.nodes if _is_held(node)}
    return {name: stand_in(value) if isinstance(value, Tensor) else value for name, value in held.items()}


def _is_held(node: Node) -> bool:
    return node.op == "get_attr"


def _value(module: GraphModule, node: Node) -> Any:
    return getattr(module, str(node.target))
