"""Wall-clock seconds of runs and of the attention calls inside them."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from fluxc.ir.graph import argument, is_call, runnable


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of repeated runs: the median stands for them, fastest and slowest show the spread."""

    median: float
    fastest: float
    slowest: float
    runs: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        """Summarise at least one run."""
        return cls(statistics.median(seconds), min(seconds), max(seconds), len(seconds))


def now(device: str = "cpu") -> float:
    """Seconds of a steady clock, after the device has finished what it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds_of(run: Callable[[], Any], device: str = "cpu") -> float:
    """Seconds one run takes."""
    start = now(device)
    run()
    return now(device) - start


def interleaved(runs: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """What each run returns, `repeats` times, after one warm-up each.

    Each round runs all of them, starting one later than the round before, so that a machine that slows down or warms
    up hits all alike.
    """
    names = list(runs)
    for name in names:
        runs[name]()
    taken: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(repeats):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            taken[name].append(runs[name]())
    return taken


class Stopwatch(nn.Module):
    """Stands in a graph for an op, and adds up the seconds that its calls take."""

    def __init__(self, op: Callable[..., Any], device: str) -> None:
        super().__init__()
        self.op, self.device, self.seconds = op, device, 0.0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the op."""
        start = now(self.device)
        result = self.op(*args, **kwargs)
        self.seconds += now(self.device) - start
        return result


def with_stopwatches(program: ExportedProgram, device: str = "cpu") -> tuple[nn.Module, list[Stopwatch]]:
    """The captured program as a module in which every routable attention call is timed, everything else as it is."""
    module: Any = runnable(program)
    watches: list[Stopwatch] = []
    for node in list(module.graph.nodes):
        if is_call(node, torch.ops.fluxc.attention) and not argument(node, "window"):
            watch = Stopwatch(node.target, device)
            name = f"stopwatch_{len(watches)}"
            module.add_submodule(name, watch)
            node.op, node.target = "call_module", name
            watches.append(watch)
    module.recompile()
    return module, watches
