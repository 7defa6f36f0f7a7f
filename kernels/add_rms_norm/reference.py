"""Reference of `fluxc::add_rms_norm`, fp32 or wider."""

from __future__ import annotations

import torch
from torch import Tensor


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    """RMSNorm(x + residual) * weight, and the sum rounded to x's dtype, both in the dtype of the sums."""
    wide = torch.promote_types(x.dtype, torch.float32)
    total = (x + residual).to(wide)
    return total * torch.rsqrt(total.square().mean(-1, keepdim=True) + eps) * weight.to(wide), total
