"""The CPU ops against causal SDPA, and decode over pages against SDPA over a contiguous cache.

All contenders of a case run in turn, round after round, so that a busy machine slows all of them alike; the ratio is
the median over rounds of dense time / op time. `ideal` is 1 / density. Nothing is timed before every op agreed with its
dense reference.
"""

from __future__ import annotations

import functools
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fluxc import kernels
from fluxc.errors import InternalError
from fluxc.kernels.paged import gather
from fluxc.kernels.schemas import PAGE

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
CHECK_LENGTH = 700
CHECK_ERROR = 2e-2  # of bf16; fp32 is within 1e-5


@dataclass(frozen=True)
class Case:
    """A shape: H query heads over Hk key/value heads of width D, and the sparse sizes."""

    H: int
    Hk: int
    D: int
    sink: int
    window: int
    last: int = 128


@dataclass(frozen=True)
class Row:
    """One contender of one case. ratio: dense time / its time; ideal: 1 / density."""

    case: Case
    S: int
    op: str
    milliseconds: float
    ratio: float
    ideal: float


CASES = (Case(9, 3, 64, 64, 1024), Case(8, 8, 128, 64, 512), Case(32, 8, 128, 128, 2048))


def prefill(lengths: Sequence[int], rounds: int, clock: str, dtype: str = "float32") -> Iterator[dict[str, Any]]:
    """Rows of attention, streaming_attention and triangle_attention against causal SDPA."""
    kernels.register()
    kind = getattr(torch, dtype)
    for case in CASES:
        check(case, kind)
        for S in lengths:
            for row in measure(case, S, kind, rounds, CLOCKS[clock]):
                sizes = {"shape": f"{case.H}/{case.Hk} x {case.D}", "sink": case.sink, "window": case.window}
                found: dict[str, Any] = {
                    "op": row.op.replace("sdpa", "attention"),
                    "by": "SDPA" if row.op == "sdpa" else "ours",
                }
                found |= {"length": S, **sizes, "dtype": dtype, "ms": row.milliseconds, "speedup": row.ratio}
                yield found | {"of_ideal": row.ratio / row.ideal}


@torch.no_grad()
def decode(lengths: Sequence[int], rounds: int, clock: str) -> Iterator[dict[str, Any]]:
    """Rows of decode_attention over shuffled pages against SDPA over a contiguous cache of the same length, fp32."""
    kernels.register()
    for case in CASES:
        for length in lengths:
            steps = [_step(case, length, seed) for seed in range(4)]
            runs: dict[str, Callable[..., Tensor]] = {
                "SDPA, contiguous": _contiguous,
                "SDPA, cache grown by cat": _grown,
                "ours, paged": functools.partial(_paged, case),
            }
            dense, *others = (run(steps[0]) for run in runs.values())
            if not all(torch.allclose(out, dense, rtol=1e-4, atol=1e-5) for out in others):
                raise InternalError("decode_attention and SDPA disagree: no times are shown")
            times: dict[str, list[float]] = {name: [] for name in runs}
            for n in range(rounds * 8 + 4):
                for name, run in runs.items():
                    begin = CLOCKS[clock]()
                    run(steps[n % 4])
                    times[name].append(CLOCKS[clock]() - begin)
            for name, taken in times.items():
                row = {"op": "decode_attention", "by": name, "length": length, "dtype": "float32"}
                yield row | {"shape": f"{case.H}/{case.Hk} x {case.D}", "ms": statistics.median(taken[4:]) * 1e3}


Step = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _step(case: Case, length: int, seed: int) -> Step:
    """q [1,H,D], a cache with shuffled pages, its table, and k, v [1,Hk,length,D]."""
    generator, pages = torch.Generator().manual_seed(seed), -(-length // PAGE)
    cache = torch.randn(pages, 2, case.Hk, PAGE, case.D, generator=generator)
    table = torch.randperm(pages, generator=generator)
    k, v = (side.contiguous() for side in gather("decode_attention", cache, table, length)[:, None])
    return torch.randn(1, case.H, case.D, generator=generator), cache, table[None].int(), k, v


def _contiguous(step: Step) -> Tensor:
    q, _, _, k, v = step
    return F.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=q.shape[1] != k.shape[1])[:, :, 0]


