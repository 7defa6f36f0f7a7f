"""What a pass is: a frozen dataclass with a stable name, whose fields are its options."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch.export.exported_program import ExportedProgram

from fluxc.ir.graph import Draft


@dataclasses.dataclass(frozen=True)
class Note:
    """What a pass decided about one node. `matched` is False for a rewrite that was refused, with the reason."""

    node: str
    matched: bool
    reason: str


@dataclasses.dataclass(frozen=True)
class PassResult:
    """A pass's outcome: the new program (the old one where nothing changed), the match count, and notes on nodes."""

    program: ExportedProgram
    count: int
    notes: tuple[Note, ...] = ()

    @property
    def modified(self) -> bool:
        """Whether the pass changed anything."""
        return self.count > 0


@dataclasses.dataclass(frozen=True)
class Pass:
    """Base of all passes. A subclass sets `name` and implements `rewrite`.

    `runs_after` names passes that must come earlier in any pipeline that holds both. `stage` names the verifier stage
    ("captured", "routed", "lowered") the result belongs to, None where the pass keeps the stage it found.
    """

    name: ClassVar[str]
    runs_after: ClassVar[tuple[str, ...]] = ()
    stage: ClassVar[str | None] = None

    def apply(self, program: ExportedProgram) -> PassResult:
        """Run on a copy of the graph; the given program is never changed."""
        draft = Draft(program)
        notes: list[Note] = []
        count = self.rewrite(draft, notes)
        if count == 0:
            return PassResult(program, 0, tuple(notes))
        return PassResult(draft.close(), count, tuple(notes))

    def rewrite(self, draft: Draft, notes: list[Note]) -> int:
        """Edit the draft in place, add notes, and return how many places changed."""
        raise NotImplementedError
