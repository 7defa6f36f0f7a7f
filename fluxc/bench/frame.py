"""`fluxc bench MODEL`: prefill and decode of a model.flux or engine folder against dense, checked before timed.

Runs that are compared take turns in one process, after a warm-up; medians are reported with the fastest and the
slowest run. Engines have no stopwatch inside: their speed-ups come without bound and ideal.
"""

from __future__ import annotations

import dataclasses
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fluxc.artifact import versions
from fluxc.calibrate.runner import forced
from fluxc.engine.engine import Engine
from fluxc.engine.whole_prefill import whole_prefill
from fluxc.errors import SelfCheckError
from fluxc.options import Options
from fluxc.plan import Plan
from fluxc.progress import SILENT, Progress
from fluxc.runtime import crossover
from fluxc.runtime.clock import Timing, interleaved, seconds_of
from fluxc.runtime.measure import measure_prefill, spread_routes
from fluxc.runtime.model import FluxModel

LENGTHS = (1024, 2048, 4096, 8192)
CHECKED = 48
"""Tokens of the check before anything is timed."""
TOLERANCE = 1e-3
"""Largest difference of logits between dense and all-full prefill of an engine, which may use other kernels."""


@dataclasses.dataclass(frozen=True)
class FrameOptions(Options):
    """`lengths` in tokens (empty: 1K to 8K within the context), `batches` that decode together, `new_tokens` of each
    answer, `sparse_ratio` of forced routes and `budget` of chosen ones (None: the plan's), `repeats` of each run,
    `crossover`: measure it first."""

    lengths: tuple[int, ...] = ()
    batches: tuple[int, ...] = (1,)
    new_tokens: int = 32
    sparse_ratio: float | None = None
    budget: float | None = None
    repeats: int = 3
    crossover: bool = True


def measure(path: Path, device: str, options: FrameOptions, progress: Progress = SILENT) -> dict[str, Any]:
    """Everything about one folder, as plain values.

    Raises what loading raises, and SelfCheckError, without any number, where dense and all-full prefill differ.
    """
    progress.start("loading and checking")
    start = time.perf_counter()
    model, begin = _opened(path, device, max(options.batches))
    loaded = time.perf_counter()
    engine = begin()
    with engine:
        engine.warm_up()
        ready = time.perf_counter()
        _check(model, engine)
        lengths = _lengths(engine.plan, options, engine.programs.context)
        found: dict[str, Any] = {
            "conditions": conditions(str(path), engine.plan, device, options),
            "load_seconds": loaded - start,
            "prepare_seconds": ready - loaded,
        }
        if model:
            found |= _crossover(model, options, progress)
            found["lengths"] = [_prefill(model, length, options, progress) for length in lengths]
        else:
            found["lengths"] = [_engine_prefill(engine, length, options, progress) for length in lengths]
        found["decode"] = [_decode(engine, n, batch, options, progress) for n in lengths for batch in options.batches]
    return {**found, "peak_bytes": _peak(device)}


def _opened(path: Path, device: str, batch: int) -> tuple[FluxModel | None, Callable[[], Engine]]:
    """The model of a model.flux folder (None for an engine's), and what makes its engine."""
    from fluxc.engine.load import engine_of, exported
    from fluxc.exporters import engine_dir
    from fluxc.runtime.model import load_flux

    if (path / engine_dir.NAME).is_file():
        made = engine_dir.open_engine(path)
        # Engines of a fixed batch come with it.
        most: dict[str, Any] = {} if made.manifest.batch else {"max_batch": batch}
        return None, lambda: exported(made, None, **most)
    model = load_flux(path, device)
    return model, lambda: engine_of(model, max_batch=batch)


def _lengths(plan: Plan, options: FrameOptions, context: int) -> tuple[int, ...]:
    """Lengths that leave room for an answer; those asked for are taken as they are."""
    room = (context or 1 << 62) - options.new_tokens
    return options.lengths or tuple(length for length in LENGTHS if length <= room) or (max(room, 1),)


def _check(model: FluxModel | None, engine: Engine) -> None:
    """Dense and all-full prefill give the same logits: bit for bit for a model, nearly for an engine."""
    ids = [token % engine.programs.vocabulary for token in range(7, 7 + CHECKED)]
    if model is not None:
        full = model.prefill(ids, routes=[True] * len(model.plan.layers), program="routed").logits
        same = torch.equal(full, model.prefill(ids, program="captured").logits)
    else:
        same = torch.allclose(_last(engine, ids, True), _last(engine, ids, False), atol=TOLERANCE, rtol=TOLERANCE)
    if not same:
        raise SelfCheckError("all-full prefill differs from dense", hint="no times are shown; this is a fault of fluxc")


def _last(engine: Engine, ids: Sequence[int], dense: bool, routes: Sequence[bool] | None = None) -> torch.Tensor:
    """Logits of the last row of a prefill by the engine's own program, all full unless `routes` says otherwise."""
    full = [True] * len(engine.plan.layers)
    bias = forced(full if routes is None else routes)
    return whole_prefill(engine.programs, ids, len(ids), [len(ids) - 1], bias, dense=dense)[0]


