"""How long work tells what it is doing. Library functions take a `Progress` and never print."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives the stages of long work. One stage is open at a time: `start` closes the one before."""

    def start(self, name: str, total: int | None = None) -> None:
        """Open the stage `name` of `total` steps; None where the number of steps is not known."""

    def advance(self, steps: int = 1) -> None:
        """Count steps of the open stage as done."""

    def note(self, text: str) -> None:
        """Say one line worth reading later: a measurement, a decision, a fallback."""


class Silent:
    """Progress that nobody watches: the default of every library function."""

    def start(self, name: str, total: int | None = None) -> None:
        """Nothing."""

    def advance(self, steps: int = 1) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""


SILENT: Progress = Silent()
