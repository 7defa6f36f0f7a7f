"""The routed program as it is exported: in another dtype, on another device, with pinned layers folded."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch.export.exported_program import ExportedProgram

from fluxc import kernels
from fluxc.errors import OptionError, PlanError
from fluxc.flux_dir import FluxDir
from fluxc.ir.layers import attention_nodes
from fluxc.ir.nodes import argument, is_call
from fluxc.passes.fold_pins import FoldPins
from fluxc.passes.set_dtype import SetDtype
from fluxc.plan import Plan


@dataclasses.dataclass
class Prepared:
    """A routed program, the routes of its folded layers, and the tokens and requests an engine of it takes (0: any)."""

    program: ExportedProgram
    pins: Mapping[int, str]
    max_length: int = 0
    batch: int = 0

    def take(self) -> ExportedProgram:
        """The program, which is no longer held here: who takes it can free its weights."""
        program = self.program
        del self.program
        return program


def prepare(
    flux: FluxDir,
    *,
    dtype: str | None = None,
    device: str | None = None,
    pin: bool = False,
    max_length: int | None = None,
    batch: int | None = None,
) -> Prepared:
    """Load the routed program of `flux` and change it.

    Raises OptionError for a dtype, device or size that cannot be, and for `pin` where the plan pins no layer;
    CaptureError for casts that were never classed.
    """
    pins = {layer.layer: layer.pin for layer in flux.plan.layers if layer.pin} if pin else {}
    if pin and not pins:
        raise OptionError("--pin folds the layers that the plan pins, and this plan pins none")
    _check_sizes(max_length, batch, flux.plan.model.context)
    program = flux.load("routed", device or "cpu")
    if dtype is not None:
        program = SetDtype(dtype).apply(program).program
    if pins:
        program = FoldPins(pins).apply(program).program
    return Prepared(program, pins, max_length or 0, batch or 0)


def budgets(plan: Plan, pins: Mapping[int, str]) -> list[float]:
    """The smallest and the largest share of full layers that an engine with these folded layers can have."""
    kinds = Counter(pins.values())
    count = len(plan.layers)
    return [kinds["full"] / count, 1 - kinds["sparse"] / count]


def check_budget(plan: Plan, pins: Mapping[int, str], where: Any) -> None:
    """Raise PlanError where the plan's budget is outside what the folded layers leave open."""
    low, high = budgets(plan, pins)
    if pins and not low <= plan.budget <= high:
        raise PlanError(
            f"budget {plan.budget:g}: {len(pins)} folded layers of {where} leave {low:g} to {high:g}",
            hint="export without --pin",
        )


def forms(program: ExportedProgram, pins: Mapping[int, str]) -> list[str]:
    """What becomes of the attentions, one line for each kind, for people to read."""
    kernels.register()
    found = Counter(_form(node, pins) for node in attention_nodes(program.graph))
    return [f"{count} x {form}" for form, count in found.items()]


def _form(node: torch.fx.Node, pins: Mapping[int, str]) -> str:
    if not is_call(node, torch.ops.fluxc.routed_attention):
        window = argument(node, "window")
        return f"attention with its own window of {window}: as it is" if window else "attention without router: full"
    layer = argument(node, "layer")
    kind = f"{argument(node, 'kind')} {argument(node, 'sink')} + {argument(node, 'window')}"
    return f"pinned {pins[layer]}: no conditional" if layer in pins else f"conditional: full, or {kind}"


def _check_sizes(max_length: int | None, batch: int | None, context: int) -> None:
    for name, value in (("max-length", max_length), ("batch", batch)):
        if value is not None and value < 1:
            raise OptionError(f"--{name} {value} is not 1 or more")
    if max_length and context and max_length > context:
        raise OptionError(f"--max-length {max_length} is above the model's context of {context} tokens")
