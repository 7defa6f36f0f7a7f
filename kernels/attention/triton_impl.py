"""`fluxc::attention` by the Triton kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from fluxc.kernels.triton_available import unavailable

if TYPE_CHECKING:
    from fluxc.kernels.triton_launch import Call


def _call(*, scale: float, layer: int, window: int = 0, softcap: float = 0.0, sink_logits: Tensor | None = None,
          q_start: Tensor | None = None) -> Call:  # fmt: skip
    from fluxc.kernels.triton_launch import Call

    return Call(scale, window=window, softcap=softcap, sink_logits=sink_logits, q_start=q_start)


def supported(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> str | None:
    """Why this call (the op's own arguments) is not served, or None."""
    if reason := unavailable(q):
        return reason
    from fluxc.kernels import triton_launch

    return triton_launch.unsupported(q, k, v, _call(**options))


def fastest(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> bool:
    """Whether a supported call takes a kernel that was measured faster than SDPA: the Hopper kernel."""
    from fluxc.kernels import triton_launch

    return triton_launch.choose(q, k, v, _call(**options)).loader == "gluon"


def forward(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """The op's output [B,S,H,Dv]; the call must be supported."""
    from fluxc.kernels import triton_launch

    return triton_launch.attend(q, k, v, _call(**options))
