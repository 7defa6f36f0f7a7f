"""Timing with device events, and the conditions of a measurement."""

from __future__ import annotations

import dataclasses
import datetime
import random
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch
import triton

CLOCKS = "clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu,driver_version"
HEAD_START = 2_000_000  # device cycles of sleep before a batch, in which the host runs ahead
LONG_MS = 30.0  # one call of such a contender a turn


@dataclasses.dataclass(frozen=True)
class Timing:
    """Milliseconds of one call."""

    median: float
    least: float
    largest: float
    calls: int


def interleaved(
    runs: dict[str, Callable[[Any], Any]], inputs: list[Any], budget_ms: float = 1000.0, least_rounds: int = 3
) -> dict[str, Timing]:
    """Time contenders in turns, over rotating inputs, so that all see the same clocks and power.

    The order changes in each round: what ran just before decides how far the power limit pulls the clocks down.
    """
    calls = {}
    for name, run in runs.items():
        for x in inputs:
            run(x)
        calls[name] = 1 if max(batch(run, inputs, 1)) > LONG_MS else 3
    times: dict[str, list[float]] = {name: [] for name in runs}
    rounds = 0
    while rounds < least_rounds or (sum(map(sum, times.values())) < budget_ms and rounds < 40):
        for name in random.sample(list(runs), len(runs)):
            times[name] += batch(runs[name], inputs, calls[name])
        rounds += 1
    return {name: Timing(statistics.median(t), min(t), max(t), len(t)) for name, t in times.items()}


def batch(run: Callable[[Any], Any], inputs: list[Any], calls: int) -> list[float]:
    """Milliseconds of each of `calls` calls in a row."""
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(calls)]
    torch.cuda._sleep(HEAD_START)
    for n, (begin, end) in enumerate(marks):
        begin.record()
        run(inputs[n % len(inputs)])
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in marks]


def graphed(run: Callable[[Any], Any], inputs: list[Any], repeats: int = 20) -> Callable[[Any], Any]:
    """A CUDA graph of `repeats` calls over rotating inputs; its argument is ignored."""
    for x in inputs:
        run(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for n in range(repeats):
            run(inputs[n % len(inputs)])
    return lambda _: graph.replay()


def clocks() -> str:
    """What nvidia-smi reads now, in the order of CLOCKS."""
    query = ["nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()


def copy_tbps() -> float:
    """Terabytes a second that a copy on the device reads and writes: what `share of copy` is a share of."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    milliseconds = statistics.median(batch(lambda _: target.copy_(source), [None], 20))
    return 2 * source.numel() / milliseconds / 1e9


def host_microseconds(run: Callable[[Any], Any], inputs: list[Any], calls: int = 100) -> float:
    """What one call keeps the host busy for, while the device lags behind."""
    torch.cuda.synchronize()
    torch.cuda._sleep(50 * HEAD_START)
    begin = time.perf_counter()
    for n in range(calls):
        run(inputs[n % len(inputs)])
    taken = time.perf_counter() - begin
    torch.cuda.synchronize()
    return taken / calls * 1e6


def conditions() -> dict[str, str]:
    """Device, versions and date."""
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cudnn": str(torch.backends.cudnn.version()),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "timing": "CUDA events, medians, contenders in turns, inputs rotated",
        CLOCKS: clocks(),
    }
