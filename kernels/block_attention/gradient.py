"""The gradient of `fluxc::block_attention`: a block of queries at a time, its scores written out again.

It costs what the gradient of full attention costs: for calibration, which asks what a layer's blocks are worth, not
for training at length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fluxc.kernels.explicit import explicit, explicit_backward, sum_dtype
from fluxc.kernels.flash_pieces import Scores
from fluxc.kernels.rows import sink_logits_grad

Gradient = tuple[Tensor, Tensor, Tensor, Tensor]


def block_gradient(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    count: Tensor,
    how: Scores,
    block: int,
    sink_logits: Tensor | None,
) -> Gradient:
    """dq [H,S,D], dk and dv [Hk,S,D] in the dtype of sums, and the sink logits' [H] (empty for none), of one request.

    grad [S,H,Dv], q [H,S,D], k and v [Hk,S,D], index i32[H,Sb,M], count i32[H,Sb], every list with its own block.
    """
    kind = sum_dtype(q.dtype)
    dq, dk, dv = (torch.zeros(x.shape, dtype=kind, device=q.device) for x in (q, k, v))
    sinks = torch.zeros(0 if sink_logits is None else len(q), dtype=kind, device=q.device)
    for n in range(count.shape[1]):
        rows = slice(n * block, min((n + 1) * block, q.shape[1]))
        seen = slice(0, rows.stop)
        mask = _mask(index[:, n], count[:, n], rows, block).unflatten(0, (k.shape[0], -1))
        operands = q[:, rows].unflatten(0, (k.shape[0], -1)), k[:, None, seen], v[:, None, seen]
        out, lse = explicit(*operands, how.scale, how.softcap, False, mask)
        b_grad = grad[rows].transpose(0, 1)
        if sink_logits is not None:
            sink = sink_logits.to(kind).view(k.shape[0], -1, 1)
            out, lse = out * torch.sigmoid(lse - sink)[..., None], torch.logaddexp(lse, sink.expand_as(lse))
            heads_last = out.flatten(0, 1).transpose(0, 1)[None]
            sinks += sink_logits_grad(grad[None, rows], heads_last, lse.flatten(0, 1)[None], sink_logits)
        found = explicit_backward(
            b_grad.unflatten(0, (k.shape[0], -1)), *operands, out, lse, how.scale, how.softcap, False, mask
        )
        dq[:, rows] = found[0].flatten(0, 1)
        dk[:, seen] += found[1][:, 0]
        dv[:, seen] += found[2][:, 0]
    return dq, dk, dv, sinks


def _mask(index: Tensor, count: Tensor, rows: slice, block: int) -> Tensor:
    """Additive mask fp32 [H,R,rows.stop] of one block of queries, lists i32[H,M] and i32[H]."""
    blocks = -(-rows.stop // block)
    used = torch.arange(index.shape[-1], device=index.device) < count[:, None]
    spare = torch.where(used, index.long(), blocks)
    listed = torch.zeros(len(index), blocks + 1, dtype=torch.bool, device=index.device).scatter(1, spare, True)
    keys = listed[:, :blocks].repeat_interleave(block, 1)[:, None, : rows.stop]
    position = torch.arange(rows.stop, device=index.device)
    seen = keys & (position <= position[rows.start :, None])
    return torch.zeros(seen.shape, device=index.device).masked_fill_(~seen, -torch.inf)
