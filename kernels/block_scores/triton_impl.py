"""`fluxc::block_scores` by two Triton launches."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fluxc.kernels.triton_available import unavailable


def supported(q: Tensor, k: Tensor, *, block: int, stride: int, **options: Any) -> str | None:
    """Why this call (the op's own arguments) is not served, or None."""
    if reason := unavailable(q):
        return reason
    from fluxc.kernels import triton_scores

    return triton_scores.unsupported(q, k, block=block, stride=stride)


def forward(q: Tensor, k: Tensor, *, layer: int, **options: Any) -> tuple[Tensor, Tensor]:
    """The op's outputs; the call must be supported."""
    from fluxc.kernels import triton_scores

    return triton_scores.block_scores(q, k, **options)
