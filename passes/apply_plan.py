"""Pass `apply-plan`: gives each routed attention the sparse kind and sizes a plan chose for its layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Self

import torch

from fluxc import kernels
from fluxc.errors import PlanError
from fluxc.ir.graph import Draft, argument, is_call
from fluxc.ir.pass_base import Note, Pass
from fluxc.ir.sparse import SparseSettings

if TYPE_CHECKING:
    from fluxc.plan import Plan


@dataclasses.dataclass(frozen=True)
class ApplyPlan(Pass):
    """Set the kinds, their sizes and `decode_full` of routed attentions. No branch is ever removed.

    1. A layer the plan does not name keeps its settings.
    2. A layer that has them already does not count.

        routed_attention(..., kind=streaming, sink=128, window=2048, last=0)
     => routed_attention(..., kind=triangle, sink=64, window=1024, last=128)

    Raises PlanError for a layer that is not routed in this program.
    """

    layers: Mapping[int, SparseSettings] = dataclasses.field(default_factory=dict)  # by the attention's `layer`

    name: ClassVar[str] = "apply-plan"
    runs_after: ClassVar[tuple[str, ...]] = ("route-attention",)
    stage: ClassVar[str | None] = "routed"

    @classmethod
    def of(cls, plan: Plan) -> Self:
        """The pass that applies `plan`: its kinds and sizes. Biases are inputs of the program, not part of it."""
        return cls({layer.layer: layer.settings(plan.decode == "full") for layer in plan.layers})

    def rewrite(self, draft: Draft, notes: list[Note]) -> int:
        """Returns the number of attentions whose settings changed."""
        kernels.register()
        nodes = {
            argument(node, "layer"): node
            for node in draft.graph.nodes
            if is_call(node, torch.ops.fluxc.routed_attention)
        }
        _check_layers(self.layers, nodes)
        changed = [layer for layer, new in self.layers.items() if settings_of(nodes[layer]) != new]
        for layer in changed:
            node = nodes[layer]
            kept = {name: value for name, value in node.kwargs.items() if name != "full_kind"}
            node.kwargs = kept | self.layers[layer].attributes()
            notes.append(Note(node.name, True, f"layer {layer}: {self.layers[layer]}"))
        return len(changed)


def settings_of(node: torch.fx.Node) -> SparseSettings:
    """The sparse settings of a routed_attention node."""
    return SparseSettings(**{field.name: argument(node, field.name) for field in dataclasses.fields(SparseSettings)})


def _check_layers(layers: Mapping[int, SparseSettings], nodes: Mapping[int, torch.fx.Node]) -> None:
    unknown = sorted(set(layers) - set(nodes))
    if unknown:
        raise PlanError(
            f"the plan has settings for layer {unknown[0]}, which is not routed in this program",
            hint=f"Routed layers are {', '.join(map(str, sorted(nodes))) or 'none'}",
        )
