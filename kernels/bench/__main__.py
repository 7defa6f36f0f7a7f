"""Command line of the kernel benchmark."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from fluxc.kernels.bench import backward, cases, decode, measure, prefill, routed, router

SUITES = ("prefill", "routed", "decode", "router", "backward")


@click.command()
@click.option("--suite", "suites", multiple=True, default=SUITES, type=click.Choice(SUITES))
@click.option("--out", type=click.Path(path_type=Path), help="Where the raw JSON goes; rewritten after each row.")
@click.option("--flex", "flex_lengths", multiple=True, type=int, help="Lengths to compile FlexAttention for, too.")
@click.option("--longest", default=1 << 30, help="Skip prefill cases above this length.")
@click.option("--variants", is_flag=True, help="Also time our kernels with other tile sizes.")
def main(
    suites: tuple[str, ...], out: Path | None, flex_lengths: tuple[int, ...], longest: int, variants: bool
) -> None:
    """Check and time the kernels on this machine's GPU. A red check gives no number."""
    rows: list[dict[str, Any]] = []
    console = Console(width=132)
    for suite in suites:
        before = len(rows)
        for row in _rows(suite, flex_lengths, longest, variants):
            rows.append({"suite": suite, **row})
            if out:
                out.write_text(json.dumps({"conditions": measure.conditions(), "rows": rows}, indent=1))
        console.print(_table(suite, rows[before:]))


def _rows(suite: str, flex_lengths: tuple[int, ...], longest: int, variants: bool) -> Iterator[dict[str, Any]]:
    if suite == "prefill":
        chosen = [case for case in cases.PREFILL if case.length <= longest]
        yield from prefill.measure(chosen, flex_lengths, variants)
    elif suite == "routed":
        yield from routed.measure()
    elif suite == "decode":
        for shape in (cases.Shape(), cases.SMOLLM2):
            yield from decode.measure(shape, variants)
    elif suite == "router":
        for shape in (cases.Shape(), cases.SMOLLM2):
            yield from router.measure(shape, 8192)
    else:
        yield from backward.measure(variants)


def _table(suite: str, rows: list[dict[str, Any]]) -> Table:
    table = Table("op", "by", "length", "shape", "ms", "TFLOP/s", "TB/s", "of ideal", "error", title=suite)
    for row in rows:
        cells = [row["op"], row["by"], str(row["length"]), row["shape"]]
        keys = ("ms", "tflops", "tbps", "of_ideal", "error")
        table.add_row(*cells, *(f"{row[key]:.4g}" if row.get(key) else "-" for key in keys))
    return table


if __name__ == "__main__":
    main()
