"""Attention and its gradient over the row segments of `row_plan`, one request at a time.

A request never sees the others of its batch: its result is the same bit for bit alone and in any batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fluxc.kernels.band import chunks, fold, unfold
from fluxc.kernels.explicit import sum_dtype
from fluxc.kernels.flash_pieces import Scores, flash, flash_backward, merge_
from fluxc.kernels.row_plan import Segment


@dataclass(frozen=True)
class Request:
    """One request, heads grouped: q [Hk,G,S,D], k [Hk,T,D], v [Hk,T,Dv], out [Hk,G,S,Dv], lse [Hk,G,S].

    `start` is the absolute position of the first row.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor
    start: int

    def rows(self, begin: int, end: int) -> slice:
        """Index of absolute rows [begin, end)."""
        return slice(begin - self.start, end - self.start)


def attend(
    q: Tensor, k: Tensor, v: Tensor, plans: Sequence[list[Segment]], how: Scores, sink_logits: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of q [B,H,S,D] over k [B,Hk,T,D], v [B,Hk,T,Dv]; plans[b] covers the rows of request b in order.

    -> out [B,S,H,Dv] contiguous and the log-sum-exp of each row [B,H,S] (sums dtype), sink logits included.
    """
    B, H, S, _ = q.shape
    out = q.new_empty(B, S, H, v.shape[-1])
    lse = q.new_empty(B, H, S, dtype=sum_dtype(q.dtype))
    for b, plan in enumerate(plans):
        request = _request(b, q, k, v, out, lse, plan)
        for segment in plan:
            forward = _band if segment.window else _full
            forward(request, segment, how)
    if sink_logits is not None:
        _add_sink_logits(out, lse, sink_logits)
    return out, lse


def attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plans: Sequence[list[Segment]], how: Scores
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attend` for q, k, v, from its merged out [B,S,H,Dv] and log-sum-exp [B,H,S]."""
    dq, dk, dv = (torch.zeros(x.shape, dtype=sum_dtype(x.dtype), device=x.device) for x in (q, k, v))
    for b, plan in enumerate(plans):
        request = _request(b, q, k, v, out, lse, plan)
        b_grad, b_dq = _heads_first(grad[b], k.shape[1]), dq[b].unflatten(0, (k.shape[1], -1))
        for segment in plan:
            backward = _band_backward if segment.window else _full_backward
            backward(request, segment, how, b_grad, b_dq, dk[b], dv[b])
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def sink_logits_grad(grad: Tensor, out: Tensor, lse: Tensor, sink_logits: Tensor) -> Tensor:
    """Gradient [H] of the sink logits: minus their weight times <grad, out>, over all rows."""
    delta = (grad.to(lse.dtype) * out.to(lse.dtype)).sum(-1).transpose(1, 2)
    weight = torch.exp(sink_logits.to(lse.dtype)[:, None] - lse)
    return -(weight * delta).sum((0, 2)).to(sink_logits.dtype)


def _request(b: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: Sequence[Segment]) -> Request:
    split = (k.shape[1], -1)
    return Request(
        q[b].unflatten(0, split),
        k[b],
        v[b],
        _heads_first(out[b], k.shape[1]),
        lse[b].unflatten(0, split),
        plan[0].begin,
    )


def _heads_first(x: Tensor, kv_heads: int) -> Tensor:
    """[S,H,Dv] -> view [Hk,G,S,Dv]."""
    return x.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)


def _full(request: Request, segment: Segment, how: Scores) -> None:
    rows, begin, end = request.rows(segment.begin, segment.end), segment.begin, segment.end
    q, out, lse = request.q[:, :, rows], request.out[:, :, rows], request.lse[:, :, rows]
    own = flash(q, request.k[:, begin:end], request.v[:, begin:end], how, causal=True)
    out.copy_(own[0])
    lse.copy_(own[1])
    if begin:
        merge_(out, lse, *flash(q, request.k[:, :begin], request.v[:, :begin], how))


def _band(request: Request, segment: Segment, how: Scores) -> None:
    groups = request.q.shape[1]
    for chunk in chunks(segment, request.k, request.v, groups):
        rows = request.rows(chunk.rows.start, chunk.rows.stop)
        out, lse = flash(fold(request.q[:, :, rows]), chunk.k, chunk.v, how, mask=chunk.mask)
        request.out[:, :, rows] = unfold(out, groups)
        request.lse[:, :, rows] = unfold(lse, groups)


def _full_backward(
    request: Request, segment: Segment, how: Scores, grad: Tensor, dq: Tensor, dk: Tensor, dv: Tensor
) -> None:
    rows = request.rows(segment.begin, segment.end)
    by_row = [x[:, :, rows] for x in (request.q, request.out, request.lse)]
    for keys, causal in ((slice(segment.begin, segment.end), True), (slice(0, segment.begin), False)):
        if keys.start == keys.stop:
            continue
        q, out, lse = by_row
        found = flash_backward(
            grad[:, :, rows], q, request.k[:, keys], request.v[:, keys], out, lse, how, causal=causal
        )
        for total, part in zip((dq[:, :, rows], dk[:, keys], dv[:, keys]), found, strict=True):
            total += part


def _band_backward(
    request: Request, segment: Segment, how: Scores, grad: Tensor, dq: Tensor, dk: Tensor, dv: Tensor
) -> None:
    sink, groups = segment.sink, request.q.shape[1]
    for chunk in chunks(segment, request.k, request.v, groups):
        rows = request.rows(chunk.rows.start, chunk.rows.stop)
        b_grad, q, out, lse = (fold(x[:, :, rows]) for x in (grad, request.q, request.out, request.lse))
        found = flash_backward(b_grad, q, chunk.k, chunk.v, out, lse, how, mask=chunk.mask)
        dq[:, :, rows] += unfold(found[0], groups)
        for total, part in zip((dk, dv), found[1:], strict=True):
            total[:, :sink] += part[:, :sink]
            total[:, chunk.keys] += part[:, sink:]


def _add_sink_logits(out: Tensor, lse: Tensor, sink_logits: Tensor) -> None:
    sink = sink_logits.to(lse.dtype)[:, None]
    keep = torch.sigmoid(lse - sink).transpose(1, 2).unsqueeze(-1)
    out.copy_(out * keep)
    torch.logaddexp(lse, sink.expand_as(lse), out=lse)
