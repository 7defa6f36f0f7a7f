"""Gradients of one attention against the gradient of dense cuDNN SDPA."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fluxc.kernels.bench.cases import Case
from fluxc.kernels.bench.measure import clocks, interleaved
from fluxc.kernels.bench.operands import operands
from fluxc.kernels.triton_backward import gradients
from fluxc.kernels.triton_config import BackwardTiles, backward_for
from fluxc.kernels.triton_launch import Call, attend_with_lse

DTYPE = torch.bfloat16
CASES = tuple(
    Case(op, length, sink=sink, window=window)
    for length in (8192, 32768)
    for op, sink, window in (("attention", 0, 0), ("streaming_attention", 128, 2048))
)
VARIANTS = (
    BackwardTiles(128, 64, 8, 2, 32, 128, 8, 3),
    BackwardTiles(128, 64, 8, 2, 64, 128, 8, 2),
    BackwardTiles(64, 64, 4, 2, 32, 128, 8, 2),
)
TOLERANCE = 2e-2


def measure(variants: bool) -> Iterator[dict[str, Any]]:
    """One row per case and contender. The check: gradients against fp32 autograd at a short length."""
    for case in CASES:
        tiles = (backward_for(90, case.shape.width), *(VARIANTS if variants else ()))
        errors = [_error(case, t) for t in tiles]
        x = _prepared(case)
        runs: dict[str, Any] = {"cudnn": _cudnn(x)}
        runs |= {str(t): _ours(case, t, x) for t, error in zip(tiles, errors, strict=True) if error < TOLERANCE}
        times = interleaved(runs, [None], 500)
        for name, error in [("cudnn", None), *zip(map(str, tiles), errors, strict=True)]:
            row = {"op": f"{case.op} backward", "by": name, "length": case.length, "shape": str(case.shape)}
            ms = times[name].median if name in times else None
            density = case.density if name != "cudnn" else 1.0
            row |= {"error": error, "ms": ms, "clocks": clocks()}
            if ms:
                row |= {"of_ideal": times["cudnn"].median * density / ms, "tflops": 2.5 * case.flops / ms / 1e9}
            yield row
        torch.cuda.empty_cache()


def _call(case: Case) -> Call:
    return Call(case.shape.width**-0.5, case.sink, case.window)


Prepared = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _prepared(case: Case) -> Prepared:
    q, k, v = operands(case, DTYPE)
    out, lse = attend_with_lse(q, k, v, _call(case))
    return q, k, v, out, lse, torch.randn_like(out)


def _ours(case: Case, tiles: BackwardTiles, x: Prepared) -> Any:
    return lambda _: gradients(*x, _call(case), tiles)


def _cudnn(x: Prepared) -> Any:
    q, k, v = leaves = [t.detach().requires_grad_() for t in x[:3]]
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    grad = x[5].transpose(1, 2)
    return lambda _: torch.autograd.grad(out, leaves, grad, retain_graph=True)


def _error(case: Case, tiles: BackwardTiles, length: int = 3000) -> float:
    short = Case(case.op, length, case.shape, case.sink, case.window)
    q, k, v, out, lse, grad = _prepared(short)
    found = gradients(q, k, v, out, lse, grad, _call(case), tiles)
    leaves = [t.detach().float().requires_grad_() for t in (q, k, v)]
    group = case.shape.heads // case.shape.kv_heads
    i, j = torch.arange(length, device="cuda")[:, None], torch.arange(length, device="cuda")[None, :]
    seen = (j <= i) & ((j < case.sink) | (i - j < (case.window or length)))
    s = leaves[0] @ leaves[1].repeat_interleave(group, 1).transpose(2, 3) * case.shape.width**-0.5
    p = torch.softmax(s.masked_fill(~seen, float("-inf")), 3)
    wanted = torch.autograd.grad((p @ leaves[2].repeat_interleave(group, 1)).transpose(1, 2), leaves, grad.float())
    errors = [(a.float() - b).norm() / b.norm() for a, b in zip(found, wanted, strict=True)]
    return max(e.item() for e in errors)
