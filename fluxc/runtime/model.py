"""A loaded model.flux directory: prefill under a budget, forced routes, or dense."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from fluxc.errors import OptionError, PlanError
from fluxc.flux_dir import FluxDir, open_flux
from fluxc.ir.graph import runnable
from fluxc.plan import Plan
from fluxc.runtime import crossover
from fluxc.runtime.batch import Batch, Ids, make_batch
from fluxc.runtime.clock import now
from fluxc.runtime.tokenizer import read_tokenizer

Kind = Literal["routed", "captured"]
Routes = Sequence[bool] | Tensor


@dataclasses.dataclass(frozen=True)
class Prefill:
    """One prefill: logits [B,N,V], routes bool[L,B], scores f32[L,B] (None where no router ran), wall-clock seconds."""

    logits: Tensor
    routes: Tensor
    scores: Tensor | None
    seconds: float
    program: Kind

    @property
    def sparse_ratio(self) -> float:
        """Ω: share of the routable layers on SA, mean over the batch."""
        return 1.0 - float(self.routes.double().mean())


class FluxModel:
    """Runs the programs of a model.flux directory, each loaded on first use over the same weights."""

    def __init__(self, flux: FluxDir, device: str = "cpu") -> None:
        self.flux = flux
        self.device = device

    @property
    def plan(self) -> Plan:
        """The calibrated plan."""
        return self.flux.plan

    @property
    def meta(self) -> dict[str, Any]:
        """What capture knew of the source model."""
        return self.flux.meta

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The source's tokenizer, from the directory alone; raises DataError where it has none."""
        return read_tokenizer(self.flux.path / "tokenizer")

    @property
    def has_tokenizer(self) -> bool:
        """Whether the directory holds tokenizer files."""
        return any(name.startswith("tokenizer/") for name in self.flux.manifest.files)

    @functools.cached_property
    def vocabulary(self) -> int:
        """Number of token ids: the last axis of the logits."""
        output: Any = self.captured_program.graph.output_node()
        return int(output.args[0][0].meta["val"].shape[-1])

    @functools.cached_property
    def captured_program(self) -> ExportedProgram:
        """The dense program."""
        return self.flux.load("captured", self.device)

    @functools.cached_property
    def routed_program(self) -> ExportedProgram:
        """The routed program."""
        return self.flux.load("routed", self.device)

    @functools.cached_property
    def captured(self) -> nn.Module:
        """The dense program, runnable."""
        return runnable(self.captured_program)

    @functools.cached_property
    def routed(self) -> nn.Module:
        """The routed program, runnable."""
        return runnable(self.routed_program)

    def crossover(self, budget: float | None = None) -> int:
        """Prompts shorter than this many tokens run dense: measured on this machine, else 2 x (sink + window)."""
        share = self.plan.budget if budget is None else budget
        return crossover.of_plan(self.flux.device_file, self.plan, share, self.device)

    def batch(self, input_ids: Ids, **lengths: Any) -> Batch:
        """The input tensors of some requests; see make_batch."""
        return make_batch(input_ids, context=self.plan.model.context, device=self.device, **lengths)

    @torch.no_grad()
    def prefill(
        self,
        input_ids: Ids,
        *,
        prompt_lens: Sequence[int] | Tensor | None = None,
        seq_lens: Sequence[int] | Tensor | None = None,
        budget: float | None = None,
        routes: Routes | None = None,
        logits_at: Any = None,
        program: Literal["auto", "routed", "captured"] = "auto",
    ) -> Prefill:
        """Run prompts (right padded, every one with routes of its own) and return the logits of `logits_at`.

        `routes` (bool [L] or [L,B]) forces them. "auto" applies the length guard: prompts below the crossover run
        full, and the dense program runs, without routers, where every layer of the batch is full anyway. Raises
        DataError for bad lengths, PlanError for a bad budget or bad routes.
        """
        batch = self.batch(input_ids, prompt_lens=prompt_lens, seq_lens=seq_lens, logits_at=logits_at)
        if program == "captured":
            if routes is not None:
                raise OptionError("the captured program has no routes to force", hint='use program="routed"')
            return self._run_captured(batch)
        bias = self.route_bias(batch, budget, routes, guard=program == "auto")
        return self.run(batch, bias, dense=program == "auto")

    def route_bias(self, batch: Batch, budget: float | None, routes: Routes | None, *, guard: bool) -> Tensor:
        """f32[L,B]: forced routes, else the plan's biases at `budget`, with short prompts full if `guard` is set."""
        if routes is not None:
            return forced_bias(routes, len(self.plan.layers), batch.size).to(self.device)
        bias = self.plan.route_bias(budget, batch.size).to(self.device)
        if guard:
            bias[:, batch.prompt_lens < self.crossover(budget)] = math.inf
        return bias

    def run(self, batch: Batch, bias: Tensor, *, dense: bool) -> Prefill:
        """The routed program under `bias`, or with `dense` the captured one where all of `bias` says full anyway."""
        if dense and bool((bias == math.inf).all()):
            return self._run_captured(batch)
        return self.run_routed(batch, bias)

    @torch.no_grad()
    def run_routed(self, batch: Batch, bias: Tensor) -> Prefill:
        """The routed program under `bias` f32[L,B]."""
        start = now(self.device)
        logits, routes, scores = self.routed(*batch.routed(bias))
        return Prefill(logits, routes, scores, now(self.device) - start, "routed")

    @torch.no_grad()
    def _run_captured(self, batch: Batch) -> Prefill:
        start = now(self.device)
        logits = self.captured(*batch.captured())
        routes = torch.ones(len(self.plan.layers), batch.size, dtype=torch.bool, device=self.device)
        return Prefill(logits, routes, None, now(self.device) - start, "captured")


def forced_bias(routes: Routes, layers: int, batch: int) -> Tensor:
    """f32[L,B] of +inf (full) and -inf (sparse) from bool [L] (for all requests) or [L,B]; raises PlanError."""
    flags = torch.as_tensor(routes, dtype=torch.bool)
    if flags.dim() == 1:
        flags = flags[:, None].expand(-1, batch)
    if tuple(flags.shape) != (layers, batch):
        raise PlanError(f"routes have shape {list(flags.shape)}, not [{layers}, {batch}] (routable layers, requests)")
    return torch.where(flags, math.inf, -math.inf)


def load_flux(path: str | Path, device: str = "cpu", verify_weights: bool = True) -> FluxModel:
    """Open a model.flux directory for running; raises ArchiveError and PlanError as `open_flux` does."""
    return FluxModel(open_flux(path, verify_weights), device)
