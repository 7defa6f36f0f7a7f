"""The `fluxc` command: one file per command, `app.py` for the group and exit codes, `screen.py` for the output."""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run `fluxc` with `argv` (default: the process's arguments) and return its exit code.

    0: done; 1: a fault of fluxc; 2: the input cannot be used; 130: interrupted.
    """
    from fluxc.cli.app import run

    return run(argv)
