"""`fluxc doctor`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape

from fluxc.cli.command import command
from fluxc.cli.screen import Screen
from fluxc.cli.tables import table

if TYPE_CHECKING:
    from rich.table import Table

    from fluxc.doctor import Need, Report


@command(
    "doctor",
    examples="""
    fluxc doctor
    fluxc doctor --json
    """,
)
def doctor(screen: Screen) -> None:
    """Show what this machine can run, and what is missing for each target.

    Lists the installed parts, each target with the command that installs what it lacks, and which kernel serves
    each attention op.
    """
    from fluxc.doctor import examine

    report = examine()
    screen.show(_parts(report), _targets(report), _kernels(report))
    screen.result(report.to_dict())


def _parts(report: Report) -> Table:
    made = table("part", "found", "what, or why not")
    for part in report.components:
        made.add_row(part.name, _mark(part.present), escape(part.detail))
    return made


def _targets(report: Report) -> Table:
    made = table("target", "ready", "what it is for, or what is missing")
    for target in report.targets:
        missing = "\n".join(_lacks(need) for need in target.missing)
        made.add_row(target.name, _mark(target.ready), escape(missing or target.does))
    return made


def _kernels(report: Report) -> Table:
    made = table("op", "on", "served by", "skipped before it")
    for row in report.providers:
        skipped = "\n".join(f"{name}: {reason}" for name, reason in row.skipped.items())
        made.add_row(row.op, row.device, row.provider or "[red]nobody[/red]", escape(skipped))
    return made


def _lacks(need: Need) -> str:
    return f"{need.what} is missing: {need.command}" if need.command else f"{need.what} is missing"


def _mark(good: bool) -> str:
    return "[green]yes[/green]" if good else "[yellow]no[/yellow]"
