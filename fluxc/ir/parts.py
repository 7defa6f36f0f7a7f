"""Copying some nodes of a program into a graph of their own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.export.exported_program import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Graph, GraphModule, Node

from fluxc.ir.graph import is_call


def is_size(node: Node) -> bool:
    """Whether the node computes an integer (a size, or arithmetic on sizes) rather than a tensor."""
    return node.op == "call_function" and isinstance(node.meta.get("val"), (int, torch.SymInt))


def attributes(program: ExportedProgram) -> dict[Node, tuple[str, Any]]:
    """(name, value) of all nodes that stand for weights and constants, and of the branches of conds."""
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    pairs = zip(placeholders, program.graph_signature.input_specs, strict=True)
    names = {node: str(spec.target) for node, spec in pairs if spec.kind != InputKind.USER_INPUT}
    state = {**program.constants, **program.state_dict}
    branches = {node: str(node.target) for node in program.graph.nodes if node.op == "get_attr"}
    held = {node: (name, getattr(program.graph_module, name)) for node, name in branches.items()}
    return held | {node: (name, state[name]) for node, name in names.items()}


def needed(nodes: Sequence[Node]) -> list[Node]:
    """What `nodes` use and do not compute, sizes replaced by tensors that have them; in order of first use.

    A size costs nothing where a tensor of that size is at hand; else the tensor it was taken from is needed.
    """
    own = set(nodes)
    tensors = [i for n in nodes if not is_size(n) for i in n.all_input_nodes if not is_size(i)]
    known = {str(dim) for node in tensors for dim in getattr(node.meta.get("val"), "shape", ())}
    sizes = [i for n in nodes if not is_size(n) for i in n.all_input_nodes if is_size(i)]
    for size in sizes:
        if str(size.meta["val"]) not in known:
            tensors.extend(_measured(size))
    return [node for node in dict.fromkeys(tensors) if node not in own]


def build_part(
    nodes: Iterable[Node], entering: Sequence[Node], leaving: Sequence[Node], held: dict[Node, tuple[str, Any]]
) -> GraphModule:
    """A module that computes `leaving` (a tuple) from `entering`; `held` are its attributes (name, value) by node."""
    graph, copies = Graph(), {}
    for node in entering:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta.update(node.meta)
    for node, (name, _) in held.items():
        copies[node] = graph.get_attr(name)
        copies[node].meta.update(node.meta)
    copier = _Copier(graph, copies)
    for node in nodes:
        if not is_size(node):
            copier.copy(node)
    graph.output(tuple(copier.copy(node) for node in leaving))
    return GraphModule(dict(held.values()), graph)


def build_whole(program: ExportedProgram) -> GraphModule:
    """A module that computes the program's outputs (a tuple) from its inputs, over the program's own weights."""
    held = attributes(program)
    nodes = [node for node in program.graph.nodes if node.op == "call_function"]
    inputs = [node for node in program.graph.nodes if node.op == "placeholder" and node not in held]
    outputs: Any = program.graph.output_node().args[0]
    return build_part(nodes, inputs, outputs, held)


class _Copier:
    """Copies nodes into a graph; each size is read once, from a tensor that is there."""

    def __init__(self, graph: Graph, copies: dict[Node, Node]) -> None:
        self._graph, self._copies = graph, copies
        self._sizes: dict[str, Node] = {}

    def copy(self, node: Node) -> Node:
        if is_size(node) and node not in self._copies:
            return self._size(node)
        if node not in self._copies:
            self._copies[node] = self._graph.node_copy(node, self.copy)
        return self._copies[node]

    def _size(self, node: Node) -> Node:
        value = str(node.meta["val"])
        if value not in self._sizes:
            found = self._measure(value)
            self._sizes[value] = self._graph.node_copy(node, self.copy) if found is None else self._read(node, *found)
        return self._sizes[value]

    def _measure(self, value: str) -> tuple[Node, int] | None:
        """A tensor that is there and has the size, and the axis."""
        for original, copy in self._copies.items():
            shape = [str(dim) for dim in getattr(original.meta.get("val"), "shape", ())]
            if value in shape:
                return copy, shape.index(value)
        return None

    def _read(self, node: Node, tensor: Node, axis: int) -> Node:
        copy = self._graph.call_function(torch.ops.aten.sym_size.int, (tensor, axis))
        copy.meta["val"] = node.meta["val"]
        return copy


def _measured(size: Node) -> list[Node]:
    """The tensors that a size was computed from."""
    if is_call(size, torch.ops.aten.sym_size):
        return [size.all_input_nodes[0]]
    return [tensor for item in size.all_input_nodes for tensor in (_measured(item) if is_size(item) else [item])]
