"""`fluxc::kv_write` by a Triton kernel, without reading the slots on the host."""

from __future__ import annotations

from torch import Tensor

from fluxc.kernels.triton_available import unavailable


def supported(cache: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> str | None:
    """Why this call (the op's own arguments) is not served, or None."""
    if reason := unavailable(cache):
        return reason
    from fluxc.kernels import triton_kv

    return triton_kv.unsupported(cache, k, v)


def forward(cache: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    """Write in place; the call must be supported."""
    from fluxc.kernels import triton_kv

    triton_kv.kv_write(cache, k, v, slots)
