"""Parity of an engine with the routed program it was made from: every length, both routes forced, and as chosen."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.export.exported_program import ExportedProgram

from fluxc.engine.geometry import Geometry
from fluxc.engine.shapes import LayerShape
from fluxc.errors import SelfCheckError
from fluxc.ir.graph import runnable
from fluxc.plan import Plan
from fluxc.progress import SILENT, Progress

TOLERANCE = 1e-4
"""Largest difference of a logit in fp32, relative to the largest logit where that is above 1."""
STEPS = 4
_CLOSE_CALL = 1e-3  # a score this near its threshold may fall either way
_LONG = (1000, 4096)


class Phases(Protocol):
    """What an engine of any target can do for one request; arrays are torch tensors on the CPU."""

    def prefill(self, input_ids: Tensor, route_bias: Tensor, logits_at: Tensor) -> dict[str, Tensor]:
        """logits [1,N,V], routes bool[L,1], scores f32[L,1], k_a and v_a [1,Hk,S,D]."""

    def decode(
        self, caches: dict[str, Tensor], input_ids: Tensor, position_ids: Tensor, slots: Tensor, lens: Tensor
    ) -> Tensor:
        """logits [B,V]; caches k_cache_a, v_cache_a [B,Hk,C,D] are written in place."""


@dataclasses.dataclass(frozen=True)
class Parity:
    """What was compared: the lengths, and the largest relative difference of prefill and of decode."""

    lengths: list[int]
    prefill: float
    decode: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the manifest."""
        return {**dataclasses.asdict(self), "tolerance": TOLERANCE, "steps": STEPS}


def lengths_of(plan: Plan) -> list[int]:
    """1, 17, the sink, one past the streaming set, and long ones; none past the model's context."""
    first = plan.layers[0] if plan.layers else None
    edges = [first.sink, first.keys + 1] if first else []
    room = (plan.model.context or math.inf) - STEPS
    return sorted({length for length in (1, 17, *edges, *_LONG) if 1 <= length <= room})


def check_parity(
    engine: Phases,
    routed: ExportedProgram,
    layers: tuple[LayerShape, ...],
    plan: Plan,
    progress: Progress = SILENT,
    *,
    chosen: bool = True,
) -> Parity:
    """Compare; without `chosen` under forced routes alone, for an engine that does not choose layer by layer.

    Raises SelfCheckError, naming length and routes, for a difference above TOLERANCE.
    """
    checker = _Checker(engine, runnable(routed), layers, plan, chosen)
    lengths = lengths_of(plan)
    prefill = decode = 0.0
    progress.start("verifying", len(lengths))
    for length in lengths:
        steps = STEPS if length in (17, lengths[-1]) else 0
        for name, bias in checker.biases():
            errors = checker.compare(length, name, bias, steps)
            prefill, decode = max(prefill, errors[0]), max(decode, errors[1])
        progress.advance()
    return Parity(lengths, prefill, decode)


class _Checker:
    def __init__(
        self, engine: Phases, program: Any, layers: tuple[LayerShape, ...], plan: Plan, chosen: bool = True
    ) -> None:
        self._engine, self._program, self._layers, self._plan = engine, program, layers, plan
        self._chosen = chosen
        self._vocabulary = 0

    def biases(self) -> list[tuple[str, Tensor]]:
        """route_bias f32[L,1] of: all full, all sparse, and what the routers choose under the plan."""
        count = len(self._plan.layers)
        ends = [(name, torch.full((count, 1), value)) for name, value in (("full", math.inf), ("sparse", -math.inf))]
        return [*ends, *([("chosen", self._plan.route_bias())] if self._chosen else [])]

    def compare(self, length: int, name: str, bias: Tensor, steps: int = 0) -> tuple[float, float]:
        """Relative errors of a prompt of `length` tokens and of `steps` steps after it; one reference run for both."""
        ids, at = self._ids(length + steps), torch.tensor([[0, length // 2, length - 1]])
        rows = torch.cat((at[0], torch.arange(length, length + steps)))[None]
        logits, routes, scores = self._expected(ids, length, bias, rows)
        found = self._engine.prefill(ids[:, :length], bias, at)
        if not torch.equal(found["routes"], routes):
            if bool(((scores + bias).abs() < _CLOSE_CALL).any()):
                return 0.0, 0.0
            raise SelfCheckError(f"the engine chose other routes than the routed program at length {length}")
        error = _compare(found["logits"], logits[:, :3], f"prefill of {length} tokens, routes {name}")
        return error, self._steps(found, ids, length, name, logits[0, 3:]) if steps else 0.0

    def _steps(self, start: dict[str, Tensor], ids: Tensor, length: int, name: str, expected: Tensor) -> float:
        """The relative error of a step for each row [n,V] of `expected`, after the prefill `start`."""
        geometry = Geometry.of(self._layers, self._plan, start["routes"][:, 0])
        caches = self._filled(start, geometry, length)
        errors = []
        for step, row in enumerate(expected):
            tokens = length + step
            slots, lens = (torch.from_numpy(x) for x in (geometry.turn(tokens, 1), geometry.lens(tokens + 1)))
            token, at = ids[:, tokens : tokens + 1], torch.tensor([[tokens]])
            logits = self._engine.decode(caches, token, at, slots, lens[:, None].int())
            errors.append(_compare(logits, row[None], f"step {step + 1} after {length} tokens, routes {name}"))
        return max(errors)

    def _filled(self, start: dict[str, Tensor], geometry: Geometry, length: int) -> dict[str, Tensor]:
        """Caches of the size each layer needs, with the prompt's keys and values in their slots."""
        caches, slots = {}, torch.from_numpy(geometry.turn(0, length))
        sizes = geometry.lens(length + STEPS)
        for index in range(len(self._layers)):
            kept = slots[index] >= 0
            for name in "kv":
                rows = start[f"{name}_{index}"]
                cache = rows.new_zeros(1, rows.shape[1], int(sizes[index]), rows.shape[3])
                cache[:, :, slots[index][kept]] = rows[:, :, kept]
                caches[f"{name}_cache_{index}"] = cache
        return caches

    @torch.no_grad()
    def _expected(self, ids: Tensor, prompt: int, bias: Tensor, at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        length = ids.shape[1]
        lens = torch.tensor([length]), torch.tensor([prompt])
        result: tuple[Tensor, Tensor, Tensor] = self._program(ids, torch.arange(length)[None], *lens, bias, at)
        return result

    def _ids(self, length: int) -> Tensor:
        """Random tokens; the vocabulary is asked of the program once."""
        if not self._vocabulary:
            zero = torch.zeros(1, 1, dtype=torch.int64)
            self._vocabulary = self._expected(zero, 1, self.biases()[0][1], zero)[0].shape[-1]
        generator = torch.Generator().manual_seed(length)
        return torch.randint(self._vocabulary, (1, length), generator=generator)


def _compare(found: Tensor, expected: Tensor, where: str) -> float:
    scale = max(1.0, float(expected.abs().max()))
    error = float((found - expected).abs().max()) / scale
    if not error <= TOLERANCE:
        raise SelfCheckError(f"{where}: the engine's logits differ from the routed program's by {error:.1e}")
    return error
