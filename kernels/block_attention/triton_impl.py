"""`fluxc::block_attention` by the Triton kernel: lists and counts are read on the device."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fluxc.kernels.triton_available import unavailable


def supported(q: Tensor, k: Tensor, v: Tensor, *lists: Tensor, scale: float, block: int, **options: Any) -> str | None:
    """Why this call (the op's own arguments) is not served, or None."""
    if reason := unavailable(q):
        return reason
    from fluxc.kernels import triton_block

    return triton_block.unsupported(q, k, v, scale, block)


def forward(*tensors: Tensor, layer: int, **options: Any) -> Tensor:
    """The op's output [B,S,H,Dv]; the call must be supported."""
    from fluxc.kernels import triton_block

    return triton_block.block_attention(*tensors, **options)
