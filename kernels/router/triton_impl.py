"""`fluxc::router` by two Triton launches: the pool, and the encoder with the head."""

from __future__ import annotations

from torch import Tensor

from fluxc.kernels.triton_available import unavailable


def supported(q: Tensor, prompt_lens: Tensor, *weights: Tensor, pool: int) -> str | None:
    """Why this call (the op's own arguments) is not served, or None."""
    if reason := unavailable(q):
        return reason
    from fluxc.kernels import triton_router

    return triton_router.unsupported(q, *weights)


def forward(q: Tensor, prompt_lens: Tensor, *weights: Tensor, pool: int) -> Tensor:
    """The op's output, fp32 [B,2]; the call must be supported."""
    from fluxc.kernels import triton_router

    return triton_router.router(q, prompt_lens, *weights, pool=pool)
