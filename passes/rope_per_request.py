"""Pass `rope-per-request`: lets each request of a batch choose its own longrope factors."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch.fx import Node

from fluxc.errors import UnsupportedAttentionError
from fluxc.ir.graph import Draft, is_call
from fluxc.ir.pass_base import Note, Pass
from fluxc.ir.renew import renew

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class RopePerRequest(Pass):
    """Ask for the largest position of each row in place of the largest of the call.

    1. Requests of one decode step are on different sides of the original context: neither may turn the other's keys.
    2. What is computed from the answer gains a batch axis by broadcasting, up to the table [B,S,R], which has one.
    3. Frequencies [R] that were given a batch axis of 1 before they met the positions have a real one now.

        %max  = max(%position_ids)             %max  = amax(%position_ids, [1], True)
        %past = ge(%max, 4096)            =>   %rows = unsqueeze(%max, -1)
        %freq = where(%past, %long, %short)    %past = ge(%rows, 4096)
                                               %freq = where(%past, %long, %short)
        %row  = unsqueeze(%freq, 0)                %row  = squeeze(%freq, 1)

    Raises UnsupportedAttentionError where the batch axis cannot be carried through.
    """

    name: ClassVar[str] = "rope-per-request"
    runs_after: ClassVar[tuple[str, ...]] = ("expose-positions",)

    def rewrite(self, draft: Draft, notes: list[Note]) -> int:
        """Returns the number of choices made per request."""
        choices = _choices(draft.graph, draft.user_input("position_ids"))
        for node in choices:
            with draft.inserting_before(node):
                largest = draft.call(aten.amax.default, (node.args[0], [1], True))
                rows = draft.call(aten.unsqueeze.default, (largest, -1))
            node.replace_all_uses_with(rows)
            draft.graph.erase_node(node)
            _carry(draft, rows)
        return len(choices)


def rope_limit(program: torch.export.ExportedProgram) -> int:
    """Positions from which on all keys of a text are rotated otherwise (longrope's original context); 0 for none."""
    positions = next(node for node in program.graph.nodes if node.name == "position_ids")
    limits = [_limit_of(choice) for choice in _choices(program.graph, positions)]
    return min(limits, default=0)


def _choices(graph: torch.fx.Graph, positions: Node) -> list[Node]:
    return [node for node in graph.nodes if is_call(node, aten.max.default) and node.args[0] is positions]


def _limit_of(choice: Node) -> int:
    for user in choice.users:
        if is_call(user, aten.ge.Scalar):
            limit: Any = user.args[1]
            return int(limit)
    raise UnsupportedAttentionError(f"node {choice.name} reads the length of the whole text")


def _carry(draft: Draft, rows: Node) -> None:
    """Cases 2 and 3: fake values with the batch axis, no further than the tables."""
    _keep_batch_axis(rows)
    try:
        changed = renew(draft, [rows])
    except (RuntimeError, ValueError, IndexError) as error:
        raise _refusal(rows) from error
    for node in changed:
        if any(user.op == "output" or getattr(user.target, "namespace", "") == "fluxc" for user in node.users):
            raise _refusal(node)


def _keep_batch_axis(rows: Node) -> None:
    """Case 3: [B,1,R] loses its axis of 1 where [R] was given one for the batch."""
    reached = [rows]
    for node in reached:
        for user in tuple(node.users):
            if is_call(user, aten.unsqueeze.default) and user.args == (node, 0) and node.meta["val"].dim() == 1:
                user.target, user.args = aten.squeeze.dim, (node, 1)
            elif user not in reached and user.meta["val"].dim() <= 1:
                reached.append(user)


def _refusal(node: Node) -> UnsupportedAttentionError:
    reason = "the factors chosen by the length of the text cannot be chosen for each request"
    return UnsupportedAttentionError(f"node {node.name}: {reason}", hint="capture the model with another RoPE kind")