def _grown(step: Step) -> Tensor:
    """As a cache that gets its newest token by torch.cat."""
    q, cache, table, k, v = step
    k, v = (torch.cat([x[:, :, :-1], x[:, :, -1:]], 2) for x in (k, v))
    return _contiguous((q, cache, table, k, v))


def _paged(case: Case, step: Step) -> Tensor:
    q, cache, table, k, _ = step
    lens = torch.tensor([k.shape[2]], dtype=torch.int32)
    return torch.ops.fluxc.decode_attention(q, cache, table, lens, scale=case.D**-0.5, layer=0)


@torch.no_grad()
def check(case: Case, dtype: torch.dtype) -> None:
    """Raise InternalError unless every contender agrees with dense attention over its mask."""
    from fluxc.kernels.triangle_attention.reference import triangle_attention

    small = Case(case.H, case.Hk, case.D, sink=16, window=100, last=20)
    q, k, v = operands(small, CHECK_LENGTH, dtype)
    wide = (q.float(), k.float(), v.float(), torch.tensor([CHECK_LENGTH]))
    last = {"sdpa": CHECK_LENGTH, "attention": CHECK_LENGTH, "streaming_attention": 0, "triangle_attention": small.last}
    for name, run in contenders(small, q, k, v).items():
        options = {"scale": case.D**-0.5, "layer": 0, "sink": small.sink, "window": small.window, "last": last[name]}
        error = (run().float() - triangle_attention(*wide, **options)).abs().max().item()
        if not error < CHECK_ERROR:
            raise InternalError(f"{name} is off by {error:.2g} from its reference: no times are shown")


def contenders(case: Case, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Each op as a call without arguments; the first is the dense baseline."""
    how: dict[str, Any] = {"scale": case.D**-0.5, "layer": 0}
    sizes = {"sink": case.sink, "window": case.window}
    prompt = torch.tensor([q.shape[2]])
    grouped = case.Hk != case.H
    return {
        "sdpa": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped).transpose(1, 2),
        "attention": lambda: torch.ops.fluxc.attention(q, k, v, **how),
        "streaming_attention": lambda: torch.ops.fluxc.streaming_attention(q, k, v, **how, **sizes),
        "triangle_attention": lambda: torch.ops.fluxc.triangle_attention(
            q, k, v, prompt, **how, **sizes, last=case.last
        ),
    }


def operands(case: Case, S: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as models make them: transposed views of [B,S,H,D]."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, S, heads, case.D) for heads in (case.H, case.Hk, case.Hk)]
    q, k, v = (torch.randn(shape, generator=generator).to(dtype).transpose(1, 2) for shape in shapes)
    return q, k, v


@torch.no_grad()
def measure(case: Case, S: int, dtype: torch.dtype, rounds: int, clock: Callable[[], float]) -> Iterator[Row]:
    """Rows of one case at one length."""
    runs = contenders(case, *operands(case, S, dtype))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            begin = clock()
            run()
            times[name].append(clock() - begin)
    dense = times["sdpa"][1:]
    for name, taken in times.items():
        ratios = [base / own for base, own in zip(dense, taken[1:], strict=True)]
        kind = {"streaming_attention": "streaming", "triangle_attention": "triangle"}.get(name, "full")
        ideal = 1 / kernels.density(kind, S, case.sink, case.window, case.last)
        yield Row(case, S, name, statistics.median(taken[1:]) * 1e3, statistics.median(ratios), ideal)


def conditions(clock: str, rounds: int) -> dict[str, Any]:
    """What the numbers depend on."""
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "processor": processor(),
        "clock": clock,
        "rounds": rounds,
        "triangle_last": CASES[0].last,
    }


def processor() -> str:
    """The processor's name, as far as the system tells."""
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text().splitlines() if listing.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
