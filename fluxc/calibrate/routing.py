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

FOLDS = 5
"""Parts into which prompts are dealt where routers score prompts that they were not fitted to."""


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
    samples = _samples(measurements, needs, tasks, pooled, pooled_tasks)
    options = FitOptions(seed=seed)
    everything = torch.ones(len(samples.fold), dtype=torch.bool)
    routers = samples.fit(everything, spec, options)
    return Routing(routers, _curve(samples, spec, options, measurements, tasks, pooled, pooled_tasks))


@dataclasses.dataclass(frozen=True)
class _Samples:
    """What routers are fitted to, one row a prompt and point: features [N,L,D], targets [N,L], the task, the fold."""

    features: Tensor
    targets: Tensor
    tasks: list[str]
    fold: Tensor

    def fit(self, chosen: Tensor, spec: RouterSpec, options: FitOptions) -> list[dict[str, Tensor]]:
        """Routers fitted to the chosen rows, every task counting the same."""
        weights = balanced_weights([task for task, use in zip(self.tasks, chosen.tolist(), strict=True) if use])
        return fit_routers(self.features[chosen], self.targets[chosen], weights, spec, options)


def _samples(
    measurements: Sequence[Measurement],
    needs: Tensor,
    tasks: list[str],
    pooled: Tensor,
    pooled_tasks: Sequence[str],
) -> _Samples:
    """All measured prompts at all points, and the further prompts whose task was measured."""
    means = task_targets(needs, tasks)
    known = [i for i, task in enumerate(pooled_tasks) if task in means and task != USER_TASK]
    points = len(measurements[0].points)
    at_points = [torch.stack([m.pooled[p] for m in measurements]) for p in range(points)]
    extra = [means[pooled_tasks[i]][None] for i in known]
    return _Samples(
        features=torch.cat([*at_points, pooled[known]]),
        targets=torch.cat([prompt_targets(needs, tasks).repeat(points, 1), *extra]),
        tasks=tasks * points + [pooled_tasks[i] for i in known],
        fold=torch.cat([_folds(len(tasks)).repeat(points), _folds(len(pooled_tasks))[known]]),
    )


def _folds(count: int) -> Tensor:
    return torch.arange(count) % FOLDS


def _curve(
    samples: _Samples,
    spec: RouterSpec,
    options: FitOptions,
    measurements: Sequence[Measurement],
    tasks: list[str],
    pooled: Tensor,
    pooled_tasks: Sequence[str],
) -> tuple[CurvePoint, ...]:
    """Biases of the budget grid: minus the threshold, the same in every layer.

    Thresholds are found on scores of routers that were fitted without the prompt: on prompts they know, routers are
    surer than on new ones, and small budgets would be missed.
    """
    points = measurements[0].points
    at_points = torch.stack([torch.stack([m.pooled[p] for m in measurements]) for p in range(len(points))])
    measured = torch.empty(at_points.shape[:3])
    further = torch.empty(pooled.shape[:2])
    for fold in range(FOLDS):
        rest = samples.fold != fold
        routers = samples.fit(rest if bool(rest.any()) else ~rest, spec, options)
        mine, others = _folds(len(tasks)) == fold, _folds(len(pooled_tasks)) == fold
        measured[:, mine] = torch.stack([scores_of(routers, at[mine]) for at in at_points])
        further[others] = scores_of(routers, pooled[others])
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
