"""New biases for new routers: scores on prompts they were not trained on, then one threshold for each budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fluxc.calibrate.budget import GRID, monotone, scores_at, threshold
from fluxc.calibrate.routing import SAFETY
from fluxc.calibrate.runner import run_prompt
from fluxc.calibrate.targets import balanced_weights
from fluxc.data import TokenizedPrompt
from fluxc.plan import CurvePoint

POINTS = (0.0, 1.0)
"""Shares of SA at which scores are taken: all layers full, all sparse."""


def refit_curve(
    module: nn.Module,
    layers: int,
    prompts: Sequence[TokenizedPrompt],
    device: str = "cpu",
    advance: Callable[[], None] = lambda: None,
) -> tuple[CurvePoint, ...]:
    """The biases of every budget of the grid for a runnable routed program's routers; tasks count the same."""
    scores = prompt_scores(module, layers, prompts, device, advance)
    weights = balanced_weights([prompt.task for prompt in prompts])
    found = [threshold(scores_at(scores, POINTS, budget), weights, max(budget - SAFETY, 0.0)) for budget in GRID]
    return tuple(CurvePoint(budget, (-value,) * layers) for budget, value in zip(GRID, monotone(found), strict=True))


def prompt_scores(
    module: nn.Module,
    layers: int,
    prompts: Sequence[TokenizedPrompt],
    device: str = "cpu",
    advance: Callable[[], None] = lambda: None,
) -> Tensor:
    """Scores fp32 [P,N,L] of the routers at each of POINTS."""
    rows = []
    for share in POINTS:
        bias = torch.full((layers,), -math.inf if share else math.inf, device=device)
        for prompt in prompts:
            rows.append(run_prompt(module, prompt, bias).scores)
            advance()
    return torch.stack(rows).view(len(POINTS), len(prompts), layers)
