"""Timing with device events, and the conditions of a measurement."""

from __future__ import annotations

import datetime
import statistics
import subprocess
from collections.abc import Callable
from typing import Any

import torch
import triton


def median_ms(run: Callable[[Any], Any], inputs: list[Any], budget_ms: float = 300.0, least: int = 5) -> list[float]:
    """[median, least, largest] milliseconds of `run` over rotating inputs, after a warm-up."""
    for x in inputs:
        run(x)
    times: list[float] = []
    while len(times) < least or (sum(times) < budget_ms and len(times) < 200):
        times += _batch(run, inputs)
    return [statistics.median(times), min(times), max(times)]


def _batch(run: Callable[[Any], Any], inputs: list[Any], calls: int = 5) -> list[float]:
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(calls)]
    for n, (begin, end) in enumerate(marks):
        begin.record()
        run(inputs[n % len(inputs)])
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in marks]


def conditions() -> dict[str, str]:
    """Device, versions, date, and the clocks as nvidia-smi reads them now."""
    query = "clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu,driver_version"
    read = subprocess.run(
        ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True, text=True, check=False
    )
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cudnn": str(torch.backends.cudnn.version()),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        query: read.stdout.strip(),
    }
