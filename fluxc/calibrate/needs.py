"""Measuring each layer's need for full attention on each prompt, with results kept on disk as they come."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export.exported_program import ExportedProgram

from fluxc.atomic import atomic_file
from fluxc.calibrate.probe import Recording, watch
from fluxc.calibrate.runner import answer_loss, forced, program_inputs
from fluxc.data import TokenizedPrompt
from fluxc.ir.graph import argument, calls
from fluxc.options import canonical_digest
from fluxc.passes.outline_layers import OutlineLayers

CHECKPOINT_TOKENS = 3000
"""Prompts longer than this recompute each layer's activations in the backward pass, which bounds memory."""


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One prompt, measured at several points (shares of SA in every layer's output).

    needs fp32 [G,L], in nats of the mean answer loss, at the points where gradients were taken; pooled fp32 [P,L,D],
    the queries each router saw at each of `points`; losses [P] at those points. The first point is dense, the last
    all-sparse.
    """

    task: str
    points: tuple[float, ...]
    needs: Tensor
    pooled: Tensor
    losses: tuple[float, ...]

    @property
    def need(self) -> Tensor:
        """The need of each layer, averaged over the points with gradients, fp32 [L]."""
        return self.needs.mean(0)


def routable_layers(program: ExportedProgram) -> list[int]:
    """The `layer` attribute of each routed attention, in graph order: the axis L of routes and scores."""
    return [argument(node, "layer") for node in calls(program, torch.ops.fluxc.routed_attention)]


def measure_needs(
    program: ExportedProgram,
    prompts: Sequence[TokenizedPrompt],
    gradients: Sequence[float],
    *,
    cache: Path | None = None,
    salt: str = "",
    device: str = "cpu",
    advance: Callable[[], None] = lambda: None,
) -> list[Measurement]:
    """Needs of all prompts, from gradients at the given shares of SA (0 dense, 1 all-sparse).

    Dense and all-sparse runs are always made, for their losses and pooled queries, without gradients if need be.
    With `cache`, each prompt's result is kept there and a later call continues after it. `salt` names everything
    besides the prompt that the result depends on (weights, kinds and sizes). The program must be on `device`.
    """
    points = sorted({0.0, 1.0, *gradients})
    watchers = [_Watcher(program, point, device, point in gradients) for point in points]
    results = []
    for prompt in prompts:
        path = cache / f"need-{_key(prompt, gradients, salt)}.json" if cache else None
        found = _read(path) if path and path.exists() else None
        result = found or _measure(watchers, prompt)
        if path and not found:
            _write(path, result)
        results.append(result)
        advance()
    return results


def pool_queries(
    program: ExportedProgram,
    prompts: Sequence[TokenizedPrompt],
    device: str = "cpu",
    advance: Callable[[], None] = lambda: None,
) -> Tensor:
    """What each router sees on each prompt with all routes full: pooled queries fp32 [N,L,D]."""
    watcher = _Watcher(program, None, device)
    rows = []
    for prompt in prompts:
        watcher.run(prompt)
        rows.append(watcher.pooled())
        advance()
    return torch.stack(rows)


class _Watcher:
    """A private copy of a routed program that records needs (at `point`) and pooled queries."""

    def __init__(self, program: ExportedProgram, point: float | None, device: str, gradient: bool = False) -> None:
        self.gradient = gradient
        self._device = device
        self.point = point
        self._layers = routable_layers(program)
        self._recording = Recording()
        self._module = OutlineLayers().apply(program).requires_grad_(False)
        watch(self._module, self._recording, point)

    def run(self, prompt: TokenizedPrompt) -> Tensor:
        """The answer loss, with its graph where gradients are on."""
        self._recording.needs.clear()
        self._recording.pooled.clear()
        self._module.checkpointing = len(prompt) > CHECKPOINT_TOKENS
        bias = forced([True] * len(self._layers)).to(self._device)
        with torch.set_grad_enabled(self.gradient):
            logits, _, _ = self._module(*program_inputs(prompt, bias))
            return answer_loss(logits, prompt)

    def pooled(self) -> Tensor:
        """fp32 [L,D] of the last run; what checkpointing recomputed comes later in the list and is left out."""
        return torch.stack([layer[0] for layer in self._recording.pooled[: len(self._layers)]])

    def needs(self) -> Tensor:
        """fp32 [L] of the last run, after its backward pass."""
        return torch.tensor([self._recording.needs[layer] for layer in self._layers])


def _measure(watchers: Sequence[_Watcher], prompt: TokenizedPrompt) -> Measurement:
    needs, pooled, losses = [], [], []
    for watcher in watchers:
        loss = watcher.run(prompt)
        pooled.append(watcher.pooled())
        losses.append(float(loss.detach()))
        if watcher.gradient:
            loss.backward()
            needs.append(watcher.needs())
    points = tuple(float(watcher.point or 0) for watcher in watchers)
    return Measurement(prompt.task, points, torch.stack(needs), torch.stack(pooled), tuple(losses))


def to_json(measurement: Measurement) -> dict[str, Any]:
    """Plain values of a measurement."""
    values = {"needs": measurement.needs.tolist(), "pooled": measurement.pooled.tolist()}
    return {"task": measurement.task, "points": measurement.points, "losses": measurement.losses, **values}


def _read(path: Path) -> Measurement:
    raw = json.loads(path.read_text())
    needs, pooled = torch.tensor(raw["needs"]), torch.tensor(raw["pooled"])
    return Measurement(raw["task"], tuple(raw["points"]), needs, pooled, tuple(raw["losses"]))


def _write(path: Path, measurement: Measurement) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path, force=True) as temporary:
        temporary.write_text(json.dumps(to_json(measurement)))


def _key(prompt: TokenizedPrompt, gradients: Sequence[float], salt: str) -> str:
    return canonical_digest([prompt.input_ids, prompt.prompt_len, list(gradients), salt])[:24]
