"""What the rows of an evaluation come to: Ω, exact match and perplexity by suite, task and length, with intervals."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from fluxc.bench.intervals import paired_interval
from fluxc.data import group_of

Row = dict[str, Any]
Z = 1.959964
COUNTS_BELOW = 0.2
"""A retrieval cell in which all-sparse reaches this share of dense does not count (METHOD section 4)."""


def summaries(rows: Sequence[Row], shortest: int) -> list[dict[str, Any]]:
    """One entry a suite, scope and system.

    scope: "all", a task, or "task @ length". Ω is a mean over prompts of at least `shortest` tokens; `short` counts
    the others. exact: [mean, low, high], Wilson's 95 % interval; exact_less_dense and perplexity_over_dense: paired
    bootstrap intervals; `counts`: whether the cell says something about retrieval.
    """
    found = []
    for suite in _names(rows, "suite"):
        for scope, part in _scopes([row for row in rows if row["suite"] == suite]):
            found += [{"suite": suite, "scope": scope, **entry} for entry in _systems(part, shortest)]
    return found


def _scopes(rows: list[Row]) -> Iterator[tuple[str, list[Row]]]:
    yield "all", rows
    for task in _names(rows, "task"):
        of_task = [row for row in rows if row["task"] == task]
        yield task, of_task
        lengths = _names(of_task, "length")
        for length in lengths if len(lengths) > 1 else ():
            yield f"{task} @ {length}", [row for row in of_task if row["length"] == length]


def _systems(rows: list[Row], shortest: int) -> list[dict[str, Any]]:
    by_system = {name: [row for row in rows if row["system"] == name] for name in _names(rows, "system")}
    dense = by_system["dense"]
    counts = _counts(dense, by_system.get("all sparse"))
    return [_summary(name, found, dense, shortest) | {"counts": counts} for name, found in by_system.items()]


def _summary(name: str, rows: list[Row], dense: list[Row], shortest: int) -> dict[str, Any]:
    more, low, high = paired_interval([row["loss"] for row in rows], [row["loss"] for row in dense])
    long = [row for row in rows if row["tokens"] >= shortest]
    asked = [(row["exact"], base["exact"]) for row, base in zip(rows, dense, strict=True) if row["exact"] is not None]
    mine, theirs = [float(x) for x, _ in asked], [float(y) for _, y in asked]
    return {
        "system": name,
        "budget": rows[0]["budget"],
        "prompts": len(rows),
        "sparse_ratio": _mean([sparse_ratio(row) for row in long]) if long else None,
        "short": len(rows) - len(long),
        "exact": list(wilson(sum(mine), len(mine))) if mine else None,
        "exact_less_dense": list(paired_interval(mine, theirs)) if mine else None,
        "loss": _mean([row["loss"] for row in rows]),
        "perplexity_over_dense": [math.exp(more), math.exp(low), math.exp(high)],
        "input_dependent": input_dependent(rows),
    }


def _counts(dense: list[Row], sparse: list[Row] | None) -> bool:
    """False for a retrieval cell that dense fails, or all-sparse does not."""
    if sparse is None or not all(group_of(row["task"]) == "retrieval" for row in dense):
        return True
    top, floor = (sum(bool(row["exact"]) for row in rows) for rows in (dense, sparse))
    return top > 0 and floor < COUNTS_BELOW * top


def sparse_ratio(row: Row) -> float:
    """Ω of one prompt: 0 where nothing is routed."""
    return row["routes"].count("0") / len(row["routes"]) if row["routes"] else 0.0


def input_dependent(rows: Sequence[Row]) -> float:
    """Share of layers that are full on more than 5 % and less than 95 % of the prompts; 0 where nothing is routed."""
    layers = len(rows[0]["routes"])
    if not layers:
        return 0.0
    shares = [_mean([float(row["routes"][layer] == "1") for row in rows]) for layer in range(layers)]
    return _mean([float(0.05 < share < 0.95) for share in shares])


def wilson(hits: float, count: int) -> tuple[float, float, float]:
    """A share of `count` and its 95 % score interval: (share, low, high)."""
    share, z = hits / count, Z * Z
    middle = (share + z / (2 * count)) / (1 + z / count)
    half = Z * math.sqrt(share * (1 - share) / count + z / (4 * count * count)) / (1 + z / count)
    # At 0 and at all of them the interval ends there exactly, which rounding would miss.
    return share, (max(0.0, middle - half) if hits else 0.0), (min(1.0, middle + half) if hits < count else 1.0)


def _names(rows: Sequence[Row], key: str) -> list[Any]:
    return list(dict.fromkeys(row[key] for row in rows))


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