def _crossover(model: FluxModel, options: FrameOptions, progress: Progress) -> dict[str, Any]:
    """The crossover, and what a router costs: all-full routed less dense, at the longest length it was measured at."""
    from fluxc.runtime.measure_crossover import measure_crossover

    if options.crossover:
        measure_crossover(model, budget=options.budget, repeats=options.repeats, progress=progress)
    file = model.flux.device_file
    known = crossover.read(file).get(crossover.key(model.plan, model.device)) if file.exists() else None
    found: dict[str, Any] = {"crossover": model.crossover(options.budget)}
    if known:
        layers = len(model.plan.layers)
        found["router_seconds"] = (known.full[-1] - known.dense[-1]) / layers
        found["router_length"] = known.lengths[-1]
    return found


def _prefill(model: FluxModel, length: int, options: FrameOptions, progress: Progress) -> dict[str, Any]:
    progress.note(f"prefill of {length} tokens")
    asked: dict[str, Any] = {"sparse_ratio": options.sparse_ratio, "budget": options.budget, "repeats": options.repeats}
    return measure_prefill(model, length, guard=True, progress=progress, **asked).to_dict()


def _engine_prefill(engine: Engine, length: int, options: FrameOptions, progress: Progress) -> dict[str, Any]:
    """Dense beside routes forced to Ω, by the engine's own programs."""
    ids, routes = _ids(engine, length, 0), _forced(engine.plan, options)
    progress.start(f"prefill of {length} tokens", 2 * (options.repeats + 1))

    def timed(dense: bool) -> Callable[[], float]:
        def run() -> float:
            seconds = seconds_of(lambda: _last(engine, ids, dense, None if dense else routes), "cpu")
            progress.advance()
            return seconds

        return run

    taken = interleaved({"dense": timed(True), "forced": timed(False)}, options.repeats)
    dense, sparse = (Timing.of(taken[name]) for name in ("dense", "forced"))
    run = {
        "name": "forced",
        "sparse_ratio": 1 - sum(routes) / len(routes),
        "seconds": dataclasses.asdict(sparse),
        "speedup": dense.median / sparse.median,
    }
    return {"length": length, "dense": dataclasses.asdict(dense), "routed": [run]}


def _decode(engine: Engine, length: int, batch: int, options: FrameOptions, progress: Progress) -> dict[str, Any]:
    """Seconds a step of `batch` answers after prompts of `length` tokens, dense beside routes forced to Ω."""
    routes = _forced(engine.plan, options)
    progress.start(f"decode after {length} tokens, batch {batch}", 2 * options.repeats)
    prompts = [_ids(engine, length, seed) for seed in range(batch)]
    runs = {"dense": [True] * len(routes), "forced": routes}
    steps: dict[str, list[float]] = {name: [] for name in runs}
    held: dict[str, int] = {}
    for _ in range(options.repeats):
        for name, flags in runs.items():
            answers = engine.generate(prompts, routes=flags, max_new_tokens=options.new_tokens, eos_token_id=[])
            steps[name].append(_step(answers))
            held[name] = sum(answer.kv_bytes.measured for answer in answers)
            progress.advance()
    found = {name: dataclasses.asdict(Timing.of(taken)) | {"kv_bytes": held[name]} for name, taken in steps.items()}
    found["forced"] |= {
        "sparse_ratio": 1 - sum(routes) / len(routes),
        "speedup": found["dense"]["median"] / found["forced"]["median"],
    }
    return {"length": length, "batch": batch, **found}


def _step(answers: Sequence[Any]) -> float:
    """Median seconds between two tokens of the answers; the last to start had all others beside it."""
    return statistics.median(answers[-1].timings.per_token)


def _forced(plan: Plan, options: FrameOptions) -> list[bool]:
    share = plan.budget if options.budget is None else options.budget
    return spread_routes(len(plan.layers), 1 - share if options.sparse_ratio is None else options.sparse_ratio)


def _ids(engine: Engine, length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, engine.programs.vocabulary, (length,), generator=generator).tolist()


def _peak(device: str) -> int:
    """The most memory this process ever had resident, or had on the GPU, bytes."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    # Linux counts kB, macOS bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def conditions(name: str, plan: Plan, device: str, options: FrameOptions) -> dict[str, Any]:
    """What the numbers depend on."""
    return {
        "model": Path(name).name,
        "device": crossover.device_name(device),
        "clock_mhz": _clock(device),
        "dtype": plan.model.dtype,
        "plan": plan.digest(),
        "decode": plan.decode,
        "options": options.to_dict(),
        "versions": versions(),
    }


def _clock(device: str) -> float | None:
    """Clock of the GPU, or mean clock of the CPU's cores, MHz; None where the system does not say."""
    if device.startswith("cuda"):
        return float(torch.cuda.clock_rate())
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    found = [float(line.split(":")[1]) for line in lines if line.startswith("cpu MHz")]
    return statistics.fmean(found) if found else None
