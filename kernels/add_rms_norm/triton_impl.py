"""`fluxc::add_rms_norm` by a Triton kernel."""

from __future__ import annotations

from torch import Tensor

from fluxc.kernels.triton_available import unavailable


def supported(x: Tensor, residual: Tensor, weight: Tensor, *, eps: float) -> str | None:
    """Why this call (the op's own arguments) is not served, or None."""
    if reason := unavailable(x):
        return reason
    from fluxc.kernels import triton_fused

    return triton_fused.unsupported(x)


def forward(x: Tensor, residual: Tensor, weight: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    """The op's outputs; the call must be supported."""
    from fluxc.kernels import triton_fused

    return triton_fused.add_rms_norm(x, residual, weight, eps=eps)
