"""Pass `dead-code`: removes what no output needs."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch.export.graph_signature import InputKind

from fluxc.ir.graph import Draft
from fluxc.ir.pass_base import Note, Pass


@dataclasses.dataclass(frozen=True)
class DeadCode(Pass):
    """Remove calls, weights and constants that no output depends on.

    1. Inputs of the signature stay, used or not; calls that write to their arguments stay.
    2. A weight goes with its last user, from the graph and from the state dict of the new program.

        %a = cos(%x)                %b = sin(%x)
        %b = sin(%x)          =>    return %b
        return %b
    """

    name: ClassVar[str] = "dead-code"

    def rewrite(self, draft: Draft, notes: list[Note]) -> int:
        """Returns the number of calls, weights and constants removed."""
        calls = draft.remove_dead_code()
        pairs = zip(draft.placeholders(), list(draft.input_specs), strict=True)
        unused = [node for node, spec in pairs if spec.kind != InputKind.USER_INPUT and not node.users]
        for node in unused:
            draft.remove_input(node)
        return calls + len(unused)
