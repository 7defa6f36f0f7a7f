"""Prefill time against dense, with the two figures every speed-up is printed beside: bound and ideal."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fluxc import kernels
from fluxc.errors import DataError, OptionError
from fluxc.plan import Plan
from fluxc.progress import SILENT, Progress
from fluxc.runtime.batch import Batch, Ids
from fluxc.runtime.clock import Timing, interleaved, seconds_of, with_stopwatches
from fluxc.runtime.model import FluxModel, Routes, forced_bias


def bound(t_dense: float, t_attn: float, sparse_ratio: float) -> float:
    """Speed-up if SA cost nothing: T_dense / (T_dense - Ω T_attn) (DESIGN section 1)."""
    return t_dense / (t_dense - sparse_ratio * t_attn)


def ideal(t_dense: float, t_attn: float, sparse_ratio: float, density: float) -> float:
    """Speed-up if SA cost its exact share of keys: T_dense / (T_dense - Ω T_attn (1 - density))."""
    return t_dense / (t_dense - sparse_ratio * t_attn * (1 - density))


@dataclasses.dataclass(frozen=True)
class RoutedTime:
    """Routed prefill at one Ω beside dense: seconds, speed-up (medians), bound, ideal, and speed-up / ideal."""

    name: str
    sparse_ratio: float
    seconds: Timing
    speedup: float
    bound: float
    ideal: float

    @property
    def of_ideal(self) -> float:
        """Share of the ideal speed-up reached."""
        return self.speedup / self.ideal


@dataclasses.dataclass(frozen=True)
class PrefillReport:
    """Times of one length. `attention`: the routable attention calls inside the dense runs; `density`: mean share of
    the causal keys that the plan's sparse kinds read at this length."""

    length: int
    dense: Timing
    attention: Timing
    density: float
    routed: tuple[RoutedTime, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready values."""
        values = dataclasses.asdict(self)
        values["routed"] = [dataclasses.asdict(run) | {"of_ideal": run.of_ideal} for run in self.routed]
        return values


def measure_prefill(
    model: FluxModel,
    prompt: int | Ids,
    *,
    sparse_ratio: float | None = None,
    routes: Routes | None = None,
    budget: float | None = None,
    guard: bool = False,
    repeats: int = 3,
    seed: int = 0,
    progress: Progress = SILENT,
) -> PrefillReport:
    """Time one request: dense, routed with forced routes, and routed as the routers choose at `budget`.

    With `guard` a prompt below the crossover runs dense where the routers would choose, as in `prefill`.

    `prompt` is token ids, or a length in tokens (random ids). Forced are `routes` (bool [L]), else SA in a share
    `sparse_ratio` of the layers, spread evenly (default: what the budget asks for). Medians of `repeats` interleaved
    runs after a warm-up. Raises OptionError for no repeats, DataError for a bad length.
    """
    if repeats < 1:
        raise OptionError(f"repeats {repeats} is below 1")
    batch = model.batch(random_ids(model, prompt, seed) if isinstance(prompt, int) else prompt)
    if batch.size != 1:
        raise DataError(f"{batch.size} prompts were given; prefill is measured on one")
    chosen = model.route_bias(batch, budget, None, guard=guard)
    share = 1 - (model.plan.budget if budget is None else budget) if sparse_ratio is None else sparse_ratio
    flags = spread_routes(len(model.plan.layers), share) if routes is None else routes
    forced = forced_bias(flags, len(model.plan.layers), 1).to(model.device)
    return _measured(model, batch, {"forced": forced, "chosen": chosen}, repeats, progress)


def _measured(
    model: FluxModel, batch: Batch, biases: dict[str, Tensor], repeats: int, progress: Progress
) -> PrefillReport:
    attention: list[float] = []
    ratios: dict[str, float] = {}

    def routed(name: str) -> Callable[[], float]:
        def run() -> float:
            result = model.run(batch, biases[name], dense=name == "chosen")
            ratios[name] = result.sparse_ratio
            return result.seconds

        return run

    progress.start("prefill times", (repeats + 1) * (1 + len(biases)))
    runs = {"dense": _dense_run(model, batch, attention), **{name: routed(name) for name in biases}}
    taken = interleaved({name: _counted(run, progress) for name, run in runs.items()}, repeats)
    dense, inside = Timing.of(taken.pop("dense")), Timing.of(attention[1:])  # the first was the warm-up
    length = int(batch.seq_lens[0])
    density = mean_density(model.plan, length)
    times = (_beside(name, ratios[name], Timing.of(taken[name]), dense, inside, density) for name in biases)
    return PrefillReport(length, dense, inside, density, tuple(times))


def _dense_run(model: FluxModel, batch: Batch, attention: list[float]) -> Callable[[], float]:
    module, watches = with_stopwatches(model.captured_program, model.device)

    @torch.no_grad()
    def run() -> float:
        for watch in watches:
            watch.seconds = 0.0
        seconds = seconds_of(lambda: module(*batch.captured()), model.device)
        attention.append(math.fsum(watch.seconds for watch in watches))
        return seconds

    return run


def _counted(run: Callable[[], float], progress: Progress) -> Callable[[], float]:
    def counted() -> float:
        seconds = run()
        progress.advance()
        return seconds

    return counted


def _beside(name: str, ratio: float, seconds: Timing, dense: Timing, inside: Timing, density: float) -> RoutedTime:
    return RoutedTime(
        name=name,
        sparse_ratio=ratio,
        seconds=seconds,
        speedup=dense.median / seconds.median,
        bound=bound(dense.median, inside.median, ratio),
        ideal=ideal(dense.median, inside.median, ratio, density),
    )


def mean_density(plan: Plan, length: int) -> float:
    """Mean over the routable layers of the share of causal keys that the plan's sparse kind reads in a prefill.

    What the kind block reads depends on the prompt: it counts as nothing, which makes its ideal the bound.
    """
    shares = [
        0.0 if x.kind == "block" else kernels.density(x.kind, length, x.sink, x.window, x.last) for x in plan.layers
    ]
    return math.fsum(shares) / len(shares)


def spread_routes(layers: int, sparse_ratio: float) -> list[bool]:
    """Routes bool [L] with the share `sparse_ratio` (rounded to whole layers) on SA, spread evenly."""
    sparse = round(layers * sparse_ratio)
    return [(index + 1) * sparse // layers == index * sparse // layers for index in range(layers)]


def random_ids(model: FluxModel, length: int, seed: int) -> Sequence[int]:
    """`length` random token ids; raises DataError for a length below 1."""
    if length < 1:
        raise DataError(f"a prompt of {length} tokens cannot be measured")
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, model.vocabulary, (length,), generator=generator).tolist()
