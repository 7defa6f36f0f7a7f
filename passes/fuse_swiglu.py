"""Pass `fuse-swiglu`: silu(gate) * up in one pass over memory."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch.fx import Node

from fluxc import kernels
from fluxc.ir.graph import Draft, is_call
from fluxc.ir.norms import factors
from fluxc.ir.pass_base import Note, Pass

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class FuseSwiglu(Pass):
    """Replace a product with silu by `fluxc::swiglu`.

    1. gate and up may be parts of one merged projection: the op reads them where they lie.
    2. Other activations (GELU), a silu that something else reads too, and factors of unlike shapes are left as they
       are.

        %act = silu(%gate)
        %out = mul(%act, %up)     =>     %out = swiglu(%gate, %up)
    """

    name: ClassVar[str] = "fuse-swiglu"
    runs_after: ClassVar[tuple[str, ...]] = ("merge-linears", "drop-routers")

    def rewrite(self, draft: Draft, notes: list[Note]) -> int:
        """Returns the number of products replaced."""
        kernels.register()
        found = [(node, *pair) for node in draft.graph.nodes if (pair := _gate_and_up(node, notes))]
        for node, gate, up in found:
            notes.append(Note(node.name, True, f"silu({gate.name}) * {up.name}"))
            with draft.inserting_before(node):
                fused = draft.call(torch.ops.fluxc.swiglu.default, (gate, up))
            node.replace_all_uses_with(fused)
        draft.remove_dead_code()
        return len(found)


def _gate_and_up(node: Node, notes: list[Note]) -> tuple[Node, Node] | None:
    for act, up in factors(node):
        if is_call(act, aten.silu):
            gate: Node = act.args[0]  # type: ignore[assignment]
            reason = _refusal(node, act, gate, up)
            if reason is None:
                return gate, up
            notes.append(Note(node.name, False, reason))  # case 2
    return None


def _refusal(node: Node, act: Node, gate: Node, up: Node) -> str | None:
    if len(act.users) > 1:
        return f"{act.name} is read elsewhere too"
    (shape, dtype), *others = [(str(n.meta["val"].shape), n.meta["val"].dtype) for n in (gate, up, node)]
    if any(other != (shape, dtype) for other in others):
        return f"{gate.name} and {up.name} differ in shape or dtype"
    return None if node.meta["val"].is_contiguous() else "the product is strided"
