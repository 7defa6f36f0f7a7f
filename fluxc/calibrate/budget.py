"""From scores to biases: one threshold a budget, found on the calibration prompts.

All layers share the threshold, so a budget goes to the layers and prompts that need it most, and the routes of a
smaller budget are a subset of those of a larger one for the same scores.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

GRID = tuple(round(0.05 * step, 2) for step in range(1, 20))
"""Budgets for which a plan stores biases; budgets between them are interpolated."""


def scores_at(scores: Tensor, points: Sequence[float], budget: float) -> Tensor:
    """Scores [N,L] as they are when a share `budget` of the layers runs full.

    scores [P,N,L] were taken with a share points[p] of SA in every layer; scores move a little with the routes of the
    layers before, and this follows them by linear interpolation.
    """
    share = 1.0 - budget
    order = sorted(range(len(points)), key=lambda p: points[p])
    below = max((p for p in order if points[p] <= share), key=lambda p: points[p], default=order[0])
    above = min((p for p in order if points[p] >= share), key=lambda p: points[p], default=order[-1])
    gap = points[above] - points[below]
    blend = (share - points[below]) / gap if gap else 0.0
    return torch.lerp(scores[below], scores[above], blend)


def threshold(scores: Tensor, weights: Tensor, budget: float) -> float:
    """The score above which a layer runs full so that the weighted mean full share is at most `budget`.

    scores [N,L], weights [N].
    """
    share = (weights / weights.sum())[:, None].expand_as(scores) / scores.shape[1]
    order = scores.flatten().argsort(descending=True)
    ranked, used = scores.flatten()[order], share.flatten()[order].cumsum(0)
    count = int((used <= budget + 1e-6).sum())
    if count == 0:
        return float(ranked[0]) + 1.0
    if count == ranked.numel():
        return float(ranked[-1]) - 1.0
    return float((ranked[count - 1] + ranked[count]) / 2)


def monotone(thresholds: Sequence[float]) -> list[float]:
    """Thresholds made non-increasing along growing budgets, so that every bias grows with the budget."""
    best: list[float] = []
    for value in thresholds:
        best.append(min(value, best[-1]) if best else value)
    return best
