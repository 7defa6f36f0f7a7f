"""Prefill of a random model through the engine's own runner: dense, forced routes, chosen routes, short prompts."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fluxc.bench.shape_model import RandomModel
from fluxc.bench.shape_rows import Row, free, rounds
from fluxc.engine import demand
from fluxc.engine.pool import PagePool
from fluxc.engine.programs import Prefilled
from fluxc.engine.runner import Runner
from fluxc.engine.sequence import TokenSequence
from fluxc.errors import InternalError
from fluxc.runtime.clock import Timing, now
from fluxc.runtime.measure import bound, ideal, mean_density, spread_routes

DENSE = "dense"
WARM_TOKENS = 1 << 16
"""Longer prompts are warmed up by the quickest run alone: their kernels ran at other lengths."""


@dataclasses.dataclass(frozen=True)
class Took:
    """One prefill: wall-clock seconds, of which `attention` in the routable calls (dense runs only), bytes of KV kept,
    most bytes allocated on the device meanwhile, routes bool[L]."""

    seconds: float
    attention: float
    kv_bytes: int
    peak_bytes: int
    routes: list[bool]


class Attentions:
    """Adds up the time of some modules in a run, on a GPU by events that hold nothing up."""

    def __init__(self, device: str) -> None:
        self._events = torch.device(device).type == "cuda"
        self._marks: list[tuple[Any, Any]] = []

    def timed(self, module: nn.Module) -> nn.Module:
        """The module with marks around each call."""
        return _Timed(module, self)

    def mark(self) -> Any:
        """Now, on the device's clock."""
        if not self._events:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def add(self, begin: Any, end: Any) -> None:
        """A call lasted from `begin` to `end`."""
        self._marks.append((begin, end))

    def seconds(self) -> float:
        """The sum since this was last asked; the device must be done."""
        marks, self._marks = self._marks, []
        if self._events:
            return sum(begin.elapsed_time(end) for begin, end in marks) / 1000
        return sum(end - begin for begin, end in marks)


class _Timed(nn.Module):
    def __init__(self, module: nn.Module, watch: Attentions) -> None:
        super().__init__()
        self.module, self.watch = module, watch

    def forward(self, *inputs: Tensor) -> Any:
        begin = self.watch.mark()
        result = self.module.forward(*inputs)
        self.watch.add(begin, self.watch.mark())
        return result


