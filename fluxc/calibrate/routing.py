"""From measurements to routers and biases: the part of calibration that never runs the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from fluxc.calibrate.budget import GRID, monotone, scores_at, threshold
from fluxc.calibrate.fit import FitOptions, fit_routers, scores_of
from fluxc.calibrate.needs import Measurement
from fluxc.calibrate.targets import balanced_weights, need_matrix, prompt_targets, task_targets
from fluxc.data import USER_TASK
from fluxc.plan import CurvePoint
from fluxc.router import RouterSpec

SAFETY = 0.01
"""Taken off a budget when its threshold is sought, because held-out prompts scatter around the calibration ones."""


@dataclasses.dataclass(frozen=True)
class Routing:
    """Fitted routers (one state dict a layer) and the biases of each budget of the grid."""

    routers: list[dict[str, Tensor]]
    curve: tuple[CurvePoint, ...]


def fit_routing(
    measurements: Sequence[Measurement],
    pooled: Tensor | None,
    pooled_tasks: Sequence[str],
    spec: RouterSpec,
    correction: Tensor | None = None,
    seed: int = 0,
) -> Routing:
    """Routers and biases from measured prompts and further pooled queries [M,L,D] of prompts of known tasks.

    `correction` fp32 [N,L] replaces completed needs where they were measured more exactly (nan: not measured).
    Prompts whose task was not measured only take part in finding the thresholds.
    """
    tasks = [m.task for m in measurements]
    needs = need_matrix(measurements)
    if correction is not None:
        needs = torch.where(correction.isnan(), needs, correction)
    if pooled is None:
        pooled = measurements[0].pooled[:0]
    routers = _fit(measurements, needs, tasks, pooled, pooled_tasks, spec, seed)
    return Routing(routers, _curve(routers, measurements, tasks, pooled, pooled_tasks))


def _fit(
    measurements: Sequence[Measurement],
    needs: Tensor,
    tasks: list[str],
    pooled: Tensor,
    pooled_tasks: Sequence[str],
    spec: RouterSpec,
    seed: int,
) -> list[dict[str, Tensor]]:
    means = task_targets(needs, tasks)
    known = [i for i, task in enumerate(pooled_tasks) if task in means and task != USER_TASK]
    points = len(measurements[0].points)
    at_points = [torch.stack([m.pooled[p] for m in measurements]) for p in range(points)]
    features = torch.cat([*at_points, pooled[known]])
    extra = [means[pooled_tasks[i]] for i in known]
    targets = torch.cat([prompt_targets(needs, tasks).repeat(points, 1), *(row[None] for row in extra)])
    weights = balanced_weights(tasks * points + [pooled_tasks[i] for i in known])
    return fit_routers(features, targets, weights, spec, FitOptions(seed=seed))


def _curve(
    routers: list[dict[str, Tensor]],
    measurements: Sequence[Measurement],
    tasks: list[str],
    pooled: Tensor,
    pooled_tasks: Sequence[str],
) -> tuple[CurvePoint, ...]:
    """Biases of the budget grid: minus the threshold, the same in every layer."""
    points = measurements[0].points
    measured = torch.stack(
        [scores_of(routers, torch.stack([m.pooled[p] for m in measurements])) for p in range(len(points))]
    )
    further = scores_of(routers, pooled)
    # Measured and further prompts have the same say: the first are few, but as long as real ones.
    weights = torch.cat([_share(tasks), _share(pooled_tasks)])
    thresholds = []
    for budget in GRID:
        scores = torch.cat([scores_at(measured, points, budget), further])
        thresholds.append(threshold(scores, weights, max(budget - SAFETY, 0.0)))
    layers = measured.shape[2]
    return tuple(
        CurvePoint(budget, (-value,) * layers) for budget, value in zip(GRID, monotone(thresholds), strict=True)
    )


def _share(tasks: Sequence[str]) -> Tensor:
    """Weights that sum to 1 (or nothing), every task counting the same."""
    return balanced_weights(tasks) / len(tasks) if tasks else torch.zeros(0)
