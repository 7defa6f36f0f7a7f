"""A mixed batch by one kernel that reads routes on the device, against each sample by its own kernel.

A host that knows the routes may also group: the full samples together through cuDNN, the sparse ones through ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fluxc.kernels.bench.cases import Case
from fluxc.kernels.bench.measure import clocks, interleaved
from fluxc.kernels.bench.operands import Operands, operands
from fluxc.kernels.triton_launch import Call, attend

DTYPE = torch.bfloat16
BATCH = 8
LENGTHS = (2048, 4096, 8192)


def measure() -> Iterator[dict[str, Any]]:
    """One row per length and contender; half of the samples are full. The check: both give the same bits."""
    for length in LENGTHS:
        case = Case("routed_attention", length, sink=128, window=1024)
        route = torch.tensor([b % 2 == 0 for b in range(BATCH)], device="cuda")
        runs = {"ours, by flag": _by_flag(case, route), "ours, sample by sample": _each(case, route.tolist())}
        runs["grouped, full by cuDNN"] = _grouped(case, route.tolist())
        inputs = [operands(case, DTYPE, BATCH) for _ in range(2)]
        flag, each, grouped = (run(inputs[0]) for run in runs.values())
        close = (grouped.float() - flag.float()).norm() < 8e-3 * flag.float().norm()
        equal = torch.equal(flag, torch.cat(each)) and bool(close)
        times = interleaved(runs, inputs, 300) if equal else {}
        for name in runs:
            ms = times[name].median if equal else None
            row = {"op": case.op, "by": name, "batch": BATCH, "length": length, "shape": str(case.shape)}
            yield row | {"sink": 128, "window": 1024, "bit_equal": equal, "ms": ms, "clocks": clocks()}


def _call(case: Case, route: Tensor | None = None, full: bool = False) -> Call:
    scale = case.shape.width**-0.5
    return Call(scale) if full else Call(scale, case.sink, case.window, route=route)


def _by_flag(case: Case, route: Tensor) -> Any:
    return lambda x: attend(x[0], x[1], x[2], _call(case, route))


def _each(case: Case, routes: list[bool]) -> Any:
    def run(x: Operands) -> list[Tensor]:
        calls = [_call(case, full=full) for full in routes]
        return [attend(x[0][b, None], x[1][b, None], x[2][b, None], call) for b, call in enumerate(calls)]

    return run


def _grouped(case: Case, routes: list[bool]) -> Any:
    full = torch.tensor([b for b, is_full in enumerate(routes) if is_full], device="cuda")
    rest = torch.tensor([b for b, is_full in enumerate(routes) if not is_full], device="cuda")

    def run(x: Operands) -> Tensor:
        out = x[0].new_empty(BATCH, case.length, case.shape.heads, case.shape.width)
        q, k, v = (y[full] for y in x)
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            dense = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        out[full] = dense.transpose(1, 2)
        q, k, v = (y[rest] for y in x)
        out[rest] = attend(q, k, v, _call(case))
        return out

    return run
