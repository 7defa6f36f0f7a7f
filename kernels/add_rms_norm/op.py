"""`fluxc::add_rms_norm`: the residual sum and the norm that follows it, in one pass over memory."""

from __future__ import annotations

import torch
from torch import Tensor

from fluxc.errors import UserError
from fluxc.kernels.define import Provider, choose, define_plain, triton_provider
from fluxc.kernels.explicit import sum_dtype


def define() -> None:
    """Define torch.ops.fluxc.add_rms_norm."""
    define_plain("add_rms_norm", run, lambda x, *args, eps: (x.new_empty(x.shape), x.new_empty(x.shape)))


def providers() -> tuple[Provider, ...]:
    """In order of preference."""
    return triton_provider("add_rms_norm"), Provider("torch", lambda *args, **kwargs: None, _composed)


def run(x: Tensor, residual: Tensor, weight: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    """(normalised, sum) by the first provider that takes the call; raises UserError for arguments that do not fit."""
    for name, found, wanted in (("residual", residual, x.shape), ("weight", weight, x.shape[-1:])):
        if found.shape != wanted or found.dtype != x.dtype:
            given = f"{found.dtype} {tuple(found.shape)}"
            raise UserError(f"fluxc::add_rms_norm: {name} is {given}, must be {x.dtype} {tuple(wanted)}")
    return choose("add_rms_norm", providers(), x, residual, weight, eps=eps).run(x, residual, weight, eps=eps)


def _composed(x: Tensor, residual: Tensor, weight: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    total = (x + residual).contiguous(memory_format=torch.contiguous_format)
    wide = total.to(sum_dtype(x.dtype))
    normed = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    return normed * weight, total
