"""One ONNX model from the models of a program's pieces: layers that are alike are translated once, and copied."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor
from torch.export.exported_program import ExportedProgram
from torch.fx import Node

from fluxc.exporters.aoti_pieces import Cut
from fluxc.exporters.aoti_recipe import Call, row_of
from fluxc.exporters.piece_programs import export_piece, weights_as_inputs
from fluxc.ir.nodes import user_inputs
from fluxc.ir.parts import attributes

Translate = Callable[[ExportedProgram, Sequence[str]], ir.Model]


def translate_pieces(program: ExportedProgram, made: Cut, translate: Translate) -> ir.Model:
    """The model of `program`, cut into `made`; its weights are views of the program's.

    `translate` makes the model of one piece, given the names of its results. Weights enter the pieces as inputs:
    nothing of one layer's can then be folded into what all layers share.
    """
    models = {}
    for call in made.recipe.calls:
        if call.piece not in models:
            names = [f"leaving_{number}" for number in range(len(call.leaves))]  # torch's own might stand inside
            models[call.piece] = translate(export_piece(weights_as_inputs(made.modules[call.piece])), names)
    return _Joiner(program, made, models).join()


class _Joiner:
    """Copies the graph of a piece for each of its calls into one graph."""

    def __init__(self, program: ExportedProgram, made: Cut, models: Mapping[str, ir.Model]) -> None:
        self._recipe, self._models = made.recipe, models
        self._weights = {name: value for name, value in attributes(program).values() if isinstance(value, Tensor)}
        nodes = {node.name: node for node in program.graph.nodes}
        inputs = [_typed(name, nodes[name]) for name in user_inputs(program)]
        self._values: dict[str, ir.Value] = {str(value.name): value for value in inputs}
        self._nodes = nodes
        self._graph = ir.Graph(inputs, [], nodes=[], opset_imports=self._opsets(), name="main_graph")
        self._constants: dict[tuple[str, str], ir.Value] = {}

    def join(self) -> ir.Model:
        """The whole model."""
        last = len(self._recipe.calls) - 1
        for number, call in enumerate(self._recipe.calls):
            self._call(call, {0: "prologue", last: "epilogue"}.get(number, f"layer_{number - 1}"))
        for name, value in self._recipe.outputs.items():
            self._hand_out(name, value)
        first = next(iter(self._models.values()))
        functions = {
            function.identifier(): function for m in self._models.values() for function in m.functions.values()
        }
        return ir.Model(self._graph, ir_version=first.ir_version, functions=list(functions.values()))

    def _call(self, call: Call, prefix: str) -> None:
        """Append a copy of the piece, whose inputs are the values and weights of this call."""
        copy = self._models[call.piece].graph.clone()
        given = [*map(self._entering, call.enters), *map(self._weight, call.weights.values())]
        known = dict(zip(copy.inputs, given, strict=True))
        known |= {value: self._constant(call.piece, value) for value in copy.initializers.values()}
        results = [known.get(value, value) for value in copy.outputs]
        copy.outputs.clear()
        for value, replacement in known.items():
            ir.convenience.replace_all_uses_with(value, replacement)
        nodes = list(copy)
        copy.remove(nodes)
        _prefix(nodes, prefix)
        self._graph.extend(nodes)
        self._values |= dict(zip(call.leaves, results, strict=True))

    def _entering(self, name: str) -> ir.Value:
        """A value that is there; a row of one is gathered once."""
        if name not in self._values:
            whole, row = row_of(name)
            index = ir.node("Constant", [], {"value_int": row}, name=f"{whole}_row_{row}")
            taken = ir.node("Gather", [self._values[whole], index.outputs[0]], {"axis": 0}, name=f"{whole}_{row}")
            for node in (index, taken):
                node.outputs[0].name = f"{node.name}_value"
            self._graph.extend([index, taken])
            self._values[name] = taken.outputs[0]
        return self._values[name]

    def _weight(self, name: str) -> ir.Value:
        """The initializer of a weight, one for all that read it."""
        if name not in self._values:
            tensor = ir.tensor_adapters.TorchTensor(self._weights[name].detach(), name=name)
            self._values[name] = self._initializer(name, tensor)
        return self._values[name]

    def _constant(self, piece: str, value: ir.Value) -> ir.Value:
        """A tensor that the translation made, one for all calls of the piece."""
        key = (piece, str(value.name))
        if key not in self._constants:
            tensor: Any = value.const_value
            self._constants[key] = self._initializer("_".join(key), tensor)
        return self._constants[key]

    def _initializer(self, name: str, tensor: Any) -> ir.Value:
        made = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        self._graph.initializers[name] = made
        return made

    def _hand_out(self, name: str, value: str) -> None:
        """Make a value the output `name`; one that has a name to keep is handed out by a copy."""
        found = self._values[value]
        if found.producer() is None or found in self._graph.outputs:
            node = ir.node("Identity", [found], name=f"{name}_copy")
            self._graph.append(node)
            found = node.outputs[0]
        like = _typed(name, self._nodes[value])
        found.name, found.shape, found.type = like.name, like.shape, like.type
        self._graph.outputs.append(found)

    def _opsets(self) -> dict[str, int]:
        return {name: version for model in self._models.values() for name, version in model.opset_imports.items()}


def _typed(name: str, node: Node) -> ir.Value:
    """A value of the dtype and shape of a node, free sizes by torch's symbols."""
    val = node.meta["val"]
    shape = ir.Shape([str(size) if isinstance(size, torch.SymInt) else int(size) for size in val.shape])
    return ir.Value(name=name, shape=shape, type=ir.TensorType(ir.tensor_adapters.from_torch_dtype(val.dtype)))


def _prefix(nodes: Sequence[ir.Node], prefix: str) -> None:
    """Names of their own for the nodes of one call, what is inside them, and their values."""
    for node in _all(nodes):
        node.name = f"{prefix}_{node.name}"
        for value in node.outputs:
            value.name = f"{prefix}_{value.name}"


def _all(nodes: Sequence[ir.Node]) -> Iterator[ir.Node]:
    for node in nodes:
        yield node
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                yield from _all(list(attribute.as_graph()))
