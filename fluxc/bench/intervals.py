"""Bootstrap intervals of means and of paired differences."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

DRAWS = 2000


def mean_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """Mean and its 95 % bootstrap interval: (mean, low, high); nan for no values."""
    data = torch.tensor(list(values), dtype=torch.float64)
    if not data.numel():
        return (float("nan"),) * 3
    means = _resampled(data, seed)
    return float(data.mean()), float(means.quantile(0.025)), float(means.quantile(0.975))


def paired_interval(a: Sequence[float], b: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """Mean of a - b over pairs and its 95 % bootstrap interval."""
    return mean_interval([x - y for x, y in zip(a, b, strict=True)], seed)


def _resampled(data: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(0, data.numel(), (DRAWS, data.numel()), generator=generator)
    return data[picks].mean(1)
