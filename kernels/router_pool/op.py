"""`fluxc::router_pool`: prefix-suffix pooling of a layer's queries, the Layer Router's input (paper, "Layer Router").

The mean runs over all heads and over the first and the last `pool` rows of the prompt. Both parts always hold the same
number of rows, min(pool, n), so it is the mean of the prefix mean and the suffix mean.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fluxc.errors import UserError
from fluxc.kernels.define import Provider, choose, triton_provider
from fluxc.kernels.explicit import sum_dtype
from fluxc.kernels.schemas import NAMESPACE, SCHEMAS

BACKWARD = "(Tensor grad, Tensor q, Tensor prompt_lens, *, int pool) -> Tensor"


def define() -> None:
    """Define torch.ops.fluxc.router_pool and its internal backward."""
    name = f"{NAMESPACE}::router_pool"
    op = torch.library.custom_op(name, run, mutates_args=(), schema=SCHEMAS["router_pool"])
    op.register_fake(_fake)
    op.register_autograd(_autograd_backward, setup_context=_setup_context)
    backward = torch.library.custom_op(f"{name}_backward", _backward, mutates_args=(), schema=BACKWARD)
    backward.register_fake(lambda grad, q, prompt_lens, *, pool: q.new_empty(q.shape))


def providers() -> tuple[Provider, ...]:
    """In order of preference."""
    return triton_provider("router_pool"), Provider("torch", lambda *args, **kwargs: None, _means)


def run(q: Tensor, prompt_lens: Tensor, *, pool: int) -> Tensor:
    """Output [B,D] by the first provider that takes the call; raises UserError for arguments that do not fit."""
    check("router_pool", q, prompt_lens, pool)
    return choose("router_pool", providers(), q, prompt_lens, pool=pool).run(q, prompt_lens, pool=pool)


def _means(q: Tensor, prompt_lens: Tensor, *, pool: int) -> Tensor:
    """A request at a time; reads prompt_lens on the host."""
    kind = sum_dtype(q.dtype)
    pooled = q.new_empty(q.shape[0], q.shape[3], dtype=kind)
    for b, parts in enumerate(_parts(q, prompt_lens, pool)):
        sums = [q[b, :, part].sum((0, 1), dtype=kind) for part in parts]
        pooled[b] = (sums[0] + sums[1]) * _weight(q, parts)
    return pooled


def _fake(q: Tensor, prompt_lens: Tensor, *, pool: int) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[3], dtype=sum_dtype(q.dtype))


def _backward(grad: Tensor, q: Tensor, prompt_lens: Tensor, *, pool: int) -> Tensor:
    """dq [B,H,S,D]: how often each row was pooled times its share. Reads nothing on the host."""
    row, length = torch.arange(q.shape[2], device=q.device), prompt_lens[:, None]
    times = (row < length.clamp(max=pool)).to(grad.dtype) + ((row >= length - pool) & (row < length))
    share = grad / (2 * q.shape[1] * length.clamp(max=pool))
    rows = (times[:, :, None] * share[:, None]).to(q.dtype)
    return rows[:, None].expand(q.shape).contiguous()


def _parts(q: Tensor, prompt_lens: Tensor, pool: int) -> list[tuple[slice, slice]]:
    return [(slice(0, min(pool, n)), slice(max(0, n - pool), n)) for n in prompt_lens.tolist()]


def _weight(q: Tensor, parts: tuple[slice, slice]) -> float:
    return 1.0 / (2 * q.shape[1] * parts[0].stop)


def check(op: str, q: Tensor, prompt_lens: Tensor, pool: int) -> None:
    """Raise UserError, naming the op, the argument and the limit, if the arguments do not fit."""
    if q.dim() != 4 or q.numel() == 0:
        raise UserError(f"fluxc::{op}: q must be [B,H,S,D] and not empty, is {tuple(q.shape)}")
    if pool < 1:
        raise UserError(f"fluxc::{op}: pool is {pool}, must be at least 1")
    if prompt_lens.shape != (q.shape[0],):
        raise UserError(f"fluxc::{op}: prompt_lens must be [{q.shape[0]}], is {tuple(prompt_lens.shape)}")
    if prompt_lens.is_cuda:
        return  # reading the values would stall the device; the kernel answers a bad length with NaN
    low, high = int(prompt_lens.min()), int(prompt_lens.max())
    if low < 1 or high > q.shape[2]:
        raise UserError(f"fluxc::{op}: prompt_lens must lie in 1..{q.shape[2]}, found {low}..{high}")


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], keyword_only_inputs: dict[str, int], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)
    ctx.pool = keyword_only_inputs["pool"]


def _autograd_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    q, prompt_lens = ctx.saved_tensors
    return torch.ops.fluxc.router_pool_backward(grad, q, prompt_lens, pool=ctx.pool), None
