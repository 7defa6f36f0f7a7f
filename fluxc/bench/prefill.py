"""`python -m fluxc.bench.prefill model.flux`: prefill time against dense at several lengths, and the crossover.

At each length three things run in turn, medians are taken: dense (the captured program), routes forced to the asked Ω,
and what `prefill` serves (routes as the routers choose; dense below the crossover). Beside every speed-up stand bound
and ideal at the achieved Ω (DESIGN section 1); attention time is measured inside the dense runs.
"""

from __future__ import annotations

import json
import sys
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

LENGTHS = (64, 256, 1024, 2048, 4096, 8192)


@command(
    "prefill",
    examples="""
    python -m fluxc.bench.prefill smollm2.flux
    python -m fluxc.bench.prefill smollm2.flux --length 8192 --sparse-ratio 0.6 -o prefill.json
    """,
)
@click.argument("flux", metavar="MODEL.flux", type=click.Path(path_type=Path))
@click.option("--length", "lengths", multiple=True, type=click.IntRange(min=1), help=f"Default: {LENGTHS}.")
@click.option("--sparse-ratio", type=click.FloatRange(0, 1), help="Forced Ω.  [default: the plan's]")
@click.option("--repeats", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--crossover/--no-crossover", default=True, help="Measure the crossover first.  [default: yes]")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Also write everything there, as JSON.")
@device_option
def prefill(
    screen: Screen,
    flux: Path,
    lengths: tuple[int, ...],
    sparse_ratio: float | None,
    repeats: int,
    crossover: bool,
    output: Path | None,
    device: str | None,
) -> None:
    """Time prefill of MODEL.flux against dense."""
    from fluxc.bench.quality import conditions
    from fluxc.runtime.measure import measure_prefill
    from fluxc.runtime.measure_crossover import measure_crossover
    from fluxc.runtime.model import load_flux

    model = load_flux(flux, chosen_device(device))
    if crossover:
        measure_crossover(model, repeats=repeats, progress=screen.progress())
    found = []
    for length in lengths or LENGTHS:
        screen.progress().note(f"{length} tokens")
        timed = measure_prefill(
            model, length, sparse_ratio=sparse_ratio, guard=True, repeats=repeats, progress=screen.progress()
        )
        found.append(timed.to_dict())
    result = {"conditions": conditions(model), "crossover": model.crossover(), "lengths": found}
    if output:
        _write(output, result)
    screen.show(_table(found), f"crossover at budget {model.plan.budget:g}: {result['crossover']} tokens")
    screen.result(result)


def _table(found: list[dict[str, Any]]) -> Table:
    head = ("tokens", "dense s", "attention", "routes", "Ω", "seconds", "speed-up", "ideal", "bound", "of ideal")
    made = table(*head, numbers=tuple(name for name in head if name != "routes"))
    for length in found:
        dense = length["dense"]["median"]
        share = f"{length['attention']['median'] / dense:.0%}"
        for index, run in enumerate(length["routed"]):
            first = (str(length["length"]), f"{dense:.3f}", share) if not index else ("", "", "")
            numbers = (run["speedup"], run["ideal"], run["bound"], run["of_ideal"])
            made.add_row(
                *first,
                run["name"],
                f"{run['sparse_ratio']:.2f}",
                f"{run['seconds']['median']:.3f}",
                *(f"{number:.3f}" for number in numbers),
            )
    return made


def _write(path: Path, result: dict[str, Any]) -> None:
    from fluxc.atomic import atomic_file

    with atomic_file(path, force=True) as temporary:
        temporary.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    sys.exit(run_frame(command=prefill, name="python -m fluxc.bench.prefill"))
