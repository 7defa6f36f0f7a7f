"""`fluxc::streaming_attention` by the Triton kernels."""

from __future__ import annotations

from torch import Tensor

from fluxc.kernels import triton_launch
from fluxc.kernels.triton_launch import Call


def _call(*, scale: float, layer: int, sink: int, window: int, softcap: float = 0.0,
          sink_logits: Tensor | None = None, q_start: Tensor | None = None) -> Call:  # fmt: skip
    return Call(scale, sink, window, softcap=softcap, sink_logits=sink_logits, q_start=q_start)


def supported(q: Tensor, k: Tensor, v: Tensor, **options: object) -> str | None:
    """Why this call (the op's own arguments) is not served, or None."""
    return triton_launch.unsupported(q, k, v, _call(**options))


def forward(q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
    """The op's output [B,S,H,Dv]; the call must be supported."""
    return triton_launch.attend(q, k, v, _call(**options))
