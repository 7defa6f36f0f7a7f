"""What a command shows and where: results on stdout, progress and errors on stderr, JSON alone on stdout when asked."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from fluxc.cli.bars import Bars
    from fluxc.progress import Progress

WIDTH = 120
"""Columns of a table where there is no terminal to ask."""


class Screen:
    """Output of one run of the command line.

    `kept_in` is the folder in which an interrupted command leaves its measurements, or what `kept_noun` calls them:
    commands set it before long work.
    """

    def __init__(self) -> None:
        self.json = False
        self.quiet = False
        self.debug = False
        self.kept_in: Path | None = None
        self.kept_noun = "measurement"
        self.stdout = sys.stdout
        self._bars: Bars | None = None

    def show(self, *items: RenderableType) -> None:
        """Print text or tables for people: on stdout, nothing under `--json` or `--quiet`."""
        if self.json or self.quiet:
            return
        self.close()
        console = self.console()
        for item in items:
            console.print(item, highlight=False, soft_wrap=isinstance(item, str))

    def answer(self, text: str) -> None:
        """Print text that is the command's very result, also under `--quiet`; markup in it means nothing."""
        if not self.json:
            self.close()
            click.echo(text, file=self.stdout)

    def result(self, value: dict[str, Any]) -> None:
        """The machine-readable result: one JSON object on stdout under `--json`, else nothing."""
        if self.json:
            click.echo(json.dumps(_finite(value), indent=1, allow_nan=False), file=self.stdout)

    def error(self, text: str, label: str = "error: ") -> None:
        """One line on stderr; progress bars are closed before."""
        self.close()
        click.echo(label + " ".join(text.split()), err=True)

    def interrupted(self) -> None:
        """One line on stderr: what was kept and how to resume."""
        self.error(self.kept() or "nothing was written", label="interrupted: ")

    def kept(self) -> str:
        """What a command that stops now leaves behind, and how to go on; "" for nothing."""
        count = len(list(self.kept_in.iterdir())) if self.kept_in and self.kept_in.is_dir() else 0
        kept = f"{self.kept_noun} is" if count == 1 else f"{self.kept_noun}s are"
        return f"{count} {kept} kept in {self.kept_in}; the same command resumes" if count else ""

    def progress(self) -> Progress:
        """Bars on stderr for a library function, silent under `--quiet`."""
        from fluxc.cli.bars import Bars
        from fluxc.progress import SILENT

        if self.quiet:
            return SILENT
        self._bars = self._bars or Bars()
        return self._bars

    def close(self) -> None:
        """Stop the progress bars; finished stages stay on screen."""
        if self._bars:
            self._bars.stop()
            self._bars = None

    def console(self) -> Console:
        """A rich console on stdout."""
        from rich.console import Console

        console = Console(file=self.stdout)
        return console if console.is_terminal else Console(file=self.stdout, width=WIDTH)


def _finite(value: Any) -> Any:
    """The same plain value with null for NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
