"""Decode steps of a random model through the engine's runner, on a cache whose content was never computed."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from fluxc.bench.shape_attention import attention_seconds
from fluxc.bench.shape_model import RandomModel
from fluxc.bench.shape_prefill import DENSE
from fluxc.bench.shape_rows import Row, rounds
from fluxc.engine import demand, memory
from fluxc.engine.decode_batch import DecodeBatch
from fluxc.engine.geometry import Geometry
from fluxc.engine.pool import PagePool
from fluxc.engine.runner import Runner
from fluxc.engine.sequence import TokenSequence
from fluxc.errors import DataError
from fluxc.kernels.schemas import PAGE
from fluxc.runtime.clock import Timing, now
from fluxc.runtime.measure import bound, ideal, spread_routes

RESERVE = 4_000_000_000
"""Bytes of the device that the cache leaves to everything else."""
FILLED = 2048
"""Pages of the cache that are filled at a time."""
WARM_STEPS = 4


@dataclasses.dataclass(frozen=True)
class Steps:
    """Steps of one batch. `step`: seconds of each as it is served: inputs of the host, the step, the largest logits
    read back. `host`: of them until the device had all its work. `device`: seconds a step when steps follow one another
    without being read; `attention`: of the routable attention alone (dense only, else 0). `kv_bytes` of all rows."""

    step: list[float]
    host: float
    device: float
    attention: float
    kv_bytes: int


class Decodes:
    """One runner over a cache with random content, and sequences in it as if their prompts had been prefilled."""

    def __init__(self, model: RandomModel, pages: int) -> None:
        self.model = model
        self.pool = PagePool(pages)
        self.runner = Runner(model.programs, model.plan, pages)
        # A cache that was only allocated may hold NaN, and values decide nothing else.
        for part in self.runner.cache.split(FILLED):
            part.normal_()

    def pages(self, routes: Sequence[bool], length: int) -> int:
        """Pages of one sequence of `length` tokens under `routes`."""
        return demand.pages(self.model.programs.layers, self.model.plan, routes, length)

    def open(self, routes: Sequence[bool], length: int, batch: int) -> list[TokenSequence]:
        """`batch` sequences with `length` tokens in the cache and one to decode.

        Nothing is computed for them: they get routes and pages, and what the pages hold stands for their keys and
        values. A step costs the same whatever these are. Raises DataError where the pool has too few pages.
        """
        layers = self.model.programs.layers
        geometry = Geometry.of(layers, self.model.plan, routes)
        sequences: list[TokenSequence] = []
        for _ in range(batch):
            sequence = TokenSequence([1] * (length + 1), length, [], False, self.pool.open(len(layers)))
            sequence.geometry, sequence.cached = geometry, length
            sequences.append(sequence)
            if not self._grow(sequence):
                self.close(sequences)
                raise DataError(f"{batch} sequences of {length} tokens do not fit {self.pool.total} pages")
        return sequences

    def close(self, sequences: Sequence[TokenSequence]) -> None:
        """Give the pages of sequences back."""
        for sequence in sequences:
            if sequence.holding is not None:
                self.pool.close(sequence.holding)

    @torch.no_grad()
    def steps(self, routes: Sequence[bool], length: int, batch: int, count: int, *, attention: bool = False) -> Steps:
        """`count` steps after prompts of `length` tokens; `attention`: time that of the first step alone as well."""
        sequences = self.open(routes, length, batch)
        try:
            inside = self._attention(sequences) if attention else 0.0
            taken = [self._step(sequences) for _ in range(WARM_STEPS + count)][WARM_STEPS:]
            device = self._back_to_back(sequences, count)
            held = sum(s.holding.pages for s in sequences if s.holding) * self.runner.page_bytes
        finally:
            self.close(sequences)
        return Steps([step for step, _ in taken], statistics.median(host for _, host in taken), device, inside, held)

    def _step(self, sequences: Sequence[TokenSequence]) -> tuple[float, float]:
        """Seconds of a step as the scheduler takes it, greedy, and until the host was done."""
        start = time.perf_counter()
        for sequence in sequences:
            if sequence.cached % PAGE == 0 and not self._grow(sequence):
                raise DataError("the pool ran out of pages between two steps")
        logits = self.runner.decode(sequences)
        done = time.perf_counter()
        for sequence, token in zip(sequences, logits.argmax(-1).tolist(), strict=True):
            sequence.tokens.append(token)
        return time.perf_counter() - start, done - start

    def _back_to_back(self, sequences: Sequence[TokenSequence], count: int) -> float:
        inputs = DecodeBatch(sequences).inputs(sequences)
        self.runner.store.decode(*inputs)
        start = now(self.model.device)
        for _ in range(count):
            self.runner.store.decode(*inputs)
        return (now(self.model.device) - start) / count

    def _attention(self, sequences: Sequence[TokenSequence]) -> float:
        """Seconds of the attention calls of one step, on the step's own values."""
        arrays = DecodeBatch(sequences).inputs(sequences)
        ids, positions, slots, table, lens = (torch.from_numpy(x).to(self.model.device) for x in arrays)
        values = ids, positions, self.runner.cache, slots, table, lens
        return attention_seconds(self.model.programs.decode_graph, values, self.model.device)

    def _grow(self, sequence: TokenSequence) -> bool:
        """Pages for the token to decode."""
        if sequence.geometry is None or sequence.holding is None:
            return False
        return self.pool.grow(sequence.holding, sequence.geometry.lens(sequence.cached + 1))


