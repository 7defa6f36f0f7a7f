"""The Lagrangian (METHOD section 1): loss on the answers, and for each task a price on missing its Ω target.

    max over lambda1, lambda2 >= 0, min over theta:  L_lm + lambda1 * |Ldiff| + lambda2 * Ldiff^2
    Ldiff = E[1 - r] - t

The expectation runs over the layers and over the prompts of a task in a step; tasks count by their prompts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fluxc.train.batches import IGNORED

Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over all processes."""


def answer_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean negative log-likelihood of each prompt's answer, nats, f32[b]; logits [b,N,V], targets i64[b,N]."""
    flat = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
    return flat.view_as(targets).sum(1) / (targets != IGNORED).sum(1)


def divergences(logits: Tensor, dense: Tensor, targets: Tensor) -> Tensor:
    """Mean KL divergence of the routed from the dense distribution over each prompt's answer, nats, f32[b]."""
    taught, known = logits.float().log_softmax(-1), dense.float().log_softmax(-1)
    rows = F.kl_div(taught, known, log_target=True, reduction="none").sum(-1)
    kept = targets != IGNORED
    return (rows * kept).sum(1) / kept.sum(1)


class Multipliers(nn.Module):
    """lambda1 and lambda2 of each task, [T,2], with the tasks' Ω targets [T]. Gradient ascent keeps them >= 0."""

    def __init__(self, targets: Mapping[str, float], start: float, device: str = "cpu") -> None:
        super().__init__()
        self.tasks = tuple(targets)
        self.targets = torch.tensor(list(targets.values()), device=device)
        self.values = nn.Parameter(torch.full((len(targets), 2), start, device=device))

    def index(self, names: list[str]) -> Tensor:
        """Which task each sample has, one-hot f32[b,T]."""
        numbers = torch.tensor([self.tasks.index(name) for name in names], device=self.targets.device)
        return F.one_hot(numbers, len(self.tasks)).float()

    @torch.no_grad()
    def clamp(self) -> None:
        """Back to >= 0 after a step."""
        self.values.clamp_(min=0)


@dataclasses.dataclass
class Seen:
    """Sparse shares of the step's samples so far, by task: sums and counts f32[T], over all processes."""

    sums: Tensor
    counts: Tensor

    @classmethod
    def none(cls, multipliers: Multipliers) -> Seen:
        """Before the first micro-batch."""
        zero = torch.zeros_like(multipliers.targets)
        return cls(zero, zero.clone())

    def omega(self) -> Tensor:
        """Mean sparse share f32[T], nan for a task without samples."""
        return self.sums / self.counts


def penalty(weights: Tensor, tasks: Tensor, multipliers: Multipliers, seen: Seen, batch: int, reduce: Reduce) -> Tensor:
    """This micro-batch's part of the step's penalty; `seen` takes its shares in.

    weights f32[L,b], tasks one-hot f32[b,T], batch: samples of the step. The value of Ldiff comes from all samples seen
    so far in the step, its gradient from these: exact where a step is one micro-batch on each process.
    """
    sums, counts = (1 - weights.mean(0)) @ tasks, tasks.sum(0)
    seen.sums += reduce(sums.detach())
    seen.counts += reduce(counts)
    share = sums / counts.clamp_min(1)
    gap = (seen.omega().nan_to_num() - multipliers.targets) + (share - share.detach())
    price = multipliers.values[:, 0] * gap.abs() + multipliers.values[:, 1] * gap.square()
    return (price * counts).sum() / batch
