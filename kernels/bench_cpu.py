"""Time the CPU attention ops against causal SDPA: `python -m fluxc.kernels.bench_cpu`.

All contenders of a case run in turn, round after round, so that a busy machine slows all of them alike; the ratio is
the median over rounds of dense time / op time. `ideal` is 1 / density. Nothing is timed before every op agreed with its
dense reference.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fluxc import kernels
from fluxc.errors import InternalError

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


@click.command()
@click.option("--length", "lengths", type=int, multiple=True, default=(1024, 2048, 4096, 8192), help="Tokens.")
@click.option("--rounds", default=7, help="Times each contender runs.")
@click.option("--threads", default=0, help="Torch threads; 0 leaves torch's choice.")
@click.option("--dtype", default="float32", type=click.Choice(["float32", "bfloat16", "float16"]))
@click.option("--clock", default="wall", type=click.Choice(list(CLOCKS)), help="cpu: time of this process only.")
@click.option("--json", "out", type=click.Path(path_type=Path), help="Where the raw numbers go.")
def main(lengths: tuple[int, ...], rounds: int, threads: int, dtype: str, clock: str, out: Path | None) -> None:
    """Time attention, streaming_attention and triangle_attention against causal SDPA."""
    kernels.register()
    if threads:
        torch.set_num_threads(threads)
    kind = getattr(torch, dtype)
    rows = []
    for case in CASES:
        check(case, kind)
        for S in lengths:
            rows += list(measure(case, S, kind, rounds, CLOCKS[clock]))
    Console(width=110).print(table(rows, f"{dtype}, {torch.get_num_threads()} threads, {clock} clock, batch 1"))
    if out:
        measured = {"conditions": conditions(dtype, clock, rounds), "rows": list(map(asdict, rows))}
        out.write_text(json.dumps(measured, indent=1) + "\n")


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


def table(rows: list[Row], title: str) -> Table:
    """The rows as a table for people."""
    shown = Table("heads", "sink + window", "tokens", "op", "ms", "x dense", "ideal", "% of ideal", title=title)
    for row in rows:
        case = row.case
        sizes = (f"{case.H}/{case.Hk} x {case.D}", f"{case.sink} + {case.window}", str(row.S), row.op)
        shares = (f"{row.ratio:.2f}", f"{row.ideal:.2f}", f"{100 * row.ratio / row.ideal:.0f}")
        shown.add_row(*sizes, f"{row.milliseconds:.2f}", *shares)
    return shown


def conditions(dtype: str, clock: str, rounds: int) -> dict[str, Any]:
    """What the numbers depend on."""
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "processor": processor(),
        "dtype": dtype,
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


if __name__ == "__main__":
    main()
