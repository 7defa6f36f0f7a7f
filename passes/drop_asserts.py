"""Pass `drop-asserts`: erase `_assert_tensor_metadata`, which pins casts to the dtype and device of capture.

before: _assert_tensor_metadata(x, dtype=float32, device=cpu); y = to(x, float32)
after:  y = to(x, float32)
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from fluxc.ir.graph import Draft, calls
from fluxc.ir.pass_base import Note, Pass


@dataclasses.dataclass(frozen=True)
class DropAsserts(Pass):
    """Erase every `_assert_tensor_metadata`; counts them."""

    name: ClassVar[str] = "drop-asserts"

    def rewrite(self, draft: Draft, notes: list[Note]) -> int:
        """Erase the asserts of the graph and of cond branches."""
        found = calls(draft.module, torch.ops.aten._assert_tensor_metadata)
        for node in found:
            node.graph.erase_node(node)
        return len(found)
