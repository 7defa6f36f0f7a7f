"""What can be evaluated: a model.flux folder, an engine directory, or a model without routes.

All score a tokenized prompt under several routings at once; a model without routes has the one routing [0].
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fluxc.calibrate.options import CalibrateOptions
from fluxc.calibrate.runner import Outcome, answer_loss, run_biases
from fluxc.data import TokenizedPrompt
from fluxc.engine.engine import Engine
from fluxc.engine.whole_prefill import whole_prefill
from fluxc.errors import DataError, OptionError
from fluxc.evaluate.suites import Sizes
from fluxc.options import canonical_digest
from fluxc.plan import Plan
from fluxc.progress import SILENT, Progress
from fluxc.runtime import crossover
from fluxc.runtime.model import FluxModel, load_flux
from fluxc.runtime.tokenizer import read_tokenizer


class Subject(Protocol):
    """A model under evaluation. `layers`: routable ones, 0 where nothing is routed; `digest` names everything that its
    scores depend on besides the prompt and the routing."""

    name: str
    layers: int
    digest: str
    device: str
    sizes: Sizes

    @property
    def plan(self) -> Plan | None:
        """The plan, None where nothing is routed."""

    @property
    def tokenizer(self) -> Any:
        """A transformers tokenizer."""

    def outcomes(self, prompt: TokenizedPrompt, biases: Tensor) -> list[Outcome]:
        """The prompt under each routing; biases fp32 [L,N]."""

    def prefill(self, ids: Sequence[int], prompt_len: int, rows: Sequence[int], bias: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [N,V] of N rows of one sequence, and its routes bool[L]; bias fp32 [L]."""

    def engine(self, decode: str) -> Engine:
        """An engine whose sparse layers keep what `decode` (sparse, full) says; raises OptionError for a model that
        cannot decode, or not so."""


class FluxSubject:
    """A model.flux folder: its routed program, controls included."""

    def __init__(self, path: str | Path, device: str) -> None:
        self.model: FluxModel = load_flux(path, device)
        self.name, self.device, self.plan = str(path), device, self.model.plan
        self.layers = len(self.model.plan.layers)
        self.sizes = _plan_sizes(self.model.plan)
        files = {name: entry.sha256 for name, entry in self.model.flux.manifest.files.items() if name != "plan.json"}
        parts = {name: sha for name, sha in files.items() if name.startswith(("graphs/routed", "routers"))}
        self.digest = canonical_digest([parts, self.model.plan.model.weights, crossover.device_name(device)])

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The folder's tokenizer."""
        return self.model.tokenizer

    def outcomes(self, prompt: TokenizedPrompt, biases: Tensor) -> list[Outcome]:
        """See Subject."""
        return run_biases(self.model.routed, prompt, biases.to(self.device))

    def prefill(self, ids: Sequence[int], prompt_len: int, rows: Sequence[int], bias: Tensor) -> tuple[Tensor, Tensor]:
        """See Subject."""
        batch = self.model.batch(list(ids), prompt_lens=[prompt_len], logits_at=[list(rows)])
        found = self.model.run_routed(batch, bias[:, None].to(self.device))
        return found.logits[0], found.routes[:, 0]

    @functools.cache  # noqa: B019 (one engine a setting, for as long as the subject lives)
    def engine(self, decode: str) -> Engine:
        """See Subject."""
        from fluxc.engine.load import engine_of

        if decode == self.model.plan.decode:
            return engine_of(self.model, max_batch=1)
        return _redecoded(self.model, decode)


class EngineSubject:
    """An engine directory, through its own prefill and decode programs."""

    def __init__(self, path: str | Path) -> None:
        from fluxc.engine.load import exported
        from fluxc.exporters.engine_dir import open_engine

        made = open_engine(path)
        # Engines of a fixed batch come with it.
        alone: dict[str, Any] = {} if made.manifest.batch else {"max_batch": 1}
        self._engine = exported(made, None, **alone)
        self._folder = made.path / "tokenizer"
        self.name, self.plan = str(path), made.plan
        self.device = str(self._engine.programs.device)
        self.layers = len(made.plan.layers)
        self.sizes = _plan_sizes(made.plan)
        files = {name: entry.sha256 for name, entry in made.manifest.files.items() if name != "plan.json"}
        self.digest = canonical_digest([files, made.manifest.target, crossover.device_name(self.device)])

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The engine's tokenizer, as transformers reads it: prompts are built by where tokens stand in a text."""
        return _needed(read_tokenizer(self._folder) if self._folder.is_dir() else None, self.name)

    def outcomes(self, prompt: TokenizedPrompt, biases: Tensor) -> list[Outcome]:
        """See Subject. An engine prefills one request at a time."""
        return [self._outcome(prompt, biases[:, row]) for row in range(biases.shape[1])]

    def _outcome(self, prompt: TokenizedPrompt, bias: Tensor) -> Outcome:
        logits, routes = self.prefill(prompt.input_ids, prompt.prompt_len, prompt.logits_at, bias)
        return _outcome(logits[None], prompt, routes)

    def prefill(self, ids: Sequence[int], prompt_len: int, rows: Sequence[int], bias: Tensor) -> tuple[Tensor, Tensor]:
        """See Subject."""
        return whole_prefill(self._engine.programs, ids, prompt_len, rows, bias)

    def engine(self, decode: str) -> Engine:
        """See Subject."""
        if self.plan is not None and decode != self.plan.decode:
            raise OptionError(f"{self.name} decodes {self.plan.decode}, not {decode}", hint="evaluate its model.flux")
        return self._engine


