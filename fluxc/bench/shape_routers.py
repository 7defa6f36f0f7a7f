"""What routers cost a random model: beside dense, and beside the same routes without a choice."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import torch

from fluxc.bench.shape_model import RandomModel
from fluxc.bench.shape_prefill import DENSE, Prefills, text_of
from fluxc.bench.shape_rows import Row, rounds
from fluxc.engine.programs import Prefilled
from fluxc.errors import InternalError
from fluxc.runtime.clock import Timing


def chosen_against_forced(
    model: RandomModel, length: int, ratio: float, *, repeats: int, left: Callable[[], float]
) -> Row:
    """Routes as the routers choose them beside the same routes forced.

    The routers are not calibrated: one bias in all layers, at the scores' own quantile, makes them choose about Ω.
    """
    prefills, layers = Prefills(model, length), len(model.plan.layers)
    scores = scores_of(model, prefills.tokens)
    bias = [float(-np.quantile(scores, ratio))] * layers
    routes = prefills.run(bias).routes
    biases = {"chosen": bias, "forced": model.bias(routes)}
    taken = rounds(list(biases), lambda name: prefills.run(biases[name]), repeats=repeats, left=left, warm=["forced"])
    times = {name: Timing.of([took.seconds for took in runs]) for name, runs in taken.items()}
    same = all(took.routes == routes for runs in taken.values() for took in runs)
    row: Row = {"length": length, "routes": text_of(routes), "sparse_ratio": 1 - sum(routes) / layers, "same": same}
    row |= {name: dataclasses.asdict(timing) for name, timing in times.items()}
    return row | {"chosen_over_forced": times["chosen"].median / times["forced"].median}


def router_overhead(model: RandomModel, length: int, *, repeats: int, left: Callable[[], float]) -> Row:
    """All-full routed less dense, as a share of dense: what routers and routing cost."""
    prefills, layers = Prefills(model, length), len(model.plan.layers)
    full = model.bias([True] * layers)
    taken = rounds(
        [DENSE, "full"],
        lambda name: prefills.run(full, dense=name == DENSE).seconds,
        repeats=repeats,
        left=left,
        warm=[DENSE, "full"],
    )
    times = {name: Timing.of(runs) for name, runs in taken.items()}
    row: Row = {"length": length, **{name: dataclasses.asdict(timing) for name, timing in times.items()}}
    return row | {
        "overhead": times["full"].median / times[DENSE].median - 1,
        "overhead_of_fastest": times["full"].fastest / times[DENSE].fastest - 1,
    }


@torch.no_grad()
def scores_of(model: RandomModel, tokens: list[int]) -> np.ndarray:
    """The routers' scores f32[L] for a prompt."""
    device = model.programs.device
    ids, end = torch.tensor([tokens], device=device), torch.tensor([len(tokens)], device=device)
    bias = torch.zeros(len(model.plan.layers), 1, device=device)
    for item in model.programs.prefill(ids, end, bias, (end - 1)[:, None]):
        if isinstance(item, Prefilled):
            return item.scores.float().cpu().numpy()
        del item
    raise InternalError("a prefill ended without its last item")
