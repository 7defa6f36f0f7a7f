"""Router weights that others published: read by shape, whatever their names, and put into a calibration."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.export import ExportedProgram

from fluxc.calibrate.calibration import Calibrated, achieved
from fluxc.calibrate.full_kind import with_dense_full
from fluxc.calibrate.needs import routable_layers
from fluxc.calibrate.prompts import PromptSets
from fluxc.calibrate.verify import verify
from fluxc.errors import DataError, PlanError
from fluxc.ir.graph import runnable
from fluxc.passes.place import Place
from fluxc.progress import Progress
from fluxc.router import RouterSpec, layer_state, router_name, with_routers
from fluxc.train.curve import POINTS, refit_curve

_LAYER = re.compile(r"(?:^|\.)(\d+)\.")
_BIAS = "bias"


def read_routers(path: str | Path) -> dict[str, Tensor]:
    """The routers of a safetensors file under fluxc's names (`routers.<layer>.encoder.0.weight`, ...), fp32.

    Published files name their linear layers in many ways; METHOD section 1 gives them five different shapes, so that
    shapes tell which is which. The layer is the first number in a name, and a bias stands beside its weight. Raises
    DataError for a file that is not readable, or holds a layer that is no whole router.
    """
    by_layer: dict[int, dict[str, Tensor]] = {}
    for name, tensor in _load(Path(path)).items():
        found = _LAYER.search(name)
        if not found:
            raise DataError(f"{path}: the name {name!r} holds no layer number", hint="these are no Layer Routers")
        by_layer.setdefault(int(found.group(1)), {})[name] = tensor.float()
    if not by_layer:
        raise DataError(f"{path} holds no tensors", hint="give a safetensors file of Layer Routers")
    return {
        router_name(layer) + name: tensor
        for layer, tensors in sorted(by_layer.items())
        for name, tensor in _router(tensors, f"{path}, layer {layer}").items()
    }


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as cause:
        raise DataError(f"{path} cannot be read as safetensors: {cause}", hint="pickles are refused") from cause


def _router(tensors: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """One router by LayerRouter state-dict name."""
    weights = {name: tensor for name, tensor in tensors.items() if tensor.dim() == 2}
    width = next((tensor.shape[1] for tensor in weights.values() if tensor.shape[0] == 8 * tensor.shape[1]), 0)
    shapes = {tuple(tensor.shape): name for name, tensor in weights.items()}
    state: dict[str, Tensor] = {}
    for linear, (inputs, outputs) in RouterSpec(width or 1).linears().items():
        name = shapes.get((outputs, inputs), "")
        bias = tensors.get(name.rpartition(".")[0] + "." + _BIAS)
        if not name or bias is None or bias.shape != (outputs,):
            raise DataError(
                f"{where}: there is no linear layer of {inputs} to {outputs} with a bias",
                hint="a Layer Router maps d to 8d, 2d, 4d, d and 2",
            )
        state |= {f"{linear}.weight": weights[name], f"{linear}.{_BIAS}": bias}
    if len(state) != len(tensors):
        raise DataError(f"{where}: {len(tensors)} tensors where a router has {len(state)}")
    return state


def check_routers(routed: ExportedProgram, state: dict[str, Tensor]) -> None:
    """Raise PlanError unless these are routers of all routable layers of the program, and of no others."""
    with_routers(routed, state)
    missing = [layer for layer in routable_layers(routed) if not layer_state(state, layer)]
    if missing:
        raise PlanError(f"there is no router for layer {missing[0]}", hint="these routers belong to another model")


def with_published(
    found: Calibrated, state: dict[str, Tensor], origin: str, sets: PromptSets, progress: Progress, device: str = "cpu"
) -> Calibrated:
    """A calibration with its routers replaced by these: kinds and sizes stay, the biases of every budget are new.

    Thresholds are found on the calibration's prompts and verified on its held-out ones.
    """
    program = with_routers(found.program, state)
    placed = program if device == "cpu" else Place(device).apply(program).program
    module, layers, prompts = runnable(placed), len(found.plan.layers), [*sets.measured, *sets.pooled]
    progress.start("finding thresholds", len(POINTS) * len(prompts))
    curve = refit_curve(module, layers, prompts, device, progress.advance)
    plan = dataclasses.replace(found.plan, curve=curve, achieved={})
    dense = runnable(with_dense_full(placed))
    progress.start("verifying on held-out prompts", 2 * len(sets.heldout))
    verified = verify(module, sets.heldout, torch.tensor(plan.bias()).to(device), progress.advance, dense)
    shown = {f"{plan.budget:g}": achieved(verified)}
    plan = dataclasses.replace(plan, achieved=shown, calibration={**plan.calibration, "routers": origin})
    report = {**found.report, "verified": verified.to_dict(), "routers": origin}
    return dataclasses.replace(found, program=program, plan=plan, report=report)
