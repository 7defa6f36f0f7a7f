"""Pass `route-attention`: turns every attention that has a router into `routed_attention`."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch.fx import Node

from fluxc import kernels
from fluxc.errors import InternalError
from fluxc.ir.graph import Draft, argument, is_call
from fluxc.ir.pass_base import Note, Pass
from fluxc.ir.sparse import SparseSettings

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class RouteAttention(Pass):
    """Route each scored attention: `route = score + route_bias[r] > 0`, full where True, else sparse.

    1. An attention with a window of its own is left as it is.
    2. All routable layers start with the same sparse settings; `apply-plan` sets them one by one.

        %score = sub(...)                         %score = sub(...)
        %out   = attention(%q, %k, %v)       =>   %route = gt(%score + %route_bias[r], 0)
        return %logits, %scores                   %out   = routed_attention(%q, %k, %v, %route, %prompt_lens)
                                                  return %logits, %routes, %scores
    """

    sparse: SparseSettings = dataclasses.field(default_factory=SparseSettings)  # of every routable layer

    name: ClassVar[str] = "route-attention"
    runs_after: ClassVar[tuple[str, ...]] = ("insert-routers",)
    stage: ClassVar[str | None] = "routed"

    def rewrite(self, draft: Draft, notes: list[Note]) -> int:
        """Returns the number of attentions routed."""
        kernels.register()
        scores = _scores(draft)
        if not scores:
            notes.append(Note("output", False, "the program has no routers"))
            return 0
        attentions = _unwindowed(draft, notes)
        if len(attentions) != len(scores):
            raise InternalError(f"{len(attentions)} routable attentions have {len(scores)} scores")
        route_bias = _add_route_bias(draft, len(scores))
        pairs = enumerate(zip(attentions, scores, strict=True))
        routes = [self._route(draft, node, score, route_bias, r) for r, (node, score) in pairs]
        _set_outputs(draft, routes)
        return len(routes)

    def _route(self, draft: Draft, attention: Node, score: Node, route_bias: Node, index: int) -> Node:
        with draft.inserting_before(attention):
            bias = draft.call(aten.select.int, (route_bias, 0, index))
            biased = draft.call(aten.add.Tensor, (score, bias))
            route = draft.call(aten.gt.Scalar, (biased, 0.0), name="route")
            args = (*(argument(attention, name) for name in "qkv"), route, draft.user_input("prompt_lens"))
            routed = draft.call(torch.ops.fluxc.routed_attention.default, args, self._attributes(attention))
        attention.replace_all_uses_with(routed)
        draft.graph.erase_node(attention)
        return route

    def _attributes(self, attention: Node) -> dict[str, Any]:
        kept = {name: argument(attention, name) for name in ("scale", "layer", "softcap", "sink_logits")}
        return kept | self.sparse.attributes()


def _scores(draft: Draft) -> list[Node]:
    """Score nodes in graph order, [] unless the program is in the form `insert-routers` leaves."""
    outputs: Any = draft.output.args[0]
    is_scored = len(outputs) == 2 and is_call(outputs[1], aten.stack)
    return list(outputs[1].args[0]) if is_scored else []


def _unwindowed(draft: Draft, notes: list[Note]) -> list[Node]:
    attentions = [node for node in draft.graph.nodes if is_call(node, torch.ops.fluxc.attention)]
    for node in attentions:
        if argument(node, "window"):  # case 1
            notes.append(Note(node.name, False, f"has a window of its own, {argument(node, 'window')} tokens"))
        elif argument(node, "q_start") is not None:
            raise InternalError(f"node {node.name} attends from the middle of a sequence; captured programs do not")
    return [node for node in attentions if not argument(node, "window")]


def _add_route_bias(draft: Draft, layers: int) -> Node:
    batch = draft.user_input("input_ids").meta["val"].shape[0]
    with draft.fake_mode:
        val = torch.empty(layers, batch, dtype=torch.float32, device=draft.user_input("seq_lens").meta["val"].device)
    return draft.add_input("route_bias", val, before="logits_at")


def _set_outputs(draft: Draft, routes: list[Node]) -> None:
    outputs: Any = draft.output.args[0]
    logits, scores = outputs
    with draft.inserting_before(draft.output):
        stacked = draft.call(aten.stack.default, (routes,), name="routes")
    draft.set_outputs([logits, stacked, scores])
