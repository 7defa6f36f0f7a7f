"""Command line of the kernel benchmark."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table

from fluxc.kernels.bench import cases, measure, prefill


@click.command()
@click.option("--out", type=click.Path(path_type=Path), help="Where the raw JSON goes.")
@click.option("--flex/--no-flex", default=True, help="Also compile and time FlexAttention.")
@click.option("--longest", default=1 << 30, help="Skip cases above this length.")
def main(out: Path | None, flex: bool, longest: int) -> None:
    """Check and time the prefill kernels on this machine's GPU."""
    chosen = tuple(case for case in cases.PREFILL if case.length <= longest)
    rows = []
    for row in prefill.measure(chosen, torch.bfloat16, flex):
        rows.append(row)
        if out:
            out.write_text(json.dumps({"conditions": measure.conditions(), "rows": rows}, indent=1))
    Console(width=120).print(_table(rows))


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table("op", "by", "length", "shape", "ms", "TFLOP/s", "of ideal", "error")
    for row in rows:
        cells = [row["op"], row["by"], str(row["length"]), row["shape"]]
        cells += [f"{row[key]:.3g}" if row.get(key) else "-" for key in ("ms", "tflops", "of_ideal", "error")]
        table.add_row(*cells)
    return table


if __name__ == "__main__":
    main()
