"""The attention of a RowCall, with the log-sum-exp of its rows, and its gradient, by the Triton kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from fluxc.kernels.triton_available import unavailable

if TYPE_CHECKING:
    from fluxc.kernels.row_call import RowCall
    from fluxc.kernels.triton_launch import Call


def serves(call: RowCall) -> bool:
    """Whether both directions of this call are served; forward and backward must ask with the same tensors."""
    if unavailable(call.q):
        return False
    from fluxc.kernels import triton_backward

    return triton_backward.unsupported(call.q, call.k, call.v, _launched(call)) is None


def forward(call: RowCall) -> tuple[Tensor, Tensor]:
    """Output [B,S,H,D] and log-sum-exp fp32 [B,H,S]."""
    from fluxc.kernels import triton_launch

    return triton_launch.attend_with_lse(call.q, call.k, call.v, _launched(call))


def backward(call: RowCall, out: Tensor, lse: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv, contiguous."""
    from fluxc.kernels import triton_backward

    return triton_backward.gradients(call.q, call.k, call.v, out, lse, grad, _launched(call))


def _launched(call: RowCall) -> Call:
    from fluxc.kernels.triton_launch import Call

    opt = call.options
    last = opt.last if opt.kind == "triangle" else 0
    decode_full = opt.decode_full and opt.kind == "triangle"
    lens = call.prompt_lens if last or decode_full else None
    return Call(
        opt.scale, opt.sink, opt.window, last, decode_full, lens, call.route, opt.softcap, call.sink_logits,
        call.q_start,
    )  # fmt: skip
