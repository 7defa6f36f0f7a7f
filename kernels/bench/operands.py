"""Random operands, and the check every timing waits for."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fluxc.kernels.bench.cases import Case

Operands = tuple[Tensor, Tensor, Tensor]
TOLERANCE = {torch.bfloat16: 8e-3, torch.float16: 1.5e-3}
"""Largest relative error norm against fp32: a few roundings of P and of the output."""


def operands(case: Case, dtype: torch.dtype, batch: int = 1) -> Operands:
    """Fresh q [B,H,S,D] and k, v [B,Hk,S,D], laid out as a projection leaves them ([B,S,H,D] in memory)."""
    shape = case.shape
    sizes = [(shape.heads, shape.width), (shape.kv_heads, shape.width), (shape.kv_heads, shape.width)]
    made = [torch.randn(batch, case.length, n, d, device="cuda", dtype=dtype).transpose(1, 2) for n, d in sizes]
    return made[0], made[1], made[2]


def sampled_error(case: Case, run: Callable[[Operands], Tensor], dtype: torch.dtype, rows: int = 48) -> float:
    """Relative error norm of `run`'s [B,S,H,D] on sampled rows against fp32; infinite if any element is not finite."""
    inputs = operands(case, dtype)
    poison = torch.full_like(inputs[0], float("nan"))
    del poison  # the caching allocator hands this block to the output
    out = run(inputs)
    if not out.isfinite().all():
        return float("inf")
    chosen = _rows(case, rows)
    q, k, v = inputs
    group = case.shape.heads // case.shape.kv_heads
    wanted = torch.stack([_attend(case, q[0, h, chosen], k[0, h // group], v[0, h // group], chosen)
                          for h in range(case.shape.heads)], 1)  # fmt: skip
    return ((out[0, chosen].float() - wanted).norm() / wanted.norm()).item()


def _rows(case: Case, count: int) -> Tensor:
    edges = [0, 1, 63, 64, 127, 128, case.sink, case.window, case.sink + case.window, case.length - case.last]
    edges += [case.length - case.last - 1, case.length - 1, case.length // 2]
    fixed = torch.tensor([i for i in edges if 0 <= i < case.length])
    return torch.cat([fixed, torch.randint(case.length, (count,))]).to("cuda")


def _attend(case: Case, q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> Tensor:
    i, j = rows[:, None], torch.arange(case.length, device="cuda")[None, :]
    seen = j <= i
    if case.window:
        seen &= (j < case.sink) | (i - j < case.window) | (i >= case.length - case.last)
    s = (q.float() @ k.float().T * case.shape.width**-0.5).masked_fill(~seen, float("-inf"))
    return torch.softmax(s, 1) @ v.float()
