"""Pass `outline-layers`: cuts a flat program into one called GraphModule for each decoder layer."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch.export.exported_program import ExportedProgram
from torch.fx import GraphModule, Node

from fluxc import kernels
from fluxc.ir.graph import is_call, user_inputs
from fluxc.ir.layers import attention_nodes, layer_paths, layer_stages
from fluxc.ir.outlined import Interface, Outlined
from fluxc.ir.parts import attributes, build_part, needed


@dataclasses.dataclass(frozen=True)
class OutlineLayers:
    """Cut a captured, routed or lowered program at its decoder layers. Ends a pipeline: its result is a module.

    1. A value used by a later part leaves its part and enters the others under its node name.
    2. A size is read from a tensor that enters anyway, if one has it.
    3. A weight is an attribute of each part that uses it: the same object, under the name it has within the layer.

        %add_3 = ...                  prologue:  embedding, cos, sin
        %q     = linear(%add_3, ...)  layers[0]: (%embedding, %cos, %sin, %prompt_lens, %route_bias)
        ...                      =>              -> %add_3, %route, %score
        %add_7 = ...                  layers[1]: (%add_3, %cos, %sin, ...) -> %add_7, ...
        return %logits                epilogue:  norm, head, routes, scores
    """

    name: ClassVar[str] = "outline-layers"

    def apply(self, program: ExportedProgram) -> Outlined:
        """The program in parts over the same weights; raises InternalError where layers cannot be told apart."""
        kernels.register()
        cutter = _Cutter(program)
        modules, interfaces = zip(*(cutter.part(stage) for stage in range(cutter.last + 1)), strict=True)
        return Outlined(modules, interfaces, user_inputs(program), single=len(cutter.outputs) == 1)


class _Cutter:
    """Builds the parts of one program."""

    def __init__(self, program: ExportedProgram) -> None:
        stages = layer_stages(program.graph)
        self._attentions = attention_nodes(program.graph)
        self._paths = layer_paths(self._attentions)
        self._held = attributes(program)
        self.last = len(self._attentions) + 1
        self.outputs: list[Node] = list(program.graph.output_node().args[0])
        self._nodes: list[list[Node]] = [[] for _ in range(self.last + 1)]
        for node, stage in stages.items():
            self._nodes[stage].append(node)
        self._needed = [needed(nodes) for nodes in self._nodes]
        self._needed[-1] += [n for n in self.outputs if n not in self._nodes[-1] and n not in self._needed[-1]]

    def part(self, stage: int) -> tuple[GraphModule, Interface]:
        """The module of one stage and its interface."""
        entering = [node for node in self._needed[stage] if node not in self._held]
        held, weights = self._hold(stage)
        leaving = self.outputs if stage == self.last else self._leaving(stage)
        module = build_part(self._nodes[stage], entering, leaving, held)
        enters, leaves = (tuple(node.name for node in group) for group in (entering, leaving))
        return module, Interface(enters, leaves, weights, **self._layer_fields(stage, leaving))

    def _leaving(self, stage: int) -> list[Node]:
        later = {node for nodes in self._needed[stage + 1 :] for node in nodes}
        return [node for node in self._nodes[stage] if node in later]

    def _hold(self, stage: int) -> tuple[dict[Node, tuple[str, Any]], dict[str, str]]:
        """Attributes of the part under their names in it, and its weights' names in the program (case 3)."""
        prefixes = self._prefixes(stage)
        held: dict[Node, tuple[str, Any]] = {}
        weights: dict[str, str] = {}
        for node in self._needed[stage]:
            if node in self._held:
                name, value = self._held[node]
                local = next((new + name.removeprefix(old) for old, new in prefixes if name.startswith(old)), name)
                held[node] = (local, value)
                weights |= {local: name} if isinstance(value, torch.Tensor) else {}
        return held, weights

    def _prefixes(self, stage: int) -> list[tuple[str, str]]:
        """(prefix in the program, prefix in the part) of weight names."""
        if not 1 <= stage < self.last:
            return []
        own = [(f"{self._paths[stage - 1]}.", "")] if self._paths else []
        return [*own, (f"routers.{self._layer(stage)}.", "router.")]

    def _layer(self, stage: int) -> int:
        return self._attentions[stage - 1].kwargs.get("layer", stage - 1)  # type: ignore[return-value]

    def _layer_fields(self, stage: int, leaving: list[Node]) -> dict[str, Any]:
        if not 1 <= stage < self.last:
            return {}
        route = next((node for node in leaving if is_call(node, torch.ops.aten.gt)), None)
        score = _score_of(route) if route else None
        hidden = tuple(node.name for node in leaving if node not in (route, score))
        fields = {"layer": self._layer(stage), "hidden": hidden}
        return fields | ({"route": route.name, "score": score.name} if route and score else {})


def _score_of(route: Node) -> Node:
    """route = gt(add(score, bias), 0)."""
    return route.all_input_nodes[0].all_input_nodes[0]
