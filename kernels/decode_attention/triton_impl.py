"""`fluxc::decode_attention` by the Triton kernel: split over pages, lengths and pages read on the device."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fluxc.kernels.triton_available import unavailable


def supported(q: Tensor, cache: Tensor, page_table: Tensor, lens: Tensor, **options: Any) -> str | None:
    """Why this call (the op's own arguments) is not served, or None."""
    if reason := unavailable(q):
        return reason
    from fluxc.kernels import triton_decode

    return triton_decode.unsupported(q, cache, page_table, lens)


def forward(q: Tensor, cache: Tensor, page_table: Tensor, lens: Tensor, *, layer: int, **options: Any) -> Tensor:
    """The op's output [B,H,D]; the call must be supported."""
    from fluxc.kernels import triton_decode

    return triton_decode.decode_attention(q, cache, page_table, lens, **options)
