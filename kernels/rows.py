"""Attention and its gradient over the row segments of `row_plan`, one request at a time.

A request never sees the others of its batch: its result is the same bit for bit alone and in any batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fluxc.kernels.band import groups, window_mask
from fluxc.kernels.explicit import sum_dtype
from fluxc.kernels.flash_pieces import Scores, as_kernels_want, fill, flash, flash_backward, has_kernel, merge_
from fluxc.kernels.row_plan import Segment


@dataclass(frozen=True)
class Request:
    """One request, heads grouped: q [Hk,G,S,D], k and v [Hk,1,T,D], out [Hk,G,S,D], lse [Hk,G,S].

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


@dataclass(frozen=True)
class Gradients:
    """Of one request: grad [Hk,G,S,D] of its output comes in, dq [Hk,G,S,D], dk and dv [Hk,1,T,D] are added up."""

    grad: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


def attend(
    q: Tensor, k: Tensor, v: Tensor, plans: Sequence[list[Segment]], how: Scores, sink_logits: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of q [B,H,S,D] over k [B,Hk,T,D], v [B,Hk,T,Dv]; plans[b] covers the rows of request b in order.

    -> out [B,S,H,Dv] contiguous and the log-sum-exp of each row [B,H,S] (sums dtype), sink logits included.
    """
    B, H, S, _ = q.shape
    width = v.shape[-1]
    q, k, v = as_kernels_want(q, k, v)
    out = q.new_empty(B, S, H, v.shape[-1])
    lse = q.new_empty(B, H, S, dtype=sum_dtype(q.dtype))
    for b, plan in enumerate(plans):
        request = _request(b, q, k, v, out, lse, plan)
        for segment in plan:
            forward = _band if segment.window else _full
            forward(request, segment, how)
    if sink_logits is not None:
        _add_sink_logits(out, lse, sink_logits)
    return out[..., :width].contiguous(), lse


def attend_keys(q: Tensor, parts: Iterable[Tensor], how: Scores, sink_logits: Tensor | None = None) -> Tensor:
    """Attention of one query q [H,D] over all keys and values, in parts [2,Hk,T,D] -> [H,D].

    The queries of a key head are the rows of a piece. A part's memory may be used again for the next one.
    """
    q = q if q.stride(-1) == 1 else q.contiguous()
    found = [flash(q.unflatten(0, (k.shape[0], -1))[None], k[None], v[None], how) for k, v in parts]
    out, lse = found[0]
    if len(found) > 1:
        lses = torch.cat([lse for _, lse in found])
        weights = torch.softmax(lses, 0).unsqueeze(-1)
        out = (torch.cat([out for out, _ in found]) * weights).sum(0, keepdim=True)
        lse = torch.logsumexp(lses, 0, keepdim=True)
    if sink_logits is not None:
        out = out * torch.sigmoid(lse - sink_logits.to(lse.dtype).view(lse.shape))[..., None]
    return out.flatten(0, 2).to(q.dtype)


def attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plans: Sequence[list[Segment]], how: Scores
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attend` for q, k, v, from its merged out [B,S,H,Dv] and log-sum-exp [B,H,S]."""
    shapes = q.shape, k.shape, v.shape
    q, k, v = as_kernels_want(q, k, v)
    grad, out = (fill(x.contiguous(), v.shape[-1]) for x in (grad, out))
    dq, dk, dv = (torch.zeros(x.shape, dtype=sum_dtype(x.dtype), device=x.device) for x in (q, k, v))
    for b, plan in enumerate(plans):
        request = _request(b, q, k, v, out, lse, plan)
        shares = _request(b, dq, dk, dv, grad, lse, plan)
        into = Gradients(shares.out, shares.q, shares.k, shares.v)
        for segment in plan:
            backward = _band_backward if segment.window else _full_backward
            backward(request, segment, how, into)
    dq, dk, dv = (x[..., : shape[-1]].to(q.dtype).contiguous() for x, shape in zip((dq, dk, dv), shapes, strict=True))
    return dq, dk, dv


def sink_logits_grad(grad: Tensor, out: Tensor, lse: Tensor, sink_logits: Tensor) -> Tensor:
    """Gradient [H] of the sink logits: minus their weight times <grad, out>, over all rows."""
    delta = (grad.to(lse.dtype) * out.to(lse.dtype)).sum(-1).transpose(1, 2)
    weight = torch.exp(sink_logits.to(lse.dtype)[:, None] - lse)
    return -(weight * delta).sum((0, 2)).to(sink_logits.dtype)


def _request(b: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: Sequence[Segment]) -> Request:
    split = (k.shape[1], -1)
    b_out = out[b].unflatten(1, split).permute(1, 2, 0, 3)
    b_k, b_v = k[b].unsqueeze(1), v[b].unsqueeze(1)
    return Request(q[b].unflatten(0, split), b_k, b_v, b_out, lse[b].unflatten(0, split), plan[0].begin)


def _full(request: Request, segment: Segment, how: Scores) -> None:
    rows, begin, end = request.rows(segment.begin, segment.end), segment.begin, segment.end
    q, out, lse = request.q[:, :, rows], request.out[:, :, rows], request.lse[:, :, rows]
    own = flash(q, request.k[:, :, begin:end], request.v[:, :, begin:end], how, causal=True)
    out.copy_(own[0])
    lse.copy_(own[1])
    if begin:
        merge_(out, lse, *flash(q, request.k[:, :, :begin], request.v[:, :, :begin], how))


def _full_backward(request: Request, segment: Segment, how: Scores, into: Gradients) -> None:
    rows = request.rows(segment.begin, segment.end)
    grad, q, out, lse = (x[:, :, rows] for x in (into.grad, request.q, request.out, request.lse))
    for keys, causal in ((slice(segment.begin, segment.end), True), (slice(0, segment.begin), False)):
        if keys.start == keys.stop:
            continue
        k, v = request.k[:, :, keys], request.v[:, :, keys]
        found = flash_backward(grad, q, k, v, out, lse, how, causal=causal)
        for total, part in zip((into.dq[:, :, rows], into.dk[:, :, keys], into.dv[:, :, keys]), found, strict=True):
            total += part


def _band(request: Request, segment: Segment, how: Scores) -> None:
    mask = request.q.new_empty(0)
    for group in groups(segment, views_are_copied=not has_kernel(request.q, how, mask)):
        rows = request.rows(group.begin, group.end)
        if mask.shape[-1] != segment.window - 1 + group.tokens:
            mask = window_mask(group, request.q.shape[1], request.q)
        q = group.fold(request.q[:, :, rows])
        out, lse = flash(q, group.windows(request.k), group.windows(request.v), how, mask=mask)
        if segment.sink:
            merge_(out, lse, *flash(q, group.sinks(request.k), group.sinks(request.v), how))
        request.out[:, :, rows].unflatten(2, (group.count, -1)).copy_(group.unfold(out))
        request.lse[:, :, rows].unflatten(2, (group.count, -1)).copy_(group.unfold(lse))


def _band_backward(request: Request, segment: Segment, how: Scores, into: Gradients) -> None:
    for group in groups(segment, views_are_copied=True):
        rows = request.rows(group.begin, group.end)
        mask = window_mask(group, request.q.shape[1], request.q)
        grad, q, out, lse = (group.fold(x[:, :, rows]) for x in (into.grad, request.q, request.out, request.lse))
        k, v = group.windows(request.k), group.windows(request.v)
        dq, dk, dv = flash_backward(grad, q, k, v, out, lse, how, mask=mask)
        into.dq[:, :, rows].unflatten(2, (group.count, -1)).add_(group.unfold(dq))
        for chunk, keys in enumerate(group.views):
            into.dk[:, 0, keys] += dk[chunk]
            into.dv[:, 0, keys] += dv[chunk]
        if segment.sink:
            k, v = group.sinks(request.k), group.sinks(request.v)
            dq, dk, dv = flash_backward(grad, q, k, v, out, lse, how)
            into.dq[:, :, rows].unflatten(2, (group.count, -1)).add_(group.unfold(dq))
            into.dk[:, 0, : segment.sink] += dk.sum(0, dtype=into.dk.dtype)
            into.dv[:, 0, : segment.sink] += dv.sum(0, dtype=into.dv.dtype)


def _add_sink_logits(out: Tensor, lse: Tensor, sink_logits: Tensor) -> None:
    sink = sink_logits.to(lse.dtype)[:, None]
    keep = torch.sigmoid(lse - sink).transpose(1, 2).unsqueeze(-1)
    out.copy_(out * keep)
    torch.logaddexp(lse, sink.expand_as(lse), out=lse)
