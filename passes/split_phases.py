"""Pass `split-phases`: cuts a prefill program into the pieces that the engine calls one after another."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch.export.exported_program import ExportedProgram
from torch.fx import Node

from fluxc import kernels
from fluxc.ir.graph import argument, is_call, user_inputs, walk_back
from fluxc.ir.layers import attention_nodes, layer_stages
from fluxc.ir.parts import attributes, build_part, needed
from fluxc.ir.phases import LayerPieces, Phases, Piece


@dataclasses.dataclass(frozen=True)
class SplitPhases:
    """Cut before and after every attention. Ends a pipeline: its result is called piece by piece.

    1. Keys, values and the route of a layer are there before the layer is finished: the engine stores them while its
       MLP runs, and they need not outlive it.
    2. The keys and values among the program's outputs are handed out by the layers, not by the epilogue.

        ...                                       before: ... -> %q, %k, %v, %route
        %out = routed_attention(%q, %k, %v, ...)  attend: %q, %k, %v, %route -> %out
        ...                                   =>  after:  %out, %hidden -> %hidden'
        return %logits, %routes, %scores, %k, %v  epilogue: %hidden' -> %logits, %routes, %scores

    Raises InternalError where layers cannot be told apart.
    """

    name: ClassVar[str] = "split-phases"

    def apply(self, program: ExportedProgram) -> Phases:
        """The pieces of a prefill program, over its own weights."""
        kernels.register()
        cutter = _Cutter(program)
        pieces = [cutter.piece(number) for number in range(cutter.last + 1)]
        layers = tuple(cutter.layer(index, pieces) for index in range(len(cutter.attentions)))
        return Phases(user_inputs(program), pieces[-1].leaves, pieces[0], layers, pieces[-1])


class _Cutter:
    """Builds the pieces of one program: 0 the prologue, three for each layer, and the epilogue."""

    def __init__(self, program: ExportedProgram) -> None:
        self.attentions = attention_nodes(program.graph)
        self.last = 3 * len(self.attentions) + 1
        self._held = attributes(program)
        self._outputs = _outputs(program, self.attentions)
        self._nodes: list[list[Node]] = [[] for _ in range(self.last + 1)]
        for node, number in _numbers(program.graph, self.attentions).items():
            self._nodes[number].append(node)
        self._needed = [needed(nodes) for nodes in self._nodes]
        self._needed[-1] += [n for n in self._outputs if n not in self._nodes[-1] and n not in self._needed[-1]]

    def piece(self, number: int) -> Piece:
        """The piece and its interface."""
        entering = [node for node in self._needed[number] if node not in self._held]
        held = {node: self._held[node] for node in self._needed[number] if node in self._held}
        leaving = self._outputs if number == self.last else self._leaving(number)
        module = build_part(self._nodes[number], entering, leaving, held)
        return Piece(module, *(tuple(node.name for node in group) for group in (entering, leaving)))

    def layer(self, index: int, pieces: list[Piece]) -> LayerPieces:
        """The three pieces of a layer."""
        node = self.attentions[index]
        k, v = (argument(node, name).name for name in "kv")
        is_routed = is_call(node, torch.ops.fluxc.routed_attention)
        route = argument(node, "route").name if is_routed else ""
        before, attend, after = pieces[3 * index + 1 : 3 * index + 4]
        return LayerPieces(before, attend, after, k, v, route)

    def _leaving(self, number: int) -> list[Node]:
        later = {node for nodes in self._needed[number + 1 :] for node in nodes}
        return [node for node in self._nodes[number] if node in later]


def _outputs(program: ExportedProgram, attentions: list[Node]) -> list[Node]:
    """The outputs without the keys and values of case 2."""
    outputs: Any = program.graph.output_node().args[0]
    return list(outputs[: len(outputs) - 2 * len(attentions)])


def _numbers(graph: torch.fx.Graph, attentions: list[Node]) -> dict[Node, int]:
    """The piece of each call. Within a layer: what the attention needs, the attention, and what else there is."""
    stages = layer_stages(graph)
    attends = dict(enumerate(attentions, 1))
    needs = {n for stage, node in attends.items() for n in _needs(node, stage, stages)}
    numbers: dict[Node, int] = {}
    for node, stage in stages.items():
        if stage not in attends:
            numbers[node] = 0 if stage == 0 else 3 * len(attentions) + 1
        else:
            numbers[node] = 3 * stage - (1 if node is attends[stage] else 2 if node in needs else 0)
    return numbers


def _needs(attention: Node, stage: int, stages: dict[Node, int]) -> list[Node]:
    """The calls of its own stage that an attention depends on."""
    return [node for node in walk_back(attention, lambda n: stages.get(n) != stage) if stages.get(node) == stage]
