"""Pass `drop-routers`: turns a routed program back into the captured one."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch.export.graph_signature import InputKind

from fluxc import kernels
from fluxc.ir.graph import Draft, argument, is_call
from fluxc.ir.pass_base import Note, Pass


@dataclasses.dataclass(frozen=True)
class DropRouters(Pass):
    """Make every routed attention full and remove the routers, so that one loaded graph serves all phases.

        %pool  = router_pool(%q_pre, %prompt_lens)
        %score, %route = ...                          =>   %out = attention(%q, %k, %v)
        %out   = routed_attention(%q, %k, %v, %route)      return %logits
        return %logits, %routes, %scores

    The result is the captured program, node for node, over the same weights.
    """

    name: ClassVar[str] = "drop-routers"
    runs_after: ClassVar[tuple[str, ...]] = ("route-attention", "apply-plan")
    stage: ClassVar[str | None] = "captured"

    def rewrite(self, draft: Draft, notes: list[Note]) -> int:
        """Returns the number of attentions that had a router."""
        kernels.register()
        routed = [node for node in draft.graph.nodes if is_call(node, torch.ops.fluxc.routed_attention)]
        for node in routed:
            _make_full(draft, node)
        if routed:
            outputs: Any = draft.output.args[0]
            draft.set_outputs([outputs[0]])
            draft.remove_dead_code()
            _remove_inputs(draft)
        return len(routed)


def _make_full(draft: Draft, node: torch.fx.Node) -> None:
    kwargs = {name: argument(node, name) for name in ("scale", "layer", "softcap", "sink_logits")}
    with draft.inserting_before(node):
        args = tuple(argument(node, name) for name in "qkv")
        full = draft.call(torch.ops.fluxc.attention.default, args, kwargs)
    node.replace_all_uses_with(full)
    draft.graph.erase_node(node)


def _remove_inputs(draft: Draft) -> None:
    """The routers' weights, and the inputs that only they read."""
    pairs = list(zip(draft.placeholders(), draft.input_specs, strict=True))
    weights = [node for node, spec in pairs if spec.kind != InputKind.USER_INPUT and not node.users]
    for node in [*weights, draft.user_input("prompt_lens"), draft.user_input("route_bias")]:
        draft.remove_input(node)
