"""Progress on stderr: bars on a terminal; elsewhere a line for each finished stage, and one now and then."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

EVERY = 60.0
"""Seconds between two lines of a long stage where there is no terminal."""


class Bars:
    """A `fluxc.progress.Progress` for people."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._live: Progress | None = None
        self._task: Any = None
        self._name = ""
        self._begun = self._said = 0.0
        self._done = 0
        self._total: int | None = None

    def start(self, name: str, total: int | None = None) -> None:
        """See Progress.start."""
        self._finish()
        self._name, self._begun = name, time.monotonic()
        self._done, self._total, self._said = 0, total, self._begun
        if self._console.is_terminal:
            self._live = self._live or _new_bars(self._console)
            self._task = self._live.add_task(name, total=total)
            self._live.start()

    def advance(self, steps: int = 1) -> None:
        """See Progress.advance."""
        self._done += steps
        if self._live and self._task is not None:
            self._live.advance(self._task, steps)
        elif time.monotonic() - self._said > EVERY:
            self._said = time.monotonic()
            spent = self._said - self._begun
            rest = f", about {spent / self._done * (self._total - self._done):.0f} s left" if self._total else ""
            self._line(f"{self._name}: {self._done} of {self._total or 'unknown'} ({spent:.0f} s{rest})")

    def note(self, text: str) -> None:
        """See Progress.note."""
        self._line(f"  {text}")

    def stop(self) -> None:
        """Close the open stage and the display."""
        self._finish()
        if self._live:
            self._live.stop()
            self._live = None

    def _finish(self) -> None:
        if self._live and self._task is not None:
            self._live.remove_task(self._task)
            self._task = None
        if self._name:
            self._line(f"{self._name} ({time.monotonic() - self._begun:.1f} s)")
            self._name = ""

    def _line(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def _new_bars(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, transient=True)
