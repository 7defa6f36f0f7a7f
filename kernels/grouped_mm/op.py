"""`fluxc::grouped_mm`: the products of a mixture of experts, tokens sorted by expert.

torch has `_grouped_mm`, but its fake takes bf16 alone, so a program in another dtype could not be retyped or checked.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from fluxc.errors import UserError
from fluxc.kernels.schemas import NAMESPACE, SCHEMAS

WEIGHT_GRAD = "(Tensor x, Tensor grad, Tensor ends) -> Tensor"


def define() -> None:
    """Define torch.ops.fluxc.grouped_mm and the internal op that gives its weight's gradient."""
    name = f"{NAMESPACE}::grouped_mm"
    op = torch.library.custom_op(name, _forward, mutates_args=(), schema=SCHEMAS["grouped_mm"])
    op.register_fake(lambda x, weight, ends: x.new_empty(x.shape[0], weight.shape[2]))
    op.register_autograd(_backward, setup_context=_setup_context)
    weight_grad = torch.library.custom_op(f"{name}_weight_grad", _weight_grad, mutates_args=(), schema=WEIGHT_GRAD)
    weight_grad.register_fake(lambda x, grad, ends: x.new_empty(ends.shape[0], x.shape[1], grad.shape[1]))


def _forward(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    _check(x, weight, ends)
    if x.device.type == "cuda" and x.dtype == torch.bfloat16:
        return torch.ops.aten._grouped_mm(x.contiguous(), weight, offs=ends).contiguous()
    if x.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return by_row(x, weight, ends)
    out = x.new_zeros(x.shape[0], weight.shape[2])
    for group, rows in enumerate(_groups(ends)):
        torch.mm(x[rows], weight[group], out=out[rows])
    return out


def by_row(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """The same with one matrix copied for each row, T*K*N values: for the few rows of a decode step.

    The host does not read `ends`, so that it can be part of a CUDA graph.
    """
    rows = torch.arange(x.shape[0], dtype=ends.dtype, device=x.device)
    group = torch.searchsorted(ends, rows, right=True, out_int32=True)
    beyond = group >= weight.shape[0]
    product = torch.bmm(x[:, None], weight[group.clamp(max=weight.shape[0] - 1)])[:, 0]
    return product.masked_fill(beyond[:, None], 0)


def _weight_grad(x: Tensor, grad: Tensor, ends: Tensor) -> Tensor:
    out = x.new_zeros(ends.shape[0], x.shape[1], grad.shape[1])
    for group, rows in enumerate(_groups(ends)):
        torch.mm(x[rows].t(), grad[rows], out=out[group])
    return out


def _groups(ends: Tensor) -> list[slice]:
    """Rows of each group; on a GPU this waits for `ends` once."""
    limits = [0, *ends.tolist()]
    return [slice(start, end) for start, end in itertools.pairwise(limits)]


def _check(x: Tensor, weight: Tensor, ends: Tensor) -> None:
    if x.dim() != 2 or weight.dim() != 3 or x.shape[1] != weight.shape[1]:
        shapes = f"{tuple(x.shape)} and {tuple(weight.shape)}"
        raise UserError(f"fluxc::grouped_mm: x must be [T,K] and weight [E,K,N], are {shapes}")
    if x.dtype != weight.dtype:
        raise UserError(f"fluxc::grouped_mm: x is {x.dtype} and weight is {weight.dtype}")
    if ends.shape != weight.shape[:1] or ends.dtype != torch.int32:
        raise UserError(f"fluxc::grouped_mm: ends must be i32[{weight.shape[0]}], is {ends.dtype}{tuple(ends.shape)}")


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, weight, ends = ctx.saved_tensors
    wanted_x, wanted_weight, _ = ctx.needs_input_grad
    ops = torch.ops.fluxc
    dx = ops.grouped_mm(grad.contiguous(), weight.transpose(1, 2), ends) if wanted_x else None
    return dx, ops.grouped_mm_weight_grad(x, grad, ends) if wanted_weight else None, None