def pool_for(model: RandomModel, lengths: Sequence[int], batches: Sequence[int], steps: int) -> int:
    """Pages for the largest batch of the longest sequences all full, or as many as the device has room for."""
    size = demand.page_bytes(model.programs.layers, model.programs.dtype)
    layers = model.programs.layers
    one = demand.pages(layers, model.plan, [True] * len(model.plan.layers), _most_tokens(max(lengths), steps))
    room = max(memory.free_bytes(model.device) - RESERVE, size * len(layers))
    return min(one * max(batches), room // size)


def _most_tokens(length: int, steps: int) -> int:
    """Tokens in the cache at the end of a measurement."""
    return length + WARM_STEPS + steps + 1


def decode_row(
    decodes: Decodes,
    length: int,
    batch: int,
    ratios: Sequence[float],
    *,
    steps: int,
    repeats: int,
    left: Callable[[], float],
) -> Row:
    """Dense beside routes forced to each Ω; the largest batch that fits all full, where `batch` does not."""
    layers = len(decodes.model.plan.layers)
    routes = {DENSE: [True] * layers} | {f"{ratio:g}": spread_routes(layers, ratio) for ratio in ratios}
    room = _most_tokens(length, steps)
    fits = min(batch, decodes.pool.total // decodes.pages(routes[DENSE], room))
    row: Row = {"length": length, "asked_batch": batch, "batch": fits, "pool_bytes": decodes.runner.cache.nbytes}
    if fits:
        row |= _beside_dense(decodes, routes, length, fits, steps, repeats, left)
    if fits < batch:
        row["note"] = f"{batch} sequences all full do not fit the device: {fits} do"
        row["larger"] = _larger(decodes, routes, length, batch, steps)
    return row


def _beside_dense(
    decodes: Decodes,
    routes: dict[str, list[bool]],
    length: int,
    batch: int,
    steps: int,
    repeats: int,
    left: Callable[[], float],
) -> Row:
    taken = rounds(
        list(routes),
        lambda name: decodes.steps(routes[name], length, batch, steps, attention=name == DENSE),
        repeats=repeats,
        left=left,
        warm=[DENSE],
    )
    sizes = decodes.model.shape.sparse
    density = min(1.0, (sizes.sink + sizes.window) / length)
    dense = _summary(taken[DENSE])
    dense["attention"] = statistics.median(run.attention for run in taken[DENSE])
    rows = []
    for name, runs in taken.items():
        if name != DENSE:
            ratio = 1 - sum(routes[name]) / len(routes[name])
            own = {"name": name, "sparse_ratio": ratio, **_summary(runs)}
            rows.append(own | _limits(own, dense, ratio, density))
    return {"dense": dense, "density": density, "routed": rows}


def _summary(runs: list[Steps]) -> Row:
    """`step` of all runs together; medians of the others."""
    return {
        "step": dataclasses.asdict(Timing.of([step for run in runs for step in run.step])),
        "host": statistics.median(run.host for run in runs),
        "device": statistics.median(run.device for run in runs),
        "kv_bytes": runs[0].kv_bytes,
    }


def _limits(own: Row, dense: Row, ratio: float, density: float) -> Row:
    """Speed-up, bound and ideal of steps as they are served, and share of the bound of the device alone."""
    inside, whole = dense["attention"], dense["step"]["median"]
    speedup = whole / own["step"]["median"]
    limits = bound(whole, inside, ratio), ideal(whole, inside, ratio, density)
    alone = dense["device"] / own["device"] / bound(dense["device"], inside, ratio)
    found = {"speedup": speedup, "bound": limits[0], "ideal": limits[1], "of_bound": speedup / limits[0]}
    return found | {"of_ideal": speedup / limits[1], "device_of_bound": alone}


def _larger(decodes: Decodes, routes: dict[str, list[bool]], length: int, batch: int, steps: int) -> list[Row]:
    """Those routes under which the whole batch fits: step times without a dense side."""
    room = _most_tokens(length, steps)
    found = []
    for name, flags in routes.items():
        if decodes.pages(flags, room) * batch <= decodes.pool.total:
            runs = [decodes.steps(flags, length, batch, steps)]
            found.append({"name": name, "sparse_ratio": 1 - sum(flags) / len(flags), "batch": batch, **_summary(runs)})
    return found
