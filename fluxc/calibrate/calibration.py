"""One calibration from beginning to end: measure, choose the kind, fit, find the biases, verify."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export.exported_program import ExportedProgram

from fluxc.artifact import versions
from fluxc.calibrate.full_kind import FullKind, compare_full, with_dense_full
from fluxc.calibrate.kinds import LAST, Candidate, candidates, compare, compared_prompts, with_settings
from fluxc.calibrate.leave_one_out import leave_one_out, rank_correlation
from fluxc.calibrate.needs import Measurement, measure_needs, pool_queries, routable_layers, to_json
from fluxc.calibrate.options import EFFORTS, CalibrateOptions, Effort
from fluxc.calibrate.prompts import PromptSets
from fluxc.calibrate.routing import Routing, fit_routing
from fluxc.calibrate.runner import forced
from fluxc.calibrate.targets import best_layers, need_matrix
from fluxc.calibrate.verify import Verification, verify
from fluxc.capture.result import Capture
from fluxc.data import corpus
from fluxc.ir.graph import argument, calls, runnable
from fluxc.ir.pipeline import Observer, Pipeline
from fluxc.ir.sparse import SparseSettings
from fluxc.model_info import ModelInfo
from fluxc.passes.apply_plan import ApplyPlan
from fluxc.passes.place import Place
from fluxc.plan import LayerPlan, Plan
from fluxc.progress import Progress
from fluxc.router import RouterSpec, router_name, with_routers
from fluxc.weight_files import weights_digest

COMPARED_AT = (0.5, 1.0)
"""Shares of the budget at which sparse kinds are compared."""


@dataclasses.dataclass(frozen=True)
class Calibrated:
    """A routed program with fitted routers, its plan, the report, and the raw measurements (both plain values)."""

    program: ExportedProgram
    plan: Plan
    report: dict[str, Any]
    measurements: list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Everything one calibration works on. `routed` has untrained routers; `cache` keeps measurements for a resume."""

    captured: Capture
    routed: ExportedProgram
    options: CalibrateOptions
    sets: PromptSets
    cache: Path
    progress: Progress
    device: str = "cpu"
    observers: Sequence[Observer] = ()

    def run(self) -> Calibrated:
        """Measure, choose, fit, verify."""
        placed = self.routed if self.device == "cpu" else Place(self.device).apply(self.routed).program
        program = with_settings(placed, self.layers, self._asked())
        measurements = self._measure(program)
        needs = need_matrix(measurements)
        correction, correlation = self._leave_out(program, measurements, needs)
        choice = self._choose(program, needs)
        settings, full = self._full_kind(placed, choice[0].settings)
        program = with_settings(placed, self.layers, settings)
        routing = self._fit(program, measurements, correction)
        verified = self._verify(self._with(routing, program), routing)
        apply = ApplyPlan(dict.fromkeys(self.layers, settings))
        program = self._with(routing, Pipeline((apply,), self.observers).run(self.routed, "routed").program)
        plan = self._plan(settings, routing, verified)
        report = self._report(plan, verified, choice, correlation, needs)
        report |= {"full_kind": full.to_dict()} if full else {}
        return Calibrated(program, plan, report, [to_json(m) for m in measurements])

    @functools.cached_property
    def layers(self) -> list[int]:
        """The `layer` attribute of each routable attention, in graph order."""
        return routable_layers(self.routed)

    @property
    def _effort(self) -> Effort:
        return EFFORTS[self.options.effort]

    @functools.cached_property
    def _weights(self) -> str:
        return weights_digest(self.captured.program.state_dict)

    def _asked(self) -> SparseSettings:
        """Settings while needs are measured: the kind asked for, streaming for `auto`."""
        kind = "streaming" if self.options.sparse_kind == "auto" else self.options.sparse_kind
        return self.options.settings(self.captured.meta["context"], kind, LAST)

    def _measure(self, program: ExportedProgram) -> list[Measurement]:
        prompts = self.sets.measured
        self.progress.start("measuring needs", len(prompts))
        salt = f"{self._weights} {self._asked()} {self.options.pool}"
        return measure_needs(
            program,
            prompts,
            self._effort.gradients,
            cache=self.cache,
            salt=salt,
            device=self.device,
            advance=self.progress.advance,
        )

    def _leave_out(
        self, program: ExportedProgram, measurements: list[Measurement], needs: Tensor
    ) -> tuple[Tensor, float | None]:
        """Needs corrected by leave-one-out on the prompts that lose most, and its rank correlation with first order."""
        correction = torch.full_like(needs, torch.nan)
        costliest = needs.sum(1).argsort(descending=True)[: self._effort.left_out].tolist()
        if not costliest:
            return correction, None
        self.progress.start("leaving layers out", len(costliest) * len(self.layers))
        base, found = [True] * len(self.layers), []
        for index in costliest:
            rises = leave_one_out(program, self.sets.measured[index], base, self.progress.advance, self.device)
            found.append(rank_correlation(rises, measurements[index].need))
            correction[index] = (needs[index] + rises.clamp_min(0)) / 2
        correlation = sum(found) / len(found)
        self.progress.note(f"rank correlation of first-order needs with leave-one-out: {correlation:.2f}")
        return correction, correlation

    def _choose(self, program: ExportedProgram, needs: Tensor) -> list[Candidate]:
        asked = self._asked()
        prompts = compared_prompts(self.sets.measured, self._effort.compared)
        if self.options.sparse_kind != "auto" or not prompts:
            return [Candidate(asked, None)]
        length = max(len(p) for p in prompts)
        settings = candidates(asked.sink, asked.window, length, asked.decode_full)
        # At the budget the layers that stay full hide most of the difference; a plan serves smaller budgets too.
        tasks = [p.task for p in self.sets.measured]
        counts = [round(share * self.options.budget * len(self.layers)) for share in COMPARED_AT]
        biases = [forced(best_layers(needs, tasks, count)).to(self.device) for count in counts]
        self.progress.start("comparing sparse kinds", len(settings) * len(biases) * len(prompts))
        found = compare(program, self.layers, settings, biases, prompts, self.progress.advance)
        self.progress.note("; ".join(f"{c.settings.kind} window {c.settings.window}: loss {c.loss:.3f}" for c in found))
        return found

    def _full_kind(self, program: ExportedProgram, chosen: SparseSettings) -> tuple[SparseSettings, FullKind | None]:
        """The chosen settings with full layers by blocks, where asked for and where they lose next to nothing."""
        if self.options.full_kind == "dense":
            return chosen, None
        settings, prompts = self.options.with_full_blocks(chosen), self.sets.heldout
        self.progress.start("comparing full layers by blocks", 2 * len(prompts))
        found = compare_full(program, settings, prompts, self.device, self.progress.advance)
        if not found.kept:
            self.progress.note(f"full layers stay dense: blocks cost {found.rise:+.2%} perplexity")
        return (settings if found.kept else chosen), found

    def _fit(self, program: ExportedProgram, measurements: list[Measurement], correction: Tensor) -> Routing:
        self.progress.start("reading queries", len(self.sets.pooled))
        pooled = (
            pool_queries(program, self.sets.pooled, self.device, self.progress.advance) if self.sets.pooled else None
        )
        tasks = [p.task for p in self.sets.pooled]
        return fit_routing(measurements, pooled, tasks, self._spec(), correction, self.options.seed)

    def _spec(self) -> RouterSpec:
        node = calls(self.routed, torch.ops.fluxc.router_pool)[0]
        return RouterSpec(int(node.args[0].meta["val"].shape[-1]), argument(node, "pool"))  # type: ignore[union-attr]

    def _with(self, routing: Routing, program: ExportedProgram) -> ExportedProgram:
        device = next(iter(program.state_dict.values())).device
        state = {
            router_name(layer) + name: tensor.to(device)
            for layer, router in zip(self.layers, routing.routers, strict=True)
            for name, tensor in router.items()
        }
        return with_routers(program, state)

    def _verify(self, program: ExportedProgram, routing: Routing) -> Verification:
        self.progress.start("verifying on held-out prompts", 2 * len(self.sets.heldout))
        bias = torch.tensor(self._bare_plan(SparseSettings(), routing).bias()).to(self.device)
        dense = runnable(with_dense_full(program))
        return verify(runnable(program), self.sets.heldout, bias, self.progress.advance, dense)

    def _bare_plan(self, settings: SparseSettings, routing: Routing, **more: Any) -> Plan:
        info = ModelInfo.of(self.captured.program, self.captured.meta, self._weights)
        sizes = {name: value for name, value in settings.to_dict().items() if name != "decode_full"}
        layers = tuple(LayerPlan(layer, **sizes) for layer in self.layers)
        options = self.options
        return Plan(info, options.pool, options.decode, layers, routing.curve, options.budget, **more)  # type: ignore[arg-type]

    def _plan(self, settings: SparseSettings, routing: Routing, verified: Verification) -> Plan:
        shown = {f"{self.options.budget:g}": achieved(verified)}
        return self._bare_plan(settings, routing, achieved=shown, calibration=self._origin())

    def _origin(self) -> dict[str, Any]:
        sets = self.sets
        return {
            "seed": self.options.seed,
            "effort": self.options.effort,
            "gives_up": self._effort.gives_up,
            "prompts": {"measured": len(sets.measured), "pooled": len(sets.pooled), "heldout": len(sets.heldout)},
            "origin": sets.origin,
            "corpus": corpus.hash(),
            "options": self.options.digest(),
            "versions": versions(),
        }

    def _report(
        self,
        plan: Plan,
        verified: Verification,
        choice: list[Candidate],
        correlation: float | None,
        needs: Tensor,
    ) -> dict[str, Any]:
        slots = {c.settings.kind: c.settings.sink + c.settings.window for c in choice}
        return {
            "options": self.options.to_dict(),
            "asked": {"budget": plan.budget, "sparse_ratio": 1 - plan.budget},
            "verified": verified.to_dict(),
            "kinds": [{**c.settings.to_dict(), "loss": c.loss, "kv_slots": slots[c.settings.kind]} for c in choice],
            "rank_correlation": correlation,
            "needs": needs.tolist(),
            "tasks": [p.task for p in self.sets.measured],
            "calibration": plan.calibration,
        }


def achieved(verified: Verification) -> dict[str, Any]:
    """What a plan remembers of a verification at its budget."""
    total = verified.routed["all"]
    return {
        "prompts": total.prompts,
        "full_share": total.full_share,
        "sparse_ratio": total.sparse_ratio,
        "exact": total.exact,
        "dense_exact": verified.dense["all"].exact,
        "loss": total.loss,
        "dense_loss": verified.dense["all"].loss,
        "tasks": {name: s.full_share for name, s in verified.routed.items() if name != "all"},
        "input_dependent": verified.input_dependent,
    }
