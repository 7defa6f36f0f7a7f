"""The fused ops against the same work as separate torch ops, in a CUDA graph, and compiled by Inductor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fluxc import kernels
from fluxc.kernels.bench.cases import SMOLLM2, Shape
from fluxc.kernels.bench.measure import clocks, graphed, interleaved
from fluxc.kernels.schemas import PAGE

DTYPE = torch.bfloat16
TOLERANCE = 1e-2
REPEATS = 10
SIZES = ((Shape(), 4096, 12288), (SMOLLM2, 576, 1536))  # heads, hidden width, MLP width
LENGTHS = (1, 8192)
POOL, EPS = 100, 1e-6


def measure() -> Iterator[dict[str, Any]]:
    """One row per op, size and contender."""
    kernels.register()
    for shape, hidden, mlp in SIZES:
        for length in LENGTHS:
            yield from _compare("add_rms_norm", length, f"{hidden}", _norms(length, hidden), _norm_runs())
            yield from _compare("swiglu", length, f"{mlp}", _gates(length, mlp), _swiglu_runs())
            yield from _compare("qk_norm_rope_cache", length, str(shape), _projections(length, shape), _qkv_runs())


def _compare(
    op: str, length: int, shape: str, inputs: list[Any], runs: dict[str, Callable[[Any], Any]]
) -> Iterator[dict[str, Any]]:
    runs["compiled"] = torch.compile(runs["torch"], dynamic=False)
    wanted = _flat(runs["torch"](inputs[0]))
    errors = {name: ((_flat(run(inputs[0])) - wanted).norm() / wanted.norm()).item() for name, run in runs.items()}
    graphs = {name: graphed(run, inputs, REPEATS) for name, run in runs.items() if errors[name] < TOLERANCE}
    times = interleaved(graphs, [None], 50)
    for name, error in errors.items():
        ms = times[name].median / REPEATS if name in times else None
        yield {"op": op, "by": name, "length": length, "shape": shape, "error": error, "ms": ms, "clocks": clocks()}


def _flat(out: Any) -> Tensor:
    parts = out if isinstance(out, tuple) else (out,)
    return torch.cat([x.float().flatten() for x in parts])


def _made(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=DTYPE)


def _norms(length: int, width: int) -> list[Any]:
    return [(_made(1, length, width), _made(1, length, width), _made(width)) for _ in range(4)]


def _norm_runs() -> dict[str, Callable[[Any], Any]]:
    def plain(x: Any) -> Any:
        total = x[0] + x[1]
        wide = total.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(DTYPE) * x[2], total

    return {"torch": plain, "ours": lambda x: torch.ops.fluxc.add_rms_norm(*x, eps=EPS)}


def _gates(length: int, width: int) -> list[Any]:
    return [tuple(_made(1, length, 2 * width).chunk(2, -1)) for _ in range(4)]


def _swiglu_runs() -> dict[str, Callable[[Any], Any]]:
    return {"torch": lambda x: F.silu(x[0]) * x[1], "ours": lambda x: torch.ops.fluxc.swiglu(*x)}


def _projections(length: int, shape: Shape) -> list[Any]:
    made = []
    for _ in range(2):
        heads = (shape.heads, shape.kv_heads, shape.kv_heads)
        q, k, v = (_made(1, length, n, shape.width).transpose(1, 2) for n in heads)
        angles = torch.rand(1, length, shape.width // 2, device="cuda").repeat(1, 1, 2) * 6
        cache = torch.zeros(-(-length // PAGE), 2, shape.kv_heads, PAGE, shape.width, device="cuda", dtype=DTYPE)
        slots, lens = torch.arange(length, device="cuda")[None], torch.tensor([length], device="cuda")
        turns = angles.cos().to(DTYPE), angles.sin().to(DTYPE)
        made.append((q, k, v, _made(shape.width), _made(shape.width), *turns, cache, slots, lens))
    return made


def _qkv_runs() -> dict[str, Callable[[Any], Any]]:
    def plain(x: Any) -> Any:
        q, k, v, q_weight, k_weight, cos, sin, cache, slots, lens = x
        normed = _head_norm(q, q_weight)
        turned, keys = _turn(normed, cos, sin), _turn(_head_norm(k, k_weight), cos, sin)
        torch.ops.fluxc.kv_write(cache, keys, v, slots)
        return turned, keys, torch.ops.fluxc.router_pool(normed, lens, pool=POOL)

    return {"torch": plain, "ours": lambda x: torch.ops.fluxc.qk_norm_rope_cache(*x, eps=EPS, pool=POOL)}


def _head_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(DTYPE) * weight


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]
