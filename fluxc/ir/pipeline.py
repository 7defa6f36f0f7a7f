"""Running passes in order. Verifying, dumping and timing are observers: no pass knows of them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any, Protocol

from torch.export.exported_program import ExportedProgram

from fluxc.errors import InternalError
from fluxc.ir.pass_base import Note, Pass, PassResult


@dataclasses.dataclass(frozen=True)
class Step:
    """One pass that ran: its place from 1, its name, how many places it changed, seconds, and what it said of nodes."""

    index: int
    name: str
    count: int
    seconds: float
    notes: tuple[Note, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON and reports."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class PipelineResult:
    """The last program, the verifier stage it is in (None: unknown), and a Step for each pass."""

    program: ExportedProgram
    stage: str | None
    steps: tuple[Step, ...]

    def count(self, name: str) -> int:
        """Places that the pass `name` changed."""
        return sum(step.count for step in self.steps if step.name == name)

    def notes(self, name: str) -> tuple[Note, ...]:
        """What the pass `name` said of nodes."""
        return tuple(note for step in self.steps if step.name == name for note in step.notes)

    def report(self) -> list[dict[str, Any]]:
        """All steps as plain values."""
        return [step.to_dict() for step in self.steps]


class Observer(Protocol):
    """Sees a pipeline run from outside."""

    def begin(self, program: ExportedProgram, stage: str | None) -> None:
        """Before the first pass."""

    def after(self, step: Pass, result: PassResult, stage: str | None) -> None:
        """After each pass; `stage` is the result's."""


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """Passes in order, and who watches. Raises InternalError, all faults at once, where the order cannot be right."""

    passes: Sequence[Pass]
    observers: Sequence[Observer] = ()

    def __post_init__(self) -> None:
        faults = order_faults(self.passes)
        if faults:
            raise InternalError("the passes stand in the wrong order: " + "; ".join(faults))

    def run(self, program: ExportedProgram, stage: str | None = None) -> PipelineResult:
        """Run all passes on `program`, which is in `stage` (None: not said, so not verified until a pass says it)."""
        for observer in self.observers:
            observer.begin(program, stage)
        steps = []
        for index, step in enumerate(self.passes, 1):
            begun = time.perf_counter()
            result = step.apply(program)
            seconds = time.perf_counter() - begun
            stage = step.stage or stage if result.modified else stage
            for observer in self.observers:
                observer.after(step, result, stage)
            steps.append(Step(index, step.name, result.count, round(seconds, 4), result.notes))
            program = result.program
        return PipelineResult(program, stage, tuple(steps))


def order_faults(passes: Sequence[Pass]) -> list[str]:
    """Where a pass stands before one it must follow, or twice."""
    names = [step.name for step in passes]
    faults = [f"{name} stands in it twice" for name in dict.fromkeys(names) if names.count(name) > 1]
    for index, step in enumerate(passes):
        faults += [f"{step.name} must come after {name}" for name in step.runs_after if name in names[index + 1 :]]
    return faults
