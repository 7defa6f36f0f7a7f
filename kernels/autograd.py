"""Gradients of the attention ops: one internal op pair for all of them.

An attention op itself returns only its output. Where a gradient is wanted, its Autograd kernel calls `rows_forward`,
which also returns the log-sum-exp of each row, and whose backward is the op `rows_backward`. Both are opaque to
tracing, so training graphs export as well, and both need memory linear in the length.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fluxc.kernels import triton_rows
from fluxc.kernels.explicit import sum_dtype
from fluxc.kernels.row_call import RowCall, RowOptions, check
from fluxc.kernels.rows import attend_backward, sink_logits_grad
from fluxc.kernels.schemas import NAMESPACE

_REQUESTS = "Tensor? route, Tensor? prompt_lens, Tensor? q_start, Tensor? sink_logits"
_OPTIONS = "str op, float scale, float softcap, str kind, int sink, int window, int last, bool decode_full"
FORWARD = f"(Tensor q, Tensor k, Tensor v, {_REQUESTS}, *, {_OPTIONS}) -> (Tensor, Tensor)"
BACKWARD = (
    f"(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_REQUESTS}, *, {_OPTIONS}) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)


def define() -> None:
    """Define torch.ops.fluxc.rows_forward and rows_backward."""
    op = torch.library.custom_op(f"{NAMESPACE}::rows_forward", forward, mutates_args=(), schema=FORWARD)
    op.register_fake(_forward_fake)
    op.register_autograd(_autograd_backward, setup_context=_setup_context)
    op = torch.library.custom_op(f"{NAMESPACE}::rows_backward", backward, mutates_args=(), schema=BACKWARD)
    op.register_fake(_backward_fake)


def apply(op: str, call: RowCall) -> Tensor:
    """The output of `call`, made by op `op`: [B,S,H,Dv], on the autograd tape."""
    opt = call.options
    out, _ = torch.ops.fluxc.rows_forward(
        call.q,
        call.k,
        call.v,
        call.route,
        call.prompt_lens,
        call.q_start,
        call.sink_logits,
        op=op,
        scale=opt.scale,
        softcap=opt.softcap,
        kind=opt.kind,
        sink=opt.sink,
        window=opt.window,
        last=opt.last,
        decode_full=opt.decode_full,
    )
    return out


def needs_grad(call: RowCall) -> bool:
    """Whether autograd records this call."""
    tensors = (call.q, call.k, call.v, call.sink_logits)
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    route: Tensor | None,
    prompt_lens: Tensor | None,
    q_start: Tensor | None,
    sink_logits: Tensor | None,
    *,
    op: str,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Output [B,S,H,Dv] and log-sum-exp [B,H,S], without a tape; options of RowOptions."""
    call = RowCall(q, k, v, RowOptions(**options), route, prompt_lens, q_start, sink_logits)
    check(op, call)
    return triton_rows.forward(call) if triton_rows.serves(call) else call.forward()


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *requests: Any, **options: Any) -> tuple[Tensor, Tensor]:
    B, H, S, _ = q.shape
    return q.new_empty(B, S, H, v.shape[-1]), q.new_empty(B, H, S, dtype=sum_dtype(q.dtype))


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    route: Tensor | None,
    prompt_lens: Tensor | None,
    q_start: Tensor | None,
    sink_logits: Tensor | None,
    *,
    op: str,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the sink logits (empty for none)."""
    call = RowCall(q, k, v, RowOptions(**options), route, prompt_lens, q_start, sink_logits)
    if triton_rows.serves(call):
        return (*triton_rows.backward(call, out, lse, grad), q.new_empty(0))
    grads = attend_backward(grad, q, k, v, out, lse, call.plans(), call.options.scores)
    sink = q.new_empty(0) if sink_logits is None else sink_logits_grad(grad, out, lse, sink_logits)
    return (*grads, sink)


def _backward_fake(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    route: Tensor | None,
    prompt_lens: Tensor | None,
    q_start: Tensor | None,
    sink_logits: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sink = q.new_empty(0) if sink_logits is None else sink_logits.new_empty(sink_logits.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), sink


def _setup_context(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.options = keyword_only_inputs
    ctx.mark_non_differentiable(output[1])


def _autograd_backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, route, prompt_lens, q_start, sink_logits, out, lse = ctx.saved_tensors
    dq, dk, dv, sink = torch.ops.fluxc.rows_backward(
        grad, q, k, v, out, lse, route, prompt_lens, q_start, sink_logits, **ctx.options
    )
    return dq, dk, dv, None, None, None, None if sink_logits is None else sink
