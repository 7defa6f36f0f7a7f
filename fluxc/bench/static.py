"""The best static choice: the same layers full for every prompt, chosen on calibration prompts alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fluxc.bench.systems import System, first_order_ranking, leave_one_out_ranking, top_layers
from fluxc.calibrate.options import CalibrateOptions
from fluxc.calibrate.prompts import generated_prompts
from fluxc.calibrate.runner import run_prompt
from fluxc.data import TokenizedPrompt
from fluxc.progress import SILENT, Progress
from fluxc.runtime.model import FluxModel

LEFT_OUT = 1
"""Calibration prompts on which every layer is left out."""

COMPARED = 4
"""Calibration prompts on which the two rankings are compared."""


def best_static(model: FluxModel, budget: float, progress: Progress = SILENT) -> System:
    """The better of first-order and leave-one-out, as many layers full as `budget` allows (rounded up).

    Better is the lower mean answer loss on the calibration prompts, which are made again from the plan's seed. Raises
    DataError where the folder holds no measurements.
    """
    layers = len(model.plan.layers)
    count = math.ceil(budget * layers)
    prompts = calibration_prompts(model)[:COMPARED]
    progress.start("ranking layers", LEFT_OUT * layers)
    left_out = leave_one_out_ranking(
        model.routed_program, prompts[:LEFT_OUT], layers, model.device, lambda: progress.advance()
    )
    found = {"first-order": first_order_ranking(model.flux), "leave-one-out": left_out}
    biases = {name: top_layers(ranking, count) for name, ranking in found.items()}
    progress.start("choosing the best static layers", len(biases) * len(prompts))
    losses = {name: _mean_loss(model, bias, prompts, progress) for name, bias in biases.items()}
    name = min(losses, key=losses.__getitem__)
    return System(f"best static ({name})", biases[name], budget)


def calibration_prompts(model: FluxModel) -> list[TokenizedPrompt]:
    """The built-in prompts whose needs a calibration of this model with its seed and effort measures."""
    origin, layer = model.plan.calibration, model.plan.layers[0]
    options = CalibrateOptions(seed=origin["seed"], effort=origin["effort"], sink=layer.sink, window=layer.window)
    return generated_prompts(options, model.tokenizer, model.plan.model.context).measured


def _mean_loss(model: FluxModel, bias: Tensor, prompts: list[TokenizedPrompt], progress: Progress) -> float:
    losses = []
    for prompt in prompts:
        losses.append(run_prompt(model.routed, prompt, bias.to(model.device)).loss)
        progress.advance()
    return float(torch.tensor(losses).mean())
