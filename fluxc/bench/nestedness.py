"""Whether the routes of a smaller budget are, prompt by prompt, a subset of those of a larger one.

One threshold a budget makes them so for equal scores. A layer's score moves a little with the routes of the layers
before it, so a layer may be full at a budget and sparse at a larger one; this counts how often.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from fluxc.bench.systems import plan_name


def nestedness(rows: Sequence[Mapping[str, Any]], budgets: Sequence[float]) -> dict[str, Any]:
    """Pairs (prompt, layer) of one suite that are full at a smaller budget and sparse at a larger one.

    `rows`: one a prompt and system, with `prompt`, `system` and `routes` (a string of 0 and 1). `of`: all pairs;
    `broken`: those broken between any two of the budgets, each counted once; `steps`: those broken between two
    neighbouring budgets.
    """
    ordered = sorted(set(budgets))
    routes = [_routes(rows, budget) for budget in ordered]
    steps = [_broken(smaller, larger) for smaller, larger in itertools.pairwise(routes)]
    named = [
        {"smaller": smaller, "larger": larger, "broken": len(step)}
        for (smaller, larger), step in zip(itertools.pairwise(ordered), steps, strict=True)
    ]
    return {
        "of": sum(map(len, routes[0].values())) if routes else 0,
        # What is full at one budget and sparse at any larger one turns sparse at some step between the two.
        "broken": len(set().union(*steps)),
        "steps": named,
    }


def nestedness_table(suites: Mapping[str, dict[str, Any]]) -> Table:
    """One row a suite and step, and one for all steps of the suite."""
    table = Table(title="full at a smaller budget, sparse at a larger one")
    for column in ("suite", "budgets", "prompts x layers", "of", "share"):
        table.add_column(column, justify="left" if column == "suite" else "right")
    for name, found in suites.items():
        for step in found["steps"]:
            table.add_row(name, f"{step['smaller']:g} < {step['larger']:g}", *_counts(step["broken"], found["of"]))
        table.add_row(name, "any two", *_counts(found["broken"], found["of"]))
    return table


def _routes(rows: Sequence[Mapping[str, Any]], budget: float) -> dict[int, str]:
    name = plan_name(budget)
    return {row["prompt"]: row["routes"] for row in rows if row["system"] == name}


def _broken(smaller: Mapping[int, str], larger: Mapping[int, str]) -> set[tuple[int, int]]:
    return {
        (prompt, layer)
        for prompt, routes in smaller.items()
        for layer, (before, after) in enumerate(zip(routes, larger[prompt], strict=True))
        if before == "1" and after == "0"
    }


def _counts(broken: int, of: int) -> tuple[str, str, str]:
    return str(broken), str(of), f"{broken / of:.4f}" if of else ""
