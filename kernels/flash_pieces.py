"""Flash attention over one piece of the (query, key) plane, its gradient, and the log-sum-exp merge of pieces.

A piece returns its own normalised output and the log-sum-exp of its scores, so that pieces over disjoint keys merge
exactly. Axes: X and Y count whatever is computed side by side (chunks, key/value heads, query heads of one), R rows, T
keys, D the width of all of q, k and v. Keys may have one Y for all of q's: a stride-0 view, never repeated in memory.
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
    """Attention of q [X,Y,R,D] over k, v [X,Y|1,T,D] -> out [X,Y,R,D] and log-sum-exp [X,Y,R].

    `causal` needs R == T: row i sees keys j <= i. `mask` [R,T] in q's dtype is added to the scores.
    """
    if not has_kernel(q, how, mask):
        return explicit(q, k, v, how.scale, how.softcap, causal, mask)
    if q.shape[1] == 1:
        # The kernel's output runs [X,R,Y,D] in memory: with the heads as Y that is the order of the op's output.
        out, lse = _kernel(q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), causal, mask, how.scale)
        return out.transpose(0, 1), lse.transpose(0, 1)
    return _kernel(q, k.expand(-1, q.shape[1], -1, -1), v.expand(-1, q.shape[1], -1, -1), causal, mask, how.scale)


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
    """Gradients of one piece -> dq [X,Y,R,D], dk and dv [X,Y|1,T,D].

    `out` and `lse` are those of the whole row, all pieces merged: each piece's share of the gradient is then exact.
    """
    if how.softcap or q.device.type != "cpu":
        return explicit_backward(grad, q, k, v, out, lse, how.scale, how.softcap, causal, mask)
    b_k, b_v = (x.expand(-1, q.shape[1], -1, -1) for x in (k, v))
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, b_k, b_v, out, lse, 0.0, causal, attn_mask=_rank4(mask), scale=how.scale
    )
    if k.shape[1] == q.shape[1]:
        return dq, dk, dv
    return dq, dk.sum(1, keepdim=True, dtype=sum_dtype(dk.dtype)), dv.sum(1, keepdim=True, dtype=sum_dtype(dv.dtype))


def merge_(out: Tensor, lse: Tensor, piece_out: Tensor, piece_lse: Tensor) -> None:
    """Fold a piece into (out [..,R,D], lse [..,R]) in place; both hold at least one key in every row."""
    weight = torch.sigmoid(piece_lse - lse).unsqueeze(-1)
    if out.dtype == weight.dtype:
        torch.lerp(out, piece_out, weight, out=out)
    else:
        out.copy_(torch.lerp(out.to(weight.dtype), piece_out.to(weight.dtype), weight))
    torch.logaddexp(lse, piece_lse, out=lse)


def has_kernel(q: Tensor, how: Scores, mask: Tensor | None) -> bool:
    """Whether a flash kernel takes the piece; the explicit path materialises a block of its scores."""
    if how.softcap:
        return False
    if q.device.type == "cpu":
        return True
    return mask is None and q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] % 8 == 0


def as_kernels_want(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v with rows that are one run in memory, and one width: zeros fill the narrower, and change nothing."""
    width = max(q.shape[-1], v.shape[-1])
    q, k, v = (fill(x if x.stride(-1) == 1 else x.contiguous(), width) for x in (q, k, v))
    return q, k, v


def fill(x: Tensor, width: int) -> Tensor:
    """x [..,D] with zeros up to `width`."""
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


def _kernel(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=_rank4(mask), scale=scale
        )
    out = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)
    return out[0], out[1]


def _rank4(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask[None, None]
