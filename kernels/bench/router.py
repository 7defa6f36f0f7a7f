"""The Layer Router inside a CUDA graph: fused, and as the ops a graph without fusion runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fluxc.kernels import triton_router
from fluxc.kernels.bench.cases import Shape
from fluxc.kernels.bench.measure import clocks, graphed, interleaved

REPEATS = 20
POOL = 100


def measure(shape: Shape, length: int) -> Iterator[dict[str, Any]]:
    """One row per contender: time a layer, for one request."""
    inputs = [_inputs(shape, length) for _ in range(8)]
    runs = {
        "ours, fused": lambda x: triton_router.router(x[0], x[1], *x[2], pool=POOL, fused=True),
        "ours, pool + torch linears": lambda x: _head(triton_router.router_pool(x[0], x[1], pool=POOL), x[2]),
        "torch": lambda x: _head(_pool(x[0]), x[2]),
    }
    wanted = _head(_pool(inputs[0][0].double()), [w.double() for w in inputs[0][2]])
    for name, run in runs.items():
        error = ((run(inputs[0]) - wanted).norm() / wanted.norm()).item()
        row = {"op": "router", "by": name, "length": length, "shape": str(shape), "error": error, "ms": None}
        if error < 1e-3:
            graph = graphed(run, inputs, REPEATS)
            row["ms"] = interleaved({name: graph}, [None], 100)[name].median / REPEATS
        yield row | {"clocks": clocks()}


def _inputs(shape: Shape, length: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    d = shape.width
    q = torch.randn(1, length, shape.heads, d, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    weights = []
    for rows, columns in ((8 * d, d), (2 * d, 8 * d), (4 * d, 2 * d), (d, 4 * d), (2, d)):
        weights += [torch.randn(rows, columns, device="cuda") * columns**-0.5, torch.randn(rows, device="cuda")]
    return q, torch.tensor([length], device="cuda"), weights


def _pool(q: Tensor) -> Tensor:
    kind = torch.float32 if q.dtype != torch.float64 else torch.float64
    return (q[:, :, :POOL].mean((1, 2), dtype=kind) + q[:, :, -POOL:].mean((1, 2), dtype=kind)) / 2


def _head(x: Tensor, w: list[Tensor]) -> Tensor:
    x = F.linear(F.silu(F.linear(x, w[0], w[1])), w[2], w[3])
    return F.linear(F.silu(F.linear(F.silu(F.linear(x, w[4], w[5])), w[6], w[7])), w[8], w[9])
