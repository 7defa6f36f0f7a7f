"""Reference of `fluxc::grouped_mm`: one product a row, in fp32."""

from __future__ import annotations

import torch
from torch import Tensor


def grouped_mm(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """x [T,K], weight [E,K,N], ends i32[E] -> fp32 [T,N]: row t times the weight of its group."""
    out = torch.zeros(x.shape[0], weight.shape[2])
    for row in range(x.shape[0]):
        group = next(g for g, end in enumerate(ends.tolist()) if row < end)
        out[row] = x[row].float() @ weight[group].float()
    return out
