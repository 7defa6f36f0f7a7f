"""`fluxc::append_attention` by the Triton kernel: lengths, pages, sinks and windows are read on the device."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fluxc.kernels.triton_available import unavailable


def supported(
    q: Tensor, k: Tensor, v: Tensor, cache: Tensor, page_table: Tensor, lens: Tensor, *rest: Tensor, **options: Any
) -> str | None:
    """Why this call (the op's own arguments) is not served, or None."""
    if reason := unavailable(q):
        return reason
    from fluxc.kernels import triton_append

    return triton_append.unsupported(q, k, v, cache, page_table, lens)


def forward(*tensors: Tensor, layer: int, **options: Any) -> Tensor:
    """The op's output [B,S,H,D]; the call must be supported."""
    from fluxc.kernels import triton_append

    return triton_append.append_attention(*tensors, **options)
