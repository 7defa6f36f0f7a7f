"""Tables from the rows of `fluxc.bench.quality`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from fluxc.bench.intervals import mean_interval, paired_interval
from fluxc.data import group_of

Row = dict[str, Any]


def tables(suites: dict[str, list[Row]]) -> list[Table]:
    """One table a suite; text is split into its tasks, mixed into all and its groups."""
    made = []
    for name, rows in suites.items():
        for title, part in _parts(name, rows):
            made.append(_table(title, part))
    return made


def _parts(name: str, rows: list[Row]) -> list[tuple[str, list[Row]]]:
    if name == "text":
        return [(task, [r for r in rows if r["task"] == task]) for task in ("prose", "code")]
    if name == "mixed":
        groups = [
            (f"mixed: {group}", [r for r in rows if group_of(r["task"]) == group])
            for group in ("retrieval", "text", "local")
        ]
        return [("mixed: all", rows), *groups]
    return [(name, rows)]


def summaries(rows: list[Row]) -> list[dict[str, Any]]:
    """One summary a system: Ω, exact match, mean loss, and the paired loss difference to dense with its interval."""
    dense = [row["loss"] for row in rows if row["system"] == "dense"]
    return [_summary(name, [r for r in rows if r["system"] == name], dense) for name in _systems(rows)]


def _summary(name: str, rows: list[Row], dense: list[float]) -> dict[str, Any]:
    losses = [row["loss"] for row in rows]
    asked = [row["exact"] for row in rows if row["exact"] is not None]
    more, low, high = paired_interval(losses, dense)
    return {
        "system": name,
        "prompts": len(rows),
        "sparse_ratio": 1 - _mean([full_share(row) for row in rows]),
        "exact": mean_interval([float(e) for e in asked]) if asked else None,
        "loss": _mean(losses),
        "perplexity_over_dense": [math.exp(more), math.exp(low), math.exp(high)],
        "input_dependent": input_dependent(rows),
    }


def full_share(row: Row) -> float:
    """Share of the routable layers that ran full on one prompt."""
    return row["routes"].count("1") / len(row["routes"])


def input_dependent(rows: Sequence[Row]) -> float:
    """Share of layers that are full on more than 5 % and less than 95 % of the prompts."""
    shares = [_mean([float(row["routes"][layer] == "1") for row in rows]) for layer in range(len(rows[0]["routes"]))]
    return _mean([float(0.05 < share < 0.95) for share in shares])


def _table(title: str, rows: list[Row]) -> Table:
    table = Table(title=title)
    for column in ("system", "Ω", "exact match", "loss", "perplexity / dense", "input-dependent layers"):
        table.add_column(column, justify="left" if column == "system" else "right")
    for item in summaries(rows):
        exact = "" if item["exact"] is None else "{:.3f} [{:.2f}, {:.2f}]".format(*item["exact"])
        ratio = "{:.3f} [{:.3f}, {:.3f}]".format(*item["perplexity_over_dense"])
        share = f"{item['input_dependent']:.2f}"
        table.add_row(item["system"], f"{item['sparse_ratio']:.3f}", exact, f"{item['loss']:.3f}", ratio, share)
    return table


def _systems(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(row["system"] for row in rows))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
