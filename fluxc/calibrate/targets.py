"""From raw measurements to the needs the routers are fitted to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fluxc.calibrate.needs import Measurement
from fluxc.data import TEXT, USER_TASK, group_of

FLOOR = 1e-3
"""Nats of mean answer loss added to every need: differences below it are noise of first-order estimates."""

GROUP_SHARE = 0.75
"""Weight of the mean over a group of tasks against the task's own mean, which rests on few prompts."""

TEXT_SHARE = 0.3
"""How far the total need of a text is drawn to the largest one, in logarithms.

The loss of a continuation is a mean over hundreds of tokens, of which few need far context; that of an answer is a mean
over the few that do. Taken as they are, texts would get next to nothing until every retrieval layer is full.
"""

PROMPT_SHARE = 0.5
"""Weight of a prompt's own need where tasks are unknown, and there is no mean of its kind to lean on."""


def completed(measurement: Measurement) -> Tensor:
    """The prompt's needs fp32 [L], scaled so that they add up to no more than going all-sparse really costs.

    Along the path from dense to all-sparse the needs add up to the loss difference (completeness of integrated
    gradients); what a prompt's positive needs claim beyond that is noise. Prompts that lose nothing get none.
    """
    positive = measurement.need.clamp_min(0)
    cost = max(measurement.losses[-1] - measurement.losses[0], 0.0)
    total = float(positive.sum())
    return positive * min(1.0, cost / total) if total > 0 else positive


def need_matrix(measurements: Sequence[Measurement]) -> Tensor:
    """Completed needs of all prompts, fp32 [N,L]."""
    return torch.stack([completed(m) for m in measurements])


def means_by(needs: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """Mean need of each layer over the prompts of each name; values fp32 [L]."""
    return {
        name: needs[[index for index, other in enumerate(names) if other == name]].mean(0)
        for name in sorted(set(names))
    }


def task_targets(needs: Tensor, tasks: Sequence[str]) -> dict[str, Tensor]:
    """The need to expect of each task: its mean, drawn to the mean of its group, and raised for texts; fp32 [L]."""
    own, groups = means_by(needs, tasks), means_by(needs, [group_of(task) for task in tasks])
    found = {task: torch.lerp(own[task], groups[group_of(task)], GROUP_SHARE) + FLOOR for task in own}
    largest = max(float(need.sum()) for need in found.values())
    raised = {task: (largest / float(found[task].sum())) ** TEXT_SHARE for task in found if task in TEXT}
    return {task: need * raised.get(task, 1.0) for task, need in found.items()}


def prompt_targets(needs: Tensor, tasks: Sequence[str]) -> Tensor:
    """What the routers are fitted to on measured prompts, fp32 [N,L]."""
    targets = task_targets(needs, tasks)
    rows = [
        torch.lerp(targets[task], need + FLOOR, PROMPT_SHARE) if task == USER_TASK else targets[task]
        for task, need in zip(tasks, needs, strict=True)
    ]
    return torch.stack(rows)


def balanced_weights(tasks: Sequence[str]) -> Tensor:
    """Weights fp32 [N] that give every task the same total, and sum to N."""
    counts = {task: list(tasks).count(task) for task in tasks}
    weights = torch.tensor([1.0 / counts[task] for task in tasks])
    return weights * len(tasks) / weights.sum()


def mean_need(needs: Tensor, tasks: Sequence[str]) -> Tensor:
    """Mean need of each layer, every task counting the same, fp32 [L]."""
    return torch.stack(list(means_by(needs, tasks).values())).mean(0)


def best_layers(needs: Tensor, tasks: Sequence[str], count: int) -> list[bool]:
    """The static choice by first order: FA in the `count` layers of largest mean need, SA elsewhere. bool [L]."""
    chosen = set(mean_need(needs, tasks).argsort(descending=True)[:count].tolist())
    return [layer in chosen for layer in range(needs.shape[1])]
