"""`fluxc bench`: measurements, checked before they are timed."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fluxc.cli.command import command
from fluxc.cli.screen import Screen
from fluxc.cli.tables import table

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = {
    "ms": "ms",
    "tflops": "TFLOP/s",
    "tbps": "TB/s",
    "speedup": "x dense",
    "of_ideal": "of ideal",
    "of_dense": "of dense",
    "host_us": "host us",
    "error": "error",
}


@command(
    "bench",
    examples="""
    fluxc bench kernels
    fluxc bench kernels --suite decode --length 8192 -o decode.json
    """,
)
@click.argument("what", type=click.Choice(["kernels"]))
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Default: cuda where there is a GPU.")
@click.option("--suite", "suites", multiple=True, help="One of the device's suites; again for more. Default: all.")
@click.option("--length", "lengths", multiple=True, type=click.IntRange(1), help="Tokens; again for more.")
@click.option("--flex", is_flag=True, help="Also compile FlexAttention (GPU, minutes).")
@click.option("--variants", is_flag=True, help="Also time our kernels with other tile sizes (GPU).")
@click.option("--rounds", default=7, type=click.IntRange(1), help="Times each contender runs (CPU).")
@click.option("--threads", default=0, help="Torch threads; 0 leaves torch's choice (CPU).")
@click.option("--clock", default="wall", type=click.Choice(["wall", "cpu"]), help="cpu: this process only (CPU).")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Raw JSON, rewritten after each row.")
def bench(screen: Screen, what: str, device: str | None, output: Path | None, **options: Any) -> None:
    """Measure WHAT against what you would use instead.

    kernels: every op against SDPA and others, by device.

    Every contender is first compared with a reference; one that is off, or refuses a case, is listed without a time.
    """
    from fluxc.kernels.bench.suites import BenchOptions, conditions, run

    asked = BenchOptions(**options)
    where = device or _device()
    found: dict[str, Any] = {"conditions": conditions(where, asked), "rows": []}
    for row in run(where, asked):
        found["rows"].append(row)
        if output:
            output.write_text(json.dumps(found, indent=1) + "\n")
    screen.show(*_tables(found["rows"]))
    screen.result(found)


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _tables(rows: Iterable[dict[str, Any]]) -> list[Table]:
    suites: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        suites.setdefault(row["suite"], []).append(row)
    return [_table(found) for found in suites.values()]


def _table(rows: list[dict[str, Any]]) -> Table:
    shown = [name for name in COLUMNS if any(row.get(name) is not None for row in rows)]
    made = table("op", "by", "length", "shape", *(COLUMNS[name] for name in shown))
    for row in rows:
        cells = ("-" if row.get(name) is None else f"{row[name]:.4g}" for name in shown)
        made.add_row(row["op"], row["by"], str(row["length"]), row["shape"], *cells)
    return made
