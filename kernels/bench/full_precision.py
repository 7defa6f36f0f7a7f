"""fp32 operands at the lengths of calibration: our kernels, and what SDPA makes of them, with and without TF32."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fluxc import kernels
from fluxc.kernels.bench.cases import SMOLLM2, Case
from fluxc.kernels.bench.measure import clocks, host_microseconds, interleaved
from fluxc.kernels.bench.operands import Operands, operands, sampled_error

CASES = (Case("attention", 3072, SMOLLM2), Case("streaming_attention", 3072, SMOLLM2, sink=64, window=1024))
ERRORS = {"highest": 5e-6, "high": 3e-3}


def measure() -> Iterator[dict[str, Any]]:
    """One row per case, precision and contender: device time, and what a call keeps the host busy for."""
    kernels.register()
    before = torch.get_float32_matmul_precision()
    for precision, limit in ERRORS.items():
        torch.set_float32_matmul_precision(precision)
        for case in CASES:
            yield from _case(case, precision, limit)
    torch.set_float32_matmul_precision(before)


def _case(case: Case, precision: str, limit: float) -> Iterator[dict[str, Any]]:
    runs = _runs(case)
    inputs = [operands(case, torch.float32) for _ in range(4)]
    errors = {name: sampled_error(case if name != "SDPA, dense" else case.dense(), run, torch.float32)
              for name, run in runs.items()}  # fmt: skip
    times = interleaved({name: run for name, run in runs.items() if errors[name] < limit}, inputs, 100)
    for name, run in runs.items():
        row = {"op": case.op, "by": f"{name}, {precision}", "length": case.length, "shape": str(case.shape)}
        row |= {"dtype": "torch.float32", "error": errors[name], "ms": None, "clocks": clocks()}
        if name in times:
            row |= {"ms": times[name].median, "host_us": host_microseconds(run, inputs)}
        yield row


def _runs(case: Case) -> dict[str, Any]:
    how: dict[str, Any] = {"scale": case.shape.width**-0.5, "layer": 0}
    sizes = {"sink": case.sink, "window": case.window}
    route, lens = torch.tensor([not case.window], device="cuda"), torch.tensor([case.length], device="cuda")
    routed = how | {"kind": "streaming", "sink": case.sink, "window": case.window or 1024, "last": 0}
    own = how | (sizes if case.window else {})
    return {
        "ours": lambda x: getattr(torch.ops.fluxc, case.op)(*x, **own),
        "ours, routed": lambda x: torch.ops.fluxc.routed_attention(*x, route, lens, **routed),
        "SDPA, dense": _efficient,
    }


def _efficient(x: Operands) -> Tensor:
    """Memory-efficient SDPA, which wants as many key heads as query heads."""
    group = x[0].shape[1] // x[1].shape[1]
    k, v = (y.repeat_interleave(group, 1) for y in x[1:])
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        return F.scaled_dot_product_attention(x[0], k, v, is_causal=True).transpose(1, 2)
