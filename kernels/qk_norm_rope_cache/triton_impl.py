"""`fluxc::qk_norm_rope_cache` by a Triton kernel, which reads slots and lengths on the device."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fluxc.kernels.triton_available import unavailable


def supported(q: Tensor, k: Tensor, v: Tensor, *rest: Any, eps: float, pool: int) -> str | None:
    """Why this call (the op's own arguments) is not served, or None."""
    if reason := unavailable(q):
        return reason
    from fluxc.kernels import triton_qkv

    return triton_qkv.unsupported(q, k, v, *rest)


def forward(*args: Any, eps: float, pool: int) -> tuple[Tensor, Tensor, Tensor]:
    """The op's outputs; the call must be supported."""
    from fluxc.kernels import triton_qkv

    return triton_qkv.qk_norm_rope_cache(*args, eps=eps, pool=pool)
