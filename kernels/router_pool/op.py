"""`fluxc::router_pool`: prefix-suffix pooling of a layer's queries, the Layer Router's input (paper, "Layer Router").

The mean runs over all heads and over the first and the last `pool` rows of the prompt. Both parts always hold the same
number of rows, min(pool, n), so it is the mean of the prefix mean and the suffix mean.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fluxc.errors import UserError
from fluxc.kernels.explicit import sum_dtype
from fluxc.kernels.schemas import NAMESPACE, SCHEMAS

BACKWARD = "(Tensor grad, Tensor q, Tensor prompt_lens, *, int pool) -> Tensor"


def define() -> None:
    """Define torch.ops.fluxc.router_pool and its internal backward."""
    name = f"{NAMESPACE}::router_pool"
    op = torch.library.custom_op(name, _forward, mutates_args=(), schema=SCHEMAS["router_pool"])
    op.register_fake(_fake)
    op.register_autograd(_autograd_backward, setup_context=_setup_context)
    backward = torch.library.custom_op(f"{name}_backward", _backward, mutates_args=(), schema=BACKWARD)
    backward.register_fake(lambda grad, q, prompt_lens, *, pool: q.new_empty(q.shape))


def _forward(q: Tensor, prompt_lens: Tensor, *, pool: int) -> Tensor:
    _check(q, prompt_lens, pool)
    kind = sum_dtype(q.dtype)
    pooled = q.new_empty(q.shape[0], q.shape[3], dtype=kind)
    for b, parts in enumerate(_parts(q, prompt_lens, pool)):
        sums = [q[b, :, part].sum((0, 1), dtype=kind) for part in parts]
        pooled[b] = (sums[0] + sums[1]) * _weight(q, parts)
    return pooled


def _fake(q: Tensor, prompt_lens: Tensor, *, pool: int) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[3], dtype=sum_dtype(q.dtype))


def _backward(grad: Tensor, q: Tensor, prompt_lens: Tensor, *, pool: int) -> Tensor:
    dq = q.new_zeros(q.shape)
    for b, parts in enumerate(_parts(q, prompt_lens, pool)):
        share = (grad[b] * _weight(q, parts)).to(q.dtype)
        for part in parts:
            dq[b, :, part] += share
    return dq


def _parts(q: Tensor, prompt_lens: Tensor, pool: int) -> list[tuple[slice, slice]]:
    return [(slice(0, min(pool, n)), slice(max(0, n - pool), n)) for n in prompt_lens.tolist()]


def _weight(q: Tensor, parts: tuple[slice, slice]) -> float:
    return 1.0 / (2 * q.shape[1] * parts[0].stop)


def _check(q: Tensor, prompt_lens: Tensor, pool: int) -> None:
    if q.dim() != 4 or q.numel() == 0:
        raise UserError(f"fluxc::router_pool: q must be [B,H,S,D] and not empty, is {tuple(q.shape)}")
    if pool < 1:
        raise UserError(f"fluxc::router_pool: pool is {pool}, must be at least 1")
    if prompt_lens.shape != (q.shape[0],):
        raise UserError(f"fluxc::router_pool: prompt_lens must be [{q.shape[0]}], is {tuple(prompt_lens.shape)}")
    low, high = int(prompt_lens.min()), int(prompt_lens.max())
    if low < 1 or high > q.shape[2]:
        raise UserError(f"fluxc::router_pool: prompt_lens must lie in 1..{q.shape[2]}, found {low}..{high}")


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], keyword_only_inputs: dict[str, int], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)
    ctx.pool = keyword_only_inputs["pool"]


def _autograd_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    q, prompt_lens = ctx.saved_tensors
    return torch.ops.fluxc.router_pool_backward(grad, q, prompt_lens, pool=ctx.pool), None