class Prefills:
    """Prefills of one random prompt of `length` tokens; `keep`: KV is written into a pool that holds it all full.

    Without it the programs run as they do in the engine, and each layer's KV is dropped.
    """

    def __init__(self, model: RandomModel, length: int, *, keep: bool = True, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.model, self.keep = model, keep
        self.tokens: list[int] = torch.randint(0, model.shape.vocabulary, (length,), generator=generator).tolist()
        self._watch = Attentions(model.device)
        self._programs = model.programs.with_dense_attention(self._watch.timed)
        self._pool = PagePool(self._pages(length) if keep else 0)
        self._runner = Runner(self._programs, model.plan, self._pool.total) if keep else None

    @property
    def pool_bytes(self) -> int:
        """Bytes of the pool, whatever is kept in it."""
        return self._runner.cache.nbytes if self._runner else 0

    @torch.no_grad()
    def run(self, bias: Sequence[float], *, dense: bool = False) -> Took:
        """One prefill under `bias`, one a routable layer."""
        device = self.model.device
        if device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        start = now(device)
        routes, pages = self._kept(bias, dense) if self._runner else self._dropped(bias, dense)
        seconds = now(device) - start
        size = demand.page_bytes(self._programs.layers, self._programs.dtype)
        peak = torch.cuda.max_memory_allocated() if device != "cpu" else 0
        return Took(seconds, self._watch.seconds(), pages * size, peak, routes)

    def _kept(self, bias: Sequence[float], dense: bool) -> tuple[list[bool], int]:
        """Through the runner, as a request of the engine."""
        if self._runner is None:
            raise InternalError("a prefill is kept without a pool")
        holding = self._pool.open(len(self._programs.layers))
        sequence = TokenSequence(self.tokens, len(self.tokens), list(bias), dense, holding)
        try:
            for _ in self._runner.prefill(sequence, lambda _, lens: self._pool.grow(holding, lens)):
                pass
            pages = holding.pages
        finally:
            self._pool.close(holding)
        if sequence.routes is None:
            raise InternalError("the pool of a prefill was too small")
        return sequence.routes.tolist(), pages

    def _dropped(self, bias: Sequence[float], dense: bool) -> tuple[list[bool], int]:
        """The programs alone; the route of each layer is read, as the engine does."""
        device = self._programs.device
        ids = torch.tensor([self.tokens], device=device)
        end = torch.tensor([len(self.tokens)], device=device)
        values = torch.tensor(list(bias), dtype=torch.float32, device=device)[:, None]
        routes: list[bool] = []
        for item in self._programs.prefill(ids, end, values, (end - 1)[:, None], dense=dense):
            if isinstance(item, Prefilled):
                routes = item.routes.tolist()
            del item
        return routes, 0

    def _pages(self, length: int) -> int:
        full = [True] * len(self.model.plan.layers)
        return demand.pages(self.model.programs.layers, self.model.plan, full, length)


def against_dense(
    model: RandomModel,
    length: int,
    ratios: Sequence[float],
    *,
    repeats: int,
    most_seconds: float,
    left: Callable[[], float],
) -> Row:
    """Dense beside routes forced to each Ω at one length; where dense does not fit with its KV, KV is dropped."""
    try:
        return _against_dense(Prefills(model, length), ratios, repeats, most_seconds, left)
    except torch.OutOfMemoryError as fault:
        reason = str(fault).splitlines()[0]
    free(model.device)
    row = _against_dense(Prefills(model, length, keep=False), ratios, repeats, most_seconds, left)
    return row | {"note": f"KV is dropped layer by layer: with all of it kept, {reason}"}


def _against_dense(
    prefills: Prefills, ratios: Sequence[float], repeats: int, most_seconds: float, left: Callable[[], float]
) -> Row:
    model, layers = prefills.model, len(prefills.model.plan.layers)
    biases = {DENSE: model.bias([True] * layers)}
    biases |= {f"{ratio:g}": model.bias(spread_routes(layers, ratio)) for ratio in ratios}
    quickest = f"{max(ratios):g}" if ratios else DENSE
    warm = list(biases) if len(prefills.tokens) <= WARM_TOKENS else [quickest]
    taken = rounds(
        list(biases),
        lambda name: prefills.run(biases[name], dense=name == DENSE),
        repeats=repeats,
        left=left,
        most_seconds=most_seconds,
        warm=warm,
    )
    row: Row = {"length": len(prefills.tokens), "keeps_kv": prefills.keep, "pool_bytes": prefills.pool_bytes}
    row |= {"density": mean_density(model.plan, len(prefills.tokens)), "runs": {}}
    row["runs"] = {name: [dataclasses.asdict(took) | {"routes": text_of(took.routes)} for took in runs]
                   for name, runs in taken.items()}  # fmt: skip
    if DENSE not in taken:
        return row | {"error": "no time was left for a dense run"}
    return row | compared(taken, row["density"])


def compared(taken: dict[str, list[Took]], density: float) -> Row:
    """Speed-up, bound and ideal at each Ω, beside the fastest dense run and the attention inside it (DESIGN 1)."""
    dense = min(taken[DENSE], key=lambda took: took.seconds)
    routed = [_beside(name, runs, dense, density) for name, runs in taken.items() if name != DENSE]
    return {"dense": dense.seconds, "attention": dense.attention, "routed": routed}


def _beside(name: str, runs: list[Took], dense: Took, density: float) -> Row:
    seconds = Timing.of([took.seconds for took in runs])
    ratio = 1 - sum(runs[0].routes) / len(runs[0].routes)
    limits = bound(dense.seconds, dense.attention, ratio), ideal(dense.seconds, dense.attention, ratio, density)
    speedup = dense.seconds / seconds.median
    return {
        "name": name,
        "sparse_ratio": ratio,
        "seconds": dataclasses.asdict(seconds),
        "speedup": speedup,
        "bound": limits[0],
        "ideal": limits[1],
        "of_bound": speedup / limits[0],
        "of_ideal": speedup / limits[1],
        "kv_bytes": runs[0].kv_bytes,
    }


def text_of(routes: Sequence[bool]) -> str:
    """1 for a full layer, 0 for a sparse one."""
    return "".join("1" if full else "0" for full in routes)
