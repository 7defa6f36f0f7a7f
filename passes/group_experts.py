"""Pass `group-experts`: torch's grouped product of a mixture of experts becomes `fluxc::grouped_mm`.

1. `_grouped_mm(x, weight, ends)` with a weight for each group: rewritten.
2. Other forms (a bias, another output dtype): refused, with the reason.

    before: h = aten._grouped_mm(x, w_t, ends)
    after:  h = fluxc.grouped_mm(x, w_t, ends)
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch.fx import Node

import fluxc.kernels
from fluxc.ir.graph import Draft, argument, calls
from fluxc.ir.pass_base import Note, Pass


@dataclasses.dataclass(frozen=True)
class GroupExperts(Pass):
    """Rewrite every grouped product; counts them."""

    name: ClassVar[str] = "group-experts"

    def rewrite(self, draft: Draft, notes: list[Note]) -> int:
        """One for one."""
        fluxc.kernels.register()
        return sum(_rewrite(draft, node, notes) for node in calls(draft.module, torch.ops.aten._grouped_mm))


def _rewrite(draft: Draft, node: Node, notes: list[Note]) -> int:
    if argument(node, "bias") is not None or argument(node, "out_dtype") is not None:  # case 2
        notes.append(Note(node.name, False, "a grouped product with a bias or another output dtype"))
        return 0
    operands = tuple(argument(node, name) for name in ("self", "mat2", "offs"))
    with draft.inserting_before(node):
        new = draft.call(torch.ops.fluxc.grouped_mm.default, operands)
    node.replace_all_uses_with(new)
    draft.graph.erase_node(node)
    notes.append(Note(new.name, True, "grouped product of experts"))
    return 1
