"""The routings a calibrated model is compared with, all as values of `route_bias` on the same program."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.export.exported_program import ExportedProgram

from fluxc.calibrate.leave_one_out import leave_one_out
from fluxc.calibrate.runner import forced
from fluxc.calibrate.targets import mean_need, means_by
from fluxc.data import TokenizedPrompt
from fluxc.errors import DataError
from fluxc.flux_dir import FluxDir


@dataclasses.dataclass(frozen=True)
class System:
    """A named routing. bias fp32 [L]; `budget` is what was asked of it, nan where nothing was."""

    name: str
    bias: Tensor
    budget: float = math.nan


def plan_name(budget: float) -> str:
    """What the plan at a budget is called in rows and tables."""
    return f"fluxc {budget:g}"


def controls(layers: int) -> list[System]:
    """Dense, all-sparse and every second layer full."""
    return [
        System("dense", forced([True] * layers), 1.0),
        System("every second layer", forced([index % 2 == 0 for index in range(layers)]), 0.5),
        System("all sparse", forced([False] * layers), 0.0),
    ]


def top_layers(ranking: Tensor, count: int) -> Tensor:
    """The bias [L] that runs the `count` layers of largest ranking [L] full."""
    chosen = set(ranking.argsort(descending=True)[:count].tolist())
    return forced([index in chosen for index in range(ranking.numel())])


def first_order_ranking(flux: FluxDir) -> Tensor:
    """Mean need of each layer on the calibration prompts, every task counting the same; fp32 [L]."""
    path = flux.path / "measurements" / "calibration.json"
    if not path.exists():
        raise DataError(f"{flux.path} holds no measurements", hint="transform the model again")
    stored = json.loads(path.read_text())
    return mean_need(torch.tensor(stored["needs"]), stored["tasks"])


def leave_one_out_ranking(
    program: ExportedProgram,
    prompts: Sequence[TokenizedPrompt],
    layers: int,
    device: str,
    advance: Callable[[], None] = lambda: None,
) -> Tensor:
    """Mean rise of the answer loss when a layer alone goes sparse, every task counting the same; fp32 [L]."""
    rises = torch.stack([leave_one_out(program, prompt, [True] * layers, advance, device=device) for prompt in prompts])
    return torch.stack(list(means_by(rises, [p.task for p in prompts]).values())).mean(0)
