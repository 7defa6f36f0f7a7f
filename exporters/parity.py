"""Parity of an engine with the routed program it was made from: every length, both routes forced, and as chosen."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
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

    def close(self, phase: str) -> None:
        """Free what "prefill" or "decode" holds; a later call opens it again."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A prompt of `length` tokens under one routing, and what the routed program says of it.

    ids i64[1,length+steps]; bias f32[L,1]; logits [1,3+steps,V] of rows `at` of the prompt and of each step's token;
    routes bool[L,1]; scores f32[L,1].
    """

    name: str
    length: int
    steps: int
    bias: Tensor
    ids: Tensor
    logits: Tensor
    routes: Tensor
    scores: Tensor

    @property
    def at(self) -> Tensor:
        """Rows i64[1,3] of the prompt that are compared."""
        return torch.tensor([[0, self.length // 2, self.length - 1]])


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
    lengths: Sequence[int] = (),
) -> Parity:
    """`expect`, then `compare`."""
    cases = expect(routed, plan, progress, chosen=chosen, lengths=lengths)
    return compare(engine, cases, layers, plan, progress)


def expect(
    routed: ExportedProgram,
    plan: Plan,
    progress: Progress = SILENT,
    *,
    chosen: bool = True,
    lengths: Sequence[int] = (),
) -> list[Case]:
    """What the routed program says: apart from the comparison, so that its weights can be freed before.

    Without `chosen` under forced routes alone, for an engine that does not choose layer by layer. `lengths`:
    those of `lengths_of` by default.
    """
    lengths = list(lengths) or lengths_of(plan)
    program = runnable(routed)
    progress.start("computing what to expect", len(lengths))
    cases = []
    for length in lengths:
        steps = STEPS if length in (17, lengths[-1]) else 0
        ids = _ids(length + steps, _vocabulary(routed))
        cases += [expected(program, ids, name, bias, steps) for name, bias in biases(plan, chosen=chosen)]
        progress.advance()
    return cases


def biases(plan: Plan, *, chosen: bool = True) -> list[tuple[str, Tensor]]:
    """route_bias f32[L,1] of: all full, all sparse, and what the routers choose under the plan."""
    count = len(plan.layers)
    ends = [(name, torch.full((count, 1), value)) for name, value in (("full", math.inf), ("sparse", -math.inf))]
    return [*ends, *([("chosen", plan.route_bias())] if chosen else [])]


@torch.no_grad()
def expected(program: torch.nn.Module, ids: Tensor, name: str, bias: Tensor, steps: int = 0) -> Case:
    """One run of the routed program for a prompt and the `steps` tokens after it, ids i64[1,length+steps]."""
    total = ids.shape[1]
    length = total - steps
    rows = torch.tensor([[0, length // 2, length - 1, *range(length, total)]])
    lens = torch.tensor([total]), torch.tensor([length])
    return Case(name, length, steps, bias, ids, *program(ids, torch.arange(total)[None], *lens, bias, rows))


def compare(
    engine: Phases, cases: Sequence[Case], layers: tuple[LayerShape, ...], plan: Plan, progress: Progress = SILENT
) -> Parity:
    """Compare one routing after the other, prefills before steps: at no time is more than one program open.

    Raises SelfCheckError, naming length and routes, for a difference above TOLERANCE.
    """
    progress.start("verifying", len(cases))
    prefill = decode = 0.0
    for name in dict.fromkeys(case.name for case in cases):
        starts = []
        for case in (case for case in cases if case.name == name):
            error, start = _prefill(engine, case)
            prefill = max(prefill, error)
            if start and case.steps:
                geometry = Geometry.of(layers, plan, start["routes"][:, 0])
                starts.append((case, geometry, _filled(start, geometry, case.length)))
            del start
            progress.advance()
        engine.close("prefill")
        while starts:
            decode = max(decode, _steps(engine, *starts.pop()))
        engine.close("decode")
    return Parity(sorted({case.length for case in cases}), prefill, decode)


def _prefill(engine: Phases, case: Case) -> tuple[float, dict[str, Tensor]]:
    """The relative error of a prompt, and what the engine made of it: {} where a route was a close call."""
    found = engine.prefill(case.ids[:, : case.length], case.bias, case.at)
    if not torch.equal(found["routes"], case.routes):
        if bool(((case.scores + case.bias).abs() < _CLOSE_CALL).any()):
            return 0.0, {}
        raise SelfCheckError(f"the engine chose other routes than the routed program at length {case.length}")
    where = f"prefill of {case.length} tokens, routes {case.name}"
    return _compare(found["logits"], case.logits[:, :3], where), found


def _steps(engine: Phases, case: Case, geometry: Geometry, caches: dict[str, Tensor]) -> float:
    """The relative error of the steps after a prompt."""
    errors = []
    for step, row in enumerate(case.logits[0, 3:]):
        tokens = case.length + step
        slots, lens = (torch.from_numpy(x) for x in (geometry.turn(tokens, 1), geometry.lens(tokens + 1)))
        token, at = case.ids[:, tokens : tokens + 1], torch.tensor([[tokens]])
        logits = engine.decode(caches, token, at, slots, lens[:, None].int())
        errors.append(_compare(logits, row[None], f"step {step + 1} after {case.length} tokens, routes {case.name}"))
    return max(errors)


def _filled(start: dict[str, Tensor], geometry: Geometry, length: int) -> dict[str, Tensor]:
    """Caches of the size each layer needs, with the prompt's keys and values in their slots; `start` loses them."""
    caches, slots = {}, torch.from_numpy(geometry.turn(0, length))
    sizes = geometry.lens(length + STEPS)
    for index in range(len(slots)):
        kept = slots[index] >= 0
        for name in "kv":
            rows = start.pop(f"{name}_{index}")
            cache = rows.new_zeros(1, rows.shape[1], int(sizes[index]), rows.shape[3])
            cache[:, :, slots[index][kept]] = rows[:, :, kept]
            caches[f"{name}_cache_{index}"] = cache
    return caches


def _vocabulary(routed: ExportedProgram) -> int:
    outputs: Any = routed.graph.output_node().args[0]
    return int(outputs[0].meta["val"].shape[-1])


def _ids(length: int, vocabulary: int) -> Tensor:
    """Random tokens i64[1,length]."""
    generator = torch.Generator().manual_seed(length)
    return torch.randint(vocabulary, (1, length), generator=generator)


def _compare(found: Tensor, expected: Tensor, where: str) -> float:
    scale = max(1.0, float(expected.abs().max()))
    error = float((found - expected).abs().max()) / scale
    if not error <= TOLERANCE:
        raise SelfCheckError(f"{where}: the engine's logits differ from the routed program's by {error:.1e}")
    return error
