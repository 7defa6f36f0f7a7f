"""Cheaper full layers: whether block attention may take the place of dense attention wherever a route is full."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.export.exported_program import ExportedProgram

from fluxc.calibrate.kinds import with_settings
from fluxc.calibrate.needs import routable_layers
from fluxc.calibrate.verify import Summary, run_all, summarise
from fluxc.data import TokenizedPrompt
from fluxc.ir.graph import argument, calls, runnable
from fluxc.ir.sparse import SparseSettings
from fluxc.passes.apply_plan import ApplyPlan, settings_of

ALLOWED = 0.005
"""Largest rise of the answers' perplexity, and largest share of exact answers lost, at which blocks are kept."""


@dataclasses.dataclass(frozen=True)
class FullKind:
    """All routes full on held-out prompts: by dense attention, and by scored blocks."""

    dense: Summary
    block: Summary

    @property
    def rise(self) -> float:
        """By how much the answers' perplexity rises, as a share of dense."""
        return math.expm1(self.block.loss - self.dense.loss)

    @property
    def kept(self) -> bool:
        """Whether neither perplexity nor exact answers lose more than ALLOWED; losses that are no numbers never do."""
        lost = 0.0
        if self.dense.exact:
            lost = 1 - (self.block.exact or 0.0) / self.dense.exact
        return self.rise <= ALLOWED and lost <= ALLOWED

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON and the screen."""
        return {
            "kept": self.kept,
            "rise": self.rise,
            "allowed": ALLOWED,
            "prompts": self.dense.prompts,
            "dense_loss": self.dense.loss,
            "loss": self.block.loss,
            "dense_exact": self.dense.exact,
            "exact": self.block.exact,
        }


def compare_full(
    program: ExportedProgram,
    settings: SparseSettings,
    prompts: Sequence[TokenizedPrompt],
    device: str,
    advance: Callable[[], None] = lambda: None,
) -> FullKind:
    """Every prompt with all routes full, dense and with `settings`, whose full kind is block."""
    layers = routable_layers(program)
    bias = torch.full((len(layers),), math.inf, device=device)
    blocks = with_settings(program, layers, settings)
    found = [run_all(runnable(each), prompts, bias, advance) for each in (with_dense_full(program), blocks)]
    return FullKind(*(summarise(outcomes, prompts) for outcomes in found))


def with_dense_full(program: ExportedProgram) -> ExportedProgram:
    """The program with all keys in full layers, whatever its full kind."""
    changed: dict[int, SparseSettings] = {}
    for node in calls(program, torch.ops.fluxc.routed_attention):
        settings = settings_of(node)
        if settings.full_kind != "dense":
            dense = dataclasses.replace(settings, full_kind="dense", block=0, stride=0, threshold=0.0)
            changed[argument(node, "layer")] = dense
    return ApplyPlan(changed).apply(program).program
