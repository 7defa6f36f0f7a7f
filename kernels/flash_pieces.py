"""Flash attention over one piece of the (query, key) plane, its gradient, and the log-sum-exp merge of pieces.

A piece returns its own normalised output and the log-sum-exp of its scores, so that pieces over disjoint keys merge
exactly. Axes: N key/value heads, G query heads of one key/value head, R rows, T keys, D and Dv widths. Keys are shared
by the G heads as a stride-0 view: heads are never repeated in memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fluxc.kernels.explicit import explicit, explicit_backward, sum_dtype


@dataclass(frozen=True)
class Scores:
    """How scores are formed: times `scale`, then the soft cap (0: none)."""

    scale: float
    softcap: float = 0.0


def flash(
    q: Tensor, k: Tensor, v: Tensor, how: Scores, *, causal: bool = False, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of q [N,G,R,D] over k [N,T,D], v [N,T,Dv] -> out [N,G,R,Dv] and log-sum-exp [N,G,R].

    `causal` needs R == T: row i sees keys j <= i. `mask` [R,T] in q's dtype is added to the scores.
    """
    if how.softcap or not _has_kernel(q, mask):
        return explicit(q, k, v, how.scale, how.softcap, causal, mask)
    width = v.shape[-1]
    q, k, v = _one_width(q, k, v)
    out, lse = _kernel(*_folded(q, k, v), causal, mask, how.scale)
    if q.shape[1] == 1:
        out, lse = out.transpose(0, 1), lse.transpose(0, 1)
    return out[..., :width], lse


def flash_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    how: Scores,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one piece -> dq [N,G,R,D], dk [N,T,D], dv [N,T,Dv].

    `out` and `lse` are those of the whole row, all pieces merged: each piece's share of the gradient is then exact.
    """
    if how.softcap or q.device.type != "cpu":
        return explicit_backward(grad, q, k, v, out, lse, how.scale, how.softcap, causal, mask)
    depth, width = q.shape[-1], v.shape[-1]
    q, k, v = _one_width(q, k, v)
    grad, out = (F.pad(_dense_rows(x), (0, v.shape[-1] - width)) for x in (grad, out))
    heads = q.shape[1]
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, _share(k, heads), _share(v, heads), out, lse, 0.0, causal, attn_mask=_rank4(mask), scale=how.scale
    )
    return dq[..., :depth], _sum_heads(dk)[..., :depth], _sum_heads(dv)[..., :width]


def merge_(out: Tensor, lse: Tensor, piece_out: Tensor, piece_lse: Tensor) -> None:
    """Fold a piece into (out [..,R,Dv], lse [..,R]) in place; both hold at least one key in every row."""
    weight = torch.sigmoid(piece_lse - lse).unsqueeze(-1)
    if out.dtype == weight.dtype:
        torch.lerp(out, piece_out, weight, out=out)
    else:
        out.copy_(torch.lerp(out.to(weight.dtype), piece_out.to(weight.dtype), weight))
    torch.logaddexp(lse, piece_lse, out=lse)


def _has_kernel(q: Tensor, mask: Tensor | None) -> bool:
    if q.device.type == "cpu":
        return True
    return mask is None and q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] % 8 == 0


def _kernel(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=_rank4(mask), scale=scale
        )
    out = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)
    return out[0], out[1]


def _folded(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """4-axis views for the kernel, whose output runs [batch,row,head]: without groups that is already [S,H,Dv]."""
    if q.shape[1] == 1:
        return q.transpose(0, 1), k.unsqueeze(0), v.unsqueeze(0)
    return q, _share(k, q.shape[1]), _share(v, q.shape[1])


def _share(x: Tensor, heads: int) -> Tensor:
    return x.unsqueeze(1).expand(-1, heads, -1, -1)


def _sum_heads(x: Tensor) -> Tensor:
    return x[:, 0] if x.shape[1] == 1 else x.sum(1, dtype=sum_dtype(x.dtype))


def _one_width(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The kernels want D == Dv: the narrower side is padded with zeros, which change nothing."""
    depth, width = q.shape[-1], v.shape[-1]
    q, k, v = _dense_rows(q), _dense_rows(k), _dense_rows(v)
    if depth < width:
        return F.pad(q, (0, width - depth)), F.pad(k, (0, width - depth)), v
    return (q, k, F.pad(v, (0, depth - width))) if width < depth else (q, k, v)


def _rank4(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask[None, None]


def _dense_rows(x: Tensor) -> Tensor:
    """The kernels read each row as one run."""
    return x if x.stride(-1) == 1 else x.contiguous()
