"""`python -m fluxc.bench.demo model.flux`: before and after, on prompts that calibration has not seen.

Dense is the captured program; every other row is the routed program under other routes. Seconds are one pass over
prompt and answer; `ideal` and `bound` are what the achieved Ω could give at most (DESIGN section 1).
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fluxc.cli.app import run as run_frame
from fluxc.cli.command import command
from fluxc.cli.devices import chosen_device, device_option
from fluxc.cli.screen import Screen
from fluxc.cli.tables import table

if TYPE_CHECKING:
    from rich.table import Table

    from fluxc.bench.demo_rows import Row
    from fluxc.bench.systems import System
    from fluxc.progress import Progress
    from fluxc.runtime.model import FluxModel


@command(
    "demo",
    examples="""
    python -m fluxc.bench.demo smollm2.flux
    python -m fluxc.bench.demo smollm2.flux --prompts 8 -o demo.json
    """,
)
@click.argument("flux", metavar="MODEL.flux", type=click.Path(path_type=Path))
@click.option("--prompts", type=click.IntRange(min=1), default=3, show_default=True, help="Prompts of each kind.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Also write all rows there, as JSON.")
@device_option
def demo(screen: Screen, flux: Path, prompts: int, output: Path | None, device: str | None) -> None:
    """Compare MODEL.flux with dense, static, blind and all-sparse routing on held-out prompts."""
    from fluxc.bench.demo_rows import SUITES, rows
    from fluxc.bench.quality import conditions
    from fluxc.runtime.model import load_flux

    screen.progress().start("checking and loading the model")
    model = load_flux(flux, chosen_device(device))
    found = rows(model, _systems(model, screen.progress()), SUITES, prompts, screen.progress())
    result = {"conditions": conditions(model), "rows": [dataclasses.asdict(row) for row in found]}
    if output:
        _write(output, result)
    for title in dict.fromkeys(row.suite for row in found):
        screen.show(f"[bold]{title}[/]", made_table([row for row in found if row.suite == title]))
    screen.result(result)


def _systems(model: FluxModel, progress: Progress) -> list[System]:
    import torch

    from fluxc.bench.static import best_static
    from fluxc.bench.systems import System, controls

    budget = model.plan.budget
    ours = System("fluxc", torch.tensor(model.plan.bias()), budget)
    _, *blind = controls(len(model.plan.layers))
    return [ours, best_static(model, budget, progress), *blind]


def _write(output: Path, result: dict[str, Any]) -> None:
    from fluxc.atomic import atomic_file

    with atomic_file(output, force=True) as temporary:
        temporary.write_text(json.dumps(result, indent=1))


def made_table(rows: Sequence[Row]) -> Table:
    """One line a system over the prompts of one suite."""
    head = ("system", "exact match", "perplexity", "Ω asked", "Ω", "seconds", "speed-up", "ideal", "bound")
    made = table(*head, numbers=head[1:])
    for line in lines(rows):
        made.add_row(*line)
    return made


def lines(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """The cells of each system, in order of appearance; the first system is dense."""
    systems = {name: [row for row in rows if row.system == name] for name in dict.fromkeys(row.system for row in rows)}
    dense = next(iter(systems.values()))
    return [_line(name, found, dense) for name, found in systems.items()]


def _line(name: str, rows: Sequence[Row], dense: Sequence[Row]) -> tuple[str, ...]:
    from fluxc.runtime.measure import bound, ideal

    seconds, before = _mean([row.seconds for row in rows]), _mean([row.seconds for row in dense])
    inside, ratio = _mean([row.attention for row in dense]), _mean([row.sparse_ratio for row in rows])
    density = _mean([row.density for row in rows])
    asked, exact = rows[0].asked, [float(row.exact) for row in rows if row.exact is not None]
    factors = (before / seconds, ideal(before, inside, ratio, density), bound(before, inside, ratio))
    return (
        name,
        f"{_mean(exact):.2f}" if exact else "",
        f"{math.exp(_mean([row.loss for row in rows])):.3f}",
        "" if asked is None else f"{asked:.2f}",
        f"{ratio:.2f}",
        f"{seconds:.2f}",
        *(f"{factor:.2f}" for factor in factors),
    )


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values)


if __name__ == "__main__":
    sys.exit(run_frame(command=demo, name="python -m fluxc.bench.demo"))