class DenseSubject:
    """Anything `fluxc.capture` takes, as it is: the dense baseline that routed models are compared with."""

    def __init__(self, model: str | Path, device: str, progress: Progress = SILENT) -> None:
        from fluxc.calibrate.prompts import load_tokenizer
        from fluxc.capture.api import capture
        from fluxc.ir.graph import runnable
        from fluxc.passes.place import Place
        from fluxc.weight_files import weights_digest

        found = capture(model, progress=progress)
        program = found.program if device == "cpu" else Place(device).apply(found.program).program
        self.name, self.device, self.layers = str(model), device, 0
        context = int(found.meta["context"])
        self.sizes = Sizes(*CalibrateOptions().sizes(context), context)
        self.tokenizer = _needed(load_tokenizer(found) if found.tokenizer_files else None, self.name)
        self.digest = canonical_digest([weights_digest(found.program.state_dict), crossover.device_name(device)])
        self._module = runnable(program)

    @property
    def plan(self) -> Plan | None:
        """None."""
        return None

    def outcomes(self, prompt: TokenizedPrompt, biases: Tensor) -> list[Outcome]:
        """See Subject; `biases` say nothing here."""
        logits, routes = self.prefill(prompt.input_ids, prompt.prompt_len, prompt.logits_at, biases)
        return [_outcome(logits[None], prompt, routes)]

    @torch.no_grad()
    def prefill(self, ids: Sequence[int], prompt_len: int, rows: Sequence[int], bias: Tensor) -> tuple[Tensor, Tensor]:
        """See Subject."""
        from fluxc.runtime.batch import make_batch

        batch = make_batch(list(ids), logits_at=[list(rows)], context=0, device=self.device)
        return self._module(*batch.captured())[0], torch.zeros(0, dtype=torch.bool)

    def engine(self, decode: str) -> Engine:
        """See Subject."""
        raise OptionError(f"{self.name} has no plan to decode under", hint="`fluxc transform` it first")


def open_subject(path: str | Path, device: str, progress: Progress = SILENT) -> Subject:
    """The subject at `path`: a model.flux folder, an engine directory, or any model `fluxc.capture` takes.

    Raises what loading these raises, and DataError for one without a tokenizer.
    """
    from fluxc import manifest
    from fluxc.exporters import engine_dir

    progress.start("checking and loading the model")
    root = Path(path)
    if (root / engine_dir.NAME).is_file():
        return EngineSubject(root)
    if (root / manifest.NAME).is_file() or root.suffix == ".flux":
        found = FluxSubject(root, device)
        _needed(found.tokenizer if found.model.has_tokenizer else None, found.name)
        return found
    return DenseSubject(path, device, progress)


def _needed(tokenizer: Any, name: str) -> Any:
    if tokenizer is None:
        raise DataError(f"{name} has no tokenizer", hint="prompts are texts; transform a model that comes with one")
    return tokenizer


def _plan_sizes(plan: Plan) -> Sizes:
    """The largest sink and window of a plan: what is far for every layer."""
    sink, window = (max(getattr(layer, name) for layer in plan.layers) for name in ("sink", "window"))
    return Sizes(sink, window, plan.model.context)


def _outcome(logits: Tensor, prompt: TokenizedPrompt, routes: Tensor) -> Outcome:
    """The outcome of logits [1,N,V]; scores are not kept."""
    target = torch.tensor(prompt.answer_ids, device=logits.device)
    exact = bool((logits[0].argmax(-1) == target).all())
    return Outcome(float(answer_loss(logits, prompt)), exact, routes.cpu(), torch.zeros(len(routes)))


def _redecoded(model: FluxModel, decode: str) -> Engine:
    """An engine of the same model whose sparse layers keep the other choice of keys after the prompt."""
    from fluxc.engine.options import EngineOptions
    from fluxc.engine.traced import TracedPrograms
    from fluxc.passes.apply_plan import ApplyPlan

    plan = dataclasses.replace(model.plan, decode=decode)  # type: ignore[arg-type]
    program = ApplyPlan.of(plan).apply(model.routed_program).program
    return Engine(
        TracedPrograms(program, context=plan.model.context), plan, tokenizer=None, options=EngineOptions(max_batch=1)
    )
