"""Pass `soften-conditionals`: turns each routed attention into both branches, mixed by the router's weight."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch.fx import Node

from fluxc import kernels
from fluxc.ir.graph import Draft, argument, is_call
from fluxc.ir.pass_base import Note, Pass
from fluxc.passes.lower_to_cond import full_call, sparse_call
from fluxc.router import PREFIX

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class SoftenConditionals(Pass):
    """Mix full and sparse attention by `weight = softmax((logits + Gumbel) / tau)[full]` (METHOD section 1).

    The difference of two Gumbel variables is logistic, so that weight is `sigmoid((score + route_bias + noise) / tau)`.
    Noise and tau are inputs: the graph stays functional, and what checkpointing recomputes is what ran before.

    1. The mix is made in fp32 and cast back: at weight 1 it is the full branch bit for bit, at 0 the sparse one.
    2. Straight-through: the value of the weight is 0 or 1, its gradient that of the soft weight.
    3. Router weights become copies that train; all other weights are shared and take no gradient.

        %route = gt(%score + %route_bias[r], 0)   %weight = sigmoid((%score + %route_bias[r] + %noise[r]) / %tau)
        %out   = routed_attention(%q, %k, %v,  => %full   = attention(%q, %k, %v)
                                  %route, ...)    %sparse = streaming_attention(%q, %k, %v, ...)
        return %logits, %routes, %scores          %out    = %full * %weight + %sparse * (1 - %weight)
                                                  return %logits, %weights, %scores

    The program gains the inputs `noise` f32[L,B] (0: none) and `tau` f32[]; routes give way to weights f32[L,B].
    """

    straight_through: bool = False  # case 2

    name: ClassVar[str] = "soften-conditionals"
    runs_after: ClassVar[tuple[str, ...]] = ("route-attention", "apply-plan")
    stage: ClassVar[str | None] = "softened"

    def rewrite(self, draft: Draft, notes: list[Note]) -> int:
        """Returns the number of attentions softened."""
        kernels.register()
        nodes = [node for node in draft.graph.nodes if is_call(node, torch.ops.fluxc.routed_attention)]
        if not nodes:
            notes.append(Note("output", False, "the program has no routed attention"))
            return 0
        noise, tau = _add_inputs(draft)
        weights = [self._soften(draft, node, noise, tau, row) for row, node in enumerate(nodes)]
        _set_outputs(draft, weights)
        draft.remove_dead_code()
        _freeze(draft)
        return len(nodes)

    def _soften(self, draft: Draft, node: Node, noise: Node, tau: Node, row: int) -> Node:
        with draft.inserting_before(node):
            biased: Any = argument(node, "route").args[0]
            noisy = draft.call(aten.add.Tensor, (biased, draft.call(aten.select.int, (noise, 0, row))))
            weight = draft.call(aten.sigmoid.default, (draft.call(aten.div.Tensor, (noisy, tau)),), name="weight")
            if self.straight_through:
                weight = _hardened(draft, noisy, weight)
            mixed = _mixed(draft, node, weight)
        node.replace_all_uses_with(mixed)
        draft.graph.erase_node(node)
        return weight


def _hardened(draft: Draft, noisy: Node, weight: Node) -> Node:
    """Case 2: (weight - its value) is exactly 0, so the sum is exactly 0 or 1."""
    hard = draft.call(aten.gt.Scalar, (noisy, 0.0))
    slope = draft.call(aten.sub.Tensor, (weight, draft.call(aten.detach.default, (weight,))))
    return draft.call(aten.add.Tensor, (slope, hard), name="hard_weight")


def _mixed(draft: Draft, node: Node, weight: Node) -> Node:
    """Both branches [B,S,H,Dv], weighted (case 1); weight [B]."""
    full, sparse = (draft.call(*call, name=name) for name, call in _branches(node))
    share = draft.call(aten.view.default, (weight, [-1, 1, 1, 1]))
    rest = draft.call(aten.rsub.Scalar, (share, 1))
    parts = [draft.call(aten.mul.Tensor, pair) for pair in ((full, share), (sparse, rest))]
    mixed = draft.call(aten.add.Tensor, tuple(parts), name="mixed")
    dtype = node.meta["val"].dtype
    if dtype == torch.float32:
        return mixed
    return draft.call(aten.to.dtype, (mixed, dtype), name="mixed_back")


def _branches(node: Node) -> tuple[tuple[str, Any], ...]:
    return ("full", full_call(node)), ("sparse", sparse_call(node))


def _add_inputs(draft: Draft) -> tuple[Node, Node]:
    bias = draft.user_input("route_bias").meta["val"]
    with draft.fake_mode:
        noise, tau = torch.empty_like(bias), torch.empty((), dtype=torch.float32, device=bias.device)
    return draft.add_input("noise", noise, before="logits_at"), draft.add_input("tau", tau, before="logits_at")


def _set_outputs(draft: Draft, weights: list[Node]) -> None:
    outputs: Any = draft.output.args[0]
    logits, _, scores = outputs
    with draft.inserting_before(draft.output):
        stacked = draft.call(aten.stack.default, (weights,), name="weights")
    draft.set_outputs([logits, stacked, scores])


def _freeze(draft: Draft) -> None:
    """Case 3. Tied weights stay one object."""
    made: dict[int, torch.nn.Parameter] = {}
    for name, tensor in draft.state_dict.items():
        if name.startswith(PREFIX):
            draft.state_dict[name] = torch.nn.Parameter(tensor.detach().clone())
        elif tensor.requires_grad:
            frozen = made.setdefault(id(tensor), torch.nn.Parameter(tensor.detach(), requires_grad=False))
            draft.state_dict[name] = frozen
