"""Who watches a pipeline: the verifier, and dumps of the program after every pass."""

from __future__ import annotations

import itertools
from pathlib import Path

from torch.export.exported_program import ExportedProgram

from fluxc.errors import StorageError
from fluxc.ir.pass_base import Pass, PassResult
from fluxc.ir.printer import program_text
from fluxc.ir.verifier import verify


class Verify:
    """Checks the program before the first pass and the result of each; raises VerifierError with all problems."""

    def begin(self, program: ExportedProgram, stage: str | None) -> None:
        """Check what goes in, where its stage is known."""
        if stage:
            verify(program, stage)

    def after(self, step: Pass, result: PassResult, stage: str | None) -> None:
        """Check what came out, unless nothing changed."""
        if stage and result.modified:
            verify(result.program, stage, after=step.name)


class Dump:
    """Writes `00.input.txt`, then `01.<pass>.after.txt`, ... into a folder; numbers run on over several pipelines.

    Raises StorageError where the folder cannot be written.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        self._numbers = itertools.count()

    def begin(self, program: ExportedProgram, stage: str | None) -> None:
        """Write what goes in."""
        self._write("input", program)

    def after(self, step: Pass, result: PassResult, stage: str | None) -> None:
        """Write what came out, changed or not."""
        self._write(f"{step.name}.after", result.program)

    def _write(self, name: str, program: ExportedProgram) -> None:
        path = self._folder / f"{next(self._numbers):02}.{name}.txt"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            path.write_text(program_text(program))
        except OSError as error:
            raise StorageError(f"{path} cannot be written: {error.strerror or error}", hint="name a folder") from error
