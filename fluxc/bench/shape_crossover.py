"""From which length SA pays a random model, and that what is served is nowhere slower than dense."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from fluxc.bench.shape_model import RandomModel
from fluxc.bench.shape_prefill import DENSE, Prefills
from fluxc.bench.shape_rows import Row, rounds
from fluxc.runtime.clock import Timing
from fluxc.runtime.crossover import Lengths
from fluxc.runtime.measure import spread_routes

SHORT = 4096
"""Prompts up to this many tokens take milliseconds, and are run more often."""


def sweep(model: RandomModel, lengths: Sequence[int], ratio: float, *, repeats: int, left: Callable[[], float]) -> Row:
    """Dense, all full and all sparse at each length; the crossover of Ω; then what is served beside dense.

    Served is what the engine runs behind its guard: the dense program below the crossover, else routes forced to Ω.
    """
    found = [(length, *times) for length in lengths if (times := _times(model, length, repeats, left))]
    known = Lengths(*map(tuple, zip(*found, strict=True)))
    crossover = known.crossover(ratio)
    served = [row for length in known.lengths if (row := _served(model, length, ratio, crossover, repeats, left))]
    return {
        "sparse_ratio": ratio,
        "lengths": dataclasses.asdict(known),
        "crossover": crossover,
        "served": served,
        "worst": max((row["over_dense"] for row in served), default=None),
    }


def _times(
    model: RandomModel, length: int, repeats: int, left: Callable[[], float]
) -> tuple[float, float, float] | None:
    """Median seconds of dense, all full and all sparse; None where no time was left."""
    layers = len(model.plan.layers)
    runs = {DENSE: [True] * layers, "full": [True] * layers, "sparse": [False] * layers}
    taken = _timed(model, length, runs, repeats, left)
    return (taken[DENSE].median, taken["full"].median, taken["sparse"].median) if len(taken) == len(runs) else None


def _served(
    model: RandomModel, length: int, ratio: float, crossover: int, repeats: int, left: Callable[[], float]
) -> Row | None:
    """What is served at one length, beside dense; where that is dense itself, it is timed as another run."""
    layers = len(model.plan.layers)
    routes = spread_routes(layers, ratio) if length >= crossover else [True] * layers
    name = "routed" if length >= crossover else "dense again"
    taken = _timed(model, length, {DENSE: [True] * layers, name: routes}, repeats, left)
    if len(taken) < 2:
        return None
    times = {"dense": dataclasses.asdict(taken[DENSE]), "seconds": dataclasses.asdict(taken[name])}
    return {"length": length, "runs": name, **times, "over_dense": taken[name].median / taken[DENSE].median - 1}


def _timed(
    model: RandomModel, length: int, routes: dict[str, list[bool]], repeats: int, left: Callable[[], float]
) -> dict[str, Timing]:
    prefills = Prefills(model, length)
    biases = {name: model.bias(flags) for name, flags in routes.items()}
    taken = rounds(
        list(biases),
        lambda name: prefills.run(biases[name], dense=name.startswith(DENSE)).seconds,
        repeats=repeats * 3 if length <= SHORT else repeats,
        left=left,
        warm=list(biases),
    )
    return {name: Timing.of(runs) for name, runs in taken.items()}
