"""The prefill suite: each case checked, then timed beside its peers, as a share of the ideal."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.attention import SDPBackend

from fluxc.kernels.bench.cases import Case
from fluxc.kernels.bench.contenders import Run, ours, peers, sdpa
from fluxc.kernels.bench.measure import conditions, median_ms
from fluxc.kernels.bench.operands import TOLERANCE, operands, sampled_error

SETS_BYTES = 6 << 30


def measure(cases: tuple[Case, ...], dtype: torch.dtype, with_flex: bool) -> Iterator[dict[str, Any]]:
    """One row per case and contender. A contender whose check fails gets its error and no time."""
    dense: dict[Case, float] = {}
    for case in cases:
        if case.dense() not in dense:
            row = _row(case.dense(), "cudnn", sdpa(case.dense(), SDPBackend.CUDNN_ATTENTION), dtype, None)
            dense[case.dense()] = row["ms"]
            yield row
        ideal = dense[case.dense()] * case.density
        yield _row(case, "ours", ours(case), dtype, ideal)
        for name, run in _peers(case, with_flex).items():
            yield _row(case, name, run, dtype, ideal)
        torch.cuda.empty_cache()


def _peers(case: Case, with_flex: bool) -> dict[str, Run]:
    with contextlib.suppress(RuntimeError):
        return peers(case, with_flex)
    return {}


def _row(case: Case, name: str, run: Run, dtype: torch.dtype, ideal: float | None) -> dict[str, Any]:
    error = sampled_error(case, run, dtype)
    row: dict[str, Any] = {"op": case.op, "by": name, "length": case.length, "shape": str(case.shape)}
    row |= {"sink": case.sink, "window": case.window, "last": case.last, "dtype": str(dtype), "error": error}
    if not error < TOLERANCE[dtype]:
        return row | {"ms": None}
    one = sum(x.numel() * x.element_size() for x in operands(case, dtype))
    sets = [operands(case, dtype) for _ in range(max(2, min(4, SETS_BYTES // one)))]
    ms, least, most = median_ms(run, sets)
    row |= {"ms": ms, "least_ms": least, "most_ms": most, "tflops": case.flops / ms / 1e9}
    row["of_ideal"] = ideal / ms if ideal else None
    row["clocks"] = next(value for key, value in conditions().items() if key.startswith("clocks"))
    return row
