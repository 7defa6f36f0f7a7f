"""AdamW over the routers, gradient ascent over the multipliers, and one schedule for both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.optimization import get_cosine_schedule_with_warmup

from fluxc.train.objective import Multipliers
from fluxc.train.options import TrainOptions

BETAS = (0.9, 0.95)
MULTIPLIERS = "multipliers"
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


class Optimizer:
    """AdamW in three groups: router matrices with weight decay, their biases without, multipliers ascending."""

    def __init__(self, routers: Mapping[str, nn.Parameter], multipliers: Multipliers, options: TrainOptions) -> None:
        self._named = {**routers, MULTIPLIERS: multipliers.values}
        self._options = options
        matrices = [p for p in routers.values() if p.dim() > 1]
        biases = [p for p in routers.values() if p.dim() == 1]
        lr, ascent = options.router_lr, options.multiplier_lr
        groups: list[dict[str, Any]] = [
            {"params": matrices, "lr": lr, "initial_lr": lr, "weight_decay": options.weight_decay},
            {"params": biases, "lr": lr, "initial_lr": lr, "weight_decay": 0.0},
            {
                "params": [multipliers.values],
                "lr": ascent,
                "initial_lr": ascent,
                "weight_decay": 0.0,
                "maximize": True,
            },
        ]
        self.adamw = torch.optim.AdamW(groups, betas=BETAS)
        self._schedule = self._schedule_from(0)

    @property
    def lr(self) -> float:
        """The routers' learning rate in the step to come."""
        return float(self.adamw.param_groups[0]["lr"])

    def step(self) -> None:
        """Update everything from its gradient, which is gone after it."""
        self.adamw.step()
        self._schedule.step()
        self.adamw.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """Moments by parameter name; empty before the first step."""
        held = self.adamw.state
        return {
            f"{name}/{moment}": held[parameter][moment].detach().cpu()
            for name, parameter in self._named.items()
            if parameter in held
            for moment in _MOMENTS
        }

    def restore(self, state: Mapping[str, Tensor], step: int) -> None:
        """Go on after `step` steps with the moments `state()` gave then."""
        for name, parameter in self._named.items():
            if f"{name}/step" in state:
                device = parameter.device
                moments = {moment: state[f"{name}/{moment}"].clone() for moment in _MOMENTS}
                self.adamw.state[parameter] = {
                    moment: value if moment == "step" else value.to(device) for moment, value in moments.items()
                }
        self._schedule = self._schedule_from(step)

    def _schedule_from(self, step: int) -> Any:
        steps = self._options.steps
        return get_cosine_schedule_with_warmup(
            self.adamw, round(self._options.warmup * steps), steps, last_epoch=step - 1 if step else -1
        )
