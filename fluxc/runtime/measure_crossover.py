"""Finds the length from which SA pays on this machine, by running the programs at growing lengths."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fluxc.plan import default_crossover
from fluxc.progress import SILENT, Progress
from fluxc.runtime import crossover
from fluxc.runtime.clock import Timing, interleaved, seconds_of
from fluxc.runtime.crossover import Lengths
from fluxc.runtime.measure import random_ids
from fluxc.runtime.model import FluxModel, forced_bias

STEP = 1.4
"""Each length is this much longer than the one before."""


def measure_crossover(
    model: FluxModel, *, budget: float | None = None, repeats: int = 3, seed: int = 0, progress: Progress = SILENT
) -> Lengths:
    """Time dense, all-full and all-sparse runs at growing lengths, and write them to `device.json`.

    Starts at the keys a sparse row sees and ends where SA at `budget` paid at two lengths in a row, or at the context.
    """
    share = 1 - (model.plan.budget if budget is None else budget)
    shortest = default_crossover(model.plan) // 2
    lengths = grid(shortest, model.plan.model.context or 16 * shortest)
    progress.start("crossover", None)
    columns: list[tuple[int, float, float, float]] = []
    for length in lengths:
        columns.append((length, *_times(model, length, repeats, seed)))
        progress.note(f"{length} tokens: dense {columns[-1][1]:.3f} s, all sparse {columns[-1][3]:.3f} s")
        found = Lengths(*map(tuple, zip(*columns, strict=True)))
        if len(columns) > 1 and all(found.pays(at, share) for at in (-1, -2)):
            break
    crossover.write(model.flux.device_file, crossover.key(model.plan, model.device), found)
    return found


def grid(shortest: int, longest: int) -> list[int]:
    """Lengths from `shortest` by steps of STEP; the last one is `longest`."""
    lengths = [min(shortest, longest)]
    while lengths[-1] < longest:
        lengths.append(min(longest, max(lengths[-1] + 1, round(lengths[-1] * STEP))))
    return lengths


def _times(model: FluxModel, length: int, repeats: int, seed: int) -> tuple[float, float, float]:
    """Median seconds of the dense, the all-full and the all-sparse run of one prompt."""
    batch = model.batch(random_ids(model, length, seed))
    layers = len(model.plan.layers)

    def routed(full: bool) -> Callable[[], float]:
        bias = forced_bias([full] * layers, layers, 1).to(model.device)
        return lambda: model.run_routed(batch, bias).seconds

    @torch.no_grad()
    def dense() -> float:
        return seconds_of(lambda: model.captured(*batch.captured()), model.device)

    taken = interleaved({"dense": dense, "full": routed(True), "sparse": routed(False)}, repeats)
    return tuple(Timing.of(taken[name]).median for name in ("dense", "full", "sparse"))  # type: ignore[return-value]
