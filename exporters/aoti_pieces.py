"""Cuts a program at its decoder layers, and finds the layers that are alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.export.exported_program import ExportedProgram
from torch.fx import GraphModule, Node

from fluxc.exporters.aoti_recipe import Call, Recipe
from fluxc.ir.graph import is_call, user_inputs
from fluxc.ir.layers import layer_stages
from fluxc.ir.parts import attributes, build_part, needed

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class Cut:
    """A recipe, and the module of each of its pieces. `shared`: pieces that several layers are called with."""

    recipe: Recipe
    modules: Mapping[str, GraphModule]
    shared: frozenset[str]


def cut(program: ExportedProgram, outputs: Sequence[str], attentions: Sequence[Node] = ()) -> Cut:
    """Cut `program` before its first layer and after each; `outputs` names what it returns.

    `attentions`: one node of each layer, in order, where the program has no attention op.

    1. Rows of inputs (`route_bias[l]`, `slots[a]`) are taken by the caller: with them inside, no two layers are alike.
    2. Outputs that a layer computes (keys, values) leave that layer; the epilogue does not hand them through.
    3. Two layers are alike when their graphs are, node by node, apart from the layer's number in attention ops.
    4. What is made of inputs alone and read by several layers is made in the prologue, for the same reason.

    Raises InternalError where layers cannot be told apart.
    """
    return _Cutter(program, attentions or _cached(program)).cut(outputs)


class _Cutter:
    def __init__(self, program: ExportedProgram, attentions: Sequence[Node]) -> None:
        self._program = program
        self._held = attributes(program)
        self._outputs: list[Node] = list(program.graph.output_node().args[0])
        stages = _early(layer_stages(program.graph, attentions or None))
        self._rows = {node for node in stages if _is_row(node, stages)}  # case 1
        self.last = max(stages.values())
        self._nodes: list[list[Node]] = [[] for _ in range(self.last + 1)]
        for node, stage in stages.items():
            if node not in self._rows:
                self._nodes[stage].append(node)
        self._needed = [needed(nodes) for nodes in self._nodes]

    def cut(self, outputs: Sequence[str]) -> Cut:
        calls: list[Call] = []
        modules: dict[str, GraphModule] = {}
        alike: dict[str, tuple[str, tuple[str, ...]]] = {}
        for stage in range(self.last + 1):
            module, held = self._module(stage)
            text = fingerprint(module)
            if text not in alike:
                alike[text] = self._name(stage, len(modules)), tuple(held)
                modules[alike[text][0]] = module
            piece, names = alike[text]
            weights = dict(zip(names, held.values(), strict=True))
            enters = tuple(self._value(node) for node in self._entering(stage))
            calls.append(Call(piece, enters, tuple(node.name for node in self._leaving(stage)), weights))
        results = {name: node.name for name, node in zip(outputs, self._outputs, strict=True)}
        pieces = [call.piece for call in calls]
        shared = frozenset(piece for piece in pieces if pieces.count(piece) > 1)
        return Cut(Recipe(user_inputs(self._program), results, tuple(calls)), modules, shared)

    def _name(self, stage: int, index: int) -> str:
        """Numbers have two digits at least: torch's loader takes every file that begins with a model's name."""
        return {0: "prologue", self.last: "epilogue"}.get(stage, f"layer_{index - 1:04d}")

    def _module(self, stage: int) -> tuple[GraphModule, dict[str, str]]:
        """The module of a stage, and the names of its tensors: within it, and in the program."""
        held: dict[Node, tuple[str, Any]] = {}
        names: dict[str, str] = {}
        for node in self._needed[stage]:
            if node in self._held:
                name, value = self._held[node]
                held[node] = (f"w{len(held)}", value)
                names |= {held[node][0]: name} if isinstance(value, Tensor) else {}
        module = build_part(self._nodes[stage], self._entering(stage), self._leaving(stage), held)
        return module, names

    def _entering(self, stage: int) -> list[Node]:
        return [node for node in self._needed[stage] if node not in self._held]

    def _leaving(self, stage: int) -> list[Node]:
        later = {source for nodes in self._needed[stage + 1 :] for node in nodes for source in self._sources(node)}
        return [node for node in self._nodes[stage] if node in later or node in self._outputs]

    def _sources(self, node: Node) -> list[Node]:
        """The node, and for a row what it is a row of."""
        return [node, *node.all_input_nodes] if node in self._rows else [node]

    def _value(self, node: Node) -> str:
        return f"{node.all_input_nodes[0].name}[{node.args[2]}]" if node in self._rows else node.name


def _cached(program: ExportedProgram) -> list[Node]:
    """The attentions of a decode or append program."""
    ops = (torch.ops.fluxc.decode_attention, torch.ops.fluxc.append_attention)
    return [node for node in program.graph.nodes if any(is_call(node, op) for op in ops)]


def _early(stages: dict[Node, int]) -> dict[Node, int]:
    """Case 4: what is made of inputs alone and read by several stages belongs to the prologue."""
    for node in stages:
        is_made_of_inputs = all(i.op == "placeholder" or stages.get(i) == 0 for i in node.all_input_nodes)
        if is_made_of_inputs and len({stages[user] for user in node.users if user in stages}) > 1:
            stages[node] = 0
    return stages


def _is_row(node: Node, stages: Mapping[Node, int]) -> bool:
    """Case 1: row of an input, or of a value of another stage."""
    if not is_call(node, aten.select.int) or node.args[1] != 0 or not isinstance(node.args[2], int):
        return False
    return stages.get(node.all_input_nodes[0]) != stages[node]


def fingerprint(module: GraphModule) -> str:
    """A text that is the same for modules that compute the same from their inputs and tensors, in that order.

    Free sizes count by their first appearance: each layer's cache may have a length of its own.
    """
    numbers: dict[Node, int] = {}
    sizes: dict[str, str] = {}
    lines = []
    for node in module.graph.nodes:
        lines.append(f"{_what(module, node, sizes)} {_plain(node.args, numbers)} {_plain(_options(node), numbers)}")
        numbers[node] = len(numbers)
    return "\n".join(lines)


def _what(module: GraphModule, node: Node, sizes: dict[str, str]) -> str:
    if node.op == "placeholder":
        return f"input {_layout(node.meta.get('val'), sizes)}"
    if node.op == "get_attr":
        value: Any = module
        for part in str(node.target).split("."):
            value = getattr(value, part)
        return f"[{fingerprint(value)}]" if isinstance(value, GraphModule) else f"tensor {_layout(value, sizes)}"
    return f"{node.op} {node.target}"


def _options(node: Node) -> dict[str, Any]:
    """Keywords; the layer's number does not change what an attention op computes (kernels/schemas.py)."""
    ours = getattr(node.target, "namespace", "") == "fluxc"
    return {name: value for name, value in node.kwargs.items() if not (ours and name == "layer")}


def _plain(value: Any, numbers: Mapping[Node, int]) -> str:
    return str(torch.fx.node.map_arg(value, lambda node: f"%{numbers[node]}"))


def _layout(value: Any, sizes: dict[str, str]) -> str:
    if not isinstance(value, Tensor):
        return str(value)
    shape, stride = (tuple(_size(size, sizes) for size in each) for each in (value.shape, value.stride()))
    return f"{value.dtype} {value.device} {shape} {stride}"


def _size(size: Any, sizes: dict[str, str]) -> str:
    """A number, or an expression of free sizes under names of their own."""
    if not isinstance(size, torch.SymInt):
        return str(size)
    expr = size.node.expr
    free = sorted(expr.free_symbols, key=str)
    return str(
        expr.xreplace({symbol: sympy.Symbol(sizes.setdefault(str(symbol), f"n{len(sizes)}")) for symbol in free})
    )
