"""`fluxc::router_pool` by a Triton kernel."""

from __future__ import annotations

from torch import Tensor

from fluxc.kernels.triton_available import unavailable


def supported(q: Tensor, prompt_lens: Tensor, *, pool: int) -> str | None:
    """Why this call (the op's own arguments) is not served, or None."""
    if reason := unavailable(q):
        return reason
    from fluxc.kernels import triton_router

    return triton_router.unsupported(q)


def forward(q: Tensor, prompt_lens: Tensor, *, pool: int) -> Tensor:
    """The op's output, fp32 [B,D]; the call must be supported."""
    from fluxc.kernels import triton_router

    return triton_router.router_pool(q, prompt_lens, pool=pool)
