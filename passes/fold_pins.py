"""Pass `fold-pins`: the routes of pinned layers become constants."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch.fx import Node

from fluxc import kernels
from fluxc.errors import OptionError, PlanError
from fluxc.ir.graph import Draft, argument, is_call
from fluxc.ir.pass_base import Note, Pass

aten = torch.ops.aten
FULL, SPARSE = "full", "sparse"


@dataclasses.dataclass(frozen=True)
class FoldPins(Pass):
    """Replace the route of each layer in `pins` ("full" or "sparse", by model layer) by a constant.

    1. The attention and the output `routes` read the constant: no bias and no score changes them. The score itself is
       still computed and handed out, so `routes`, `scores` and `route_bias` keep one row for every routable layer.

        %route = gt(%score + %bias, 0)                          %route = full([1], True)
        %out = routed_attention(%q, %k, %v, %route)      =>     %out = routed_attention(%q, %k, %v, %route)

    The count is of the routes that became constant. Raises PlanError for a layer that is not routable, OptionError for
    another route.
    """

    pins: Mapping[int, str]

    name: ClassVar[str] = "fold-pins"
    runs_after: ClassVar[tuple[str, ...]] = ("route-attention", "apply-plan")

    def rewrite(self, draft: Draft, notes: list[Note]) -> int:
        """Replace the routes."""
        kernels.register()
        routed = [node for node in draft.graph.nodes if is_call(node, torch.ops.fluxc.routed_attention)]
        layers = {argument(node, "layer"): node for node in routed}
        for layer, route in self.pins.items():
            if layer not in layers:
                raise PlanError(f"layer {layer} is pinned and has no router")
            if route not in (FULL, SPARSE):
                raise OptionError(f"layer {layer} is pinned to {route!r}", hint=f"use {FULL} or {SPARSE}")
            _fold(draft, argument(layers[layer], "route"), route == FULL)
        return len(self.pins)


def _fold(draft: Draft, route: Node, value: bool) -> None:
    val = route.meta["val"]
    with draft.inserting_before(route):
        size = draft.call(aten.sym_size.int, (route.args[0], 0)) if not isinstance(val.shape[0], int) else val.shape[0]
        made = draft.call(
            aten.full.default, ([size], value), {"dtype": torch.bool, "device": val.device, "pin_memory": False}
        )
    route.replace_all_uses_with(made)
    draft.graph.erase_node(route)
