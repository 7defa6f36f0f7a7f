"""Prefill: each contender checked, then all timed in turns, as a share of the ideal."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from fluxc.kernels.bench.cases import Case
from fluxc.kernels.bench.contenders import Run, contenders
from fluxc.kernels.bench.measure import clocks, interleaved
from fluxc.kernels.bench.operands import TOLERANCE, operands, sampled_error

SETS = 2
DTYPE = torch.bfloat16


def measure(cases: Iterable[Case], flex_lengths: tuple[int, ...], variants: bool) -> Iterator[dict[str, Any]]:
    """One row per case and contender. A contender whose check fails gets its error and no time."""
    for case in cases:
        runs = contenders(case, case.length in flex_lengths, variants)
        errors = {name: _error(shown, run) for name, (shown, run) in runs.items()}
        green: dict[str, Run] = {name: run for name, (_, run) in runs.items() if errors[name] < TOLERANCE[DTYPE]}
        times = interleaved(green, [operands(case, DTYPE) for _ in range(SETS)])
        ideal = times["cudnn"].median * case.density if "cudnn" in times else None
        for name, (shown, _) in runs.items():
            row = _facts(shown) | {"by": name, "error": errors[name], "clocks": clocks()}
            yield row | (_speed(shown, times[name], ideal) if name in times else {"ms": None})
        torch.cuda.empty_cache()


def _error(case: Case, run: Run) -> float:
    """The contender's error; not a number if it refuses the case."""
    try:
        return sampled_error(case, run, DTYPE)
    except RuntimeError:
        return float("nan")


def _facts(case: Case) -> dict[str, Any]:
    facts: dict[str, Any] = {"op": case.op, "length": case.length, "shape": str(case.shape), "dtype": str(DTYPE)}
    return facts | {"sink": case.sink, "window": case.window, "last": case.last, "density": case.density}


def _speed(case: Case, time: Any, ideal: float | None) -> dict[str, Any]:
    found = {"ms": time.median, **dataclasses.asdict(time), "tflops": case.flops / time.median / 1e9}
    return found | {"of_ideal": ideal / time.median if ideal else None}
