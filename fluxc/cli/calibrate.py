"""`fluxc calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from fluxc.cli.budgets import budget_options
from fluxc.cli.command import command
from fluxc.cli.screen import Screen
from fluxc.errors import OptionError

if TYPE_CHECKING:
    from fluxc.plan import Plan


@command(
    "calibrate",
    edits=True,
    examples="""
    fluxc calibrate model.flux --budget 0.3
    fluxc calibrate model.flux --sparse-ratio 0.8
    """,
)
@click.argument("flux", metavar="MODEL.flux", type=click.Path(path_type=Path))
@budget_options
def calibrate(screen: Screen, flux: Path, budget: float | None, dry_run: bool) -> None:
    """Give MODEL.flux another budget, without measuring or fitting anything again.

    Only plan.json changes: the biases for every budget were found by `fluxc transform`. To try a budget on one prompt,
    `fluxc run` takes --budget too.
    """
    from fluxc.calibrate import retarget

    if budget is None:
        raise OptionError("say which budget", hint="--budget 0.3, or --sparse-ratio 0.7")
    old, new = retarget.calibrate(flux, budget=budget, dry_run=dry_run)
    screen.show(f"{'would change' if dry_run else 'changed'} {flux} from {_both(old)} to {_both(new)}")
    screen.result({"flux": str(flux), "dry_run": dry_run, "before": old.budget, "after": new.budget})


def _both(plan: Plan) -> str:
    return f"budget {plan.budget:g} (Ω {1 - plan.budget:g})"
