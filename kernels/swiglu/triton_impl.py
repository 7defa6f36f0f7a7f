"""`fluxc::swiglu` by a Triton kernel."""

from __future__ import annotations

from torch import Tensor

from fluxc.kernels.triton_available import unavailable


def supported(gate: Tensor, up: Tensor) -> str | None:
    """Why this call (the op's own arguments) is not served, or None."""
    if reason := unavailable(gate):
        return reason
    from fluxc.kernels import triton_fused

    return triton_fused.unsupported(gate)


def forward(gate: Tensor, up: Tensor) -> Tensor:
    """The op's output; the call must be supported."""
    from fluxc.kernels import triton_fused

    return triton_fused.swiglu(gate, up)
