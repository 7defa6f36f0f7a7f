"""Flash attention over one rectangle or triangle of (query, key) pairs, and the log-sum-exp merge of such pieces.

A piece returns its own normalised output and the log-sum-exp of its scores, so that pieces over disjoint keys merge
exactly. Axes: N key/value heads (or chunks), G query heads of one key/value head, R rows, T keys, D and Dv widths.
Keys are shared by the G heads as a stride-0 view: heads are never repeated in memory.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

EXPLICIT_ROWS = 256  # rows a block of the soft-cap path, whose scores are materialised


def flash(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Attention of q [N,G,R,D] over k [N,T,D], v [N,T,Dv] -> out [N,G,R,Dv] and log-sum-exp [N,G,R].

    `causal` needs R == T: row i sees keys j <= i.
    """
    if softcap:
        return _explicit(q, k, v, causal, scale, softcap)
    width = v.shape[-1]
    q, k, v = _one_width(q, k, v)
    heads = q.shape[1]
    out, lse = _kernel(q, _share(k, heads), _share(v, heads), causal, scale)
    return out[..., :width], lse


def flash_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    causal: bool,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one piece -> dq [N,G,R,D], dk [N,T,D], dv [N,T,Dv].

    `out` and `lse` are those of the whole row (all pieces merged): each piece's share of the gradient is then exact.
    """
    if softcap or q.device.type != "cpu":
        return _explicit_backward(grad, q, k, v, out, lse, causal, scale, softcap)
    depth, width = q.shape[-1], v.shape[-1]
    q, k, v = _one_width(q, k, v)
    pad = v.shape[-1] - width
    if pad:
        grad, out = F.pad(grad, (0, pad)), F.pad(out, (0, pad))
    heads = q.shape[1]
    k, v = _share(k, heads), _share(v, heads)
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        _dense_rows(grad), q, k, v, _dense_rows(out), lse, 0.0, causal, scale=scale
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


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums run in: fp64 for fp64 inputs, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _kernel(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    if q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] % 8 == 0:
        out = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)
        return out[0], out[1]
    return _explicit(q, k[:, 0], v[:, 0], causal, scale, 0.0)


def _explicit(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
    rows, kind = q.shape[2], sum_dtype(q.dtype)
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    lse = q.new_empty(q.shape[:-1], dtype=kind)
    for begin in range(0, rows, EXPLICIT_ROWS):
        block = slice(begin, min(begin + EXPLICIT_ROWS, rows))
        keys = block.stop if causal else k.shape[1]
        scores = _scores(q[:, :, block], k[:, :keys], begin, causal, scale, softcap)
        lse[:, :, block] = torch.logsumexp(scores, -1)
        weights = torch.exp(scores - lse[:, :, block].unsqueeze(-1))
        out[:, :, block] = (weights @ v[:, None, :keys].to(kind)).to(q.dtype)
    return out, lse


def _scores(q: Tensor, k: Tensor, begin: int, causal: bool, scale: float, softcap: float) -> Tensor:
    kind = sum_dtype(q.dtype)
    scores = (q.to(kind) * scale) @ k[:, None].to(kind).transpose(-1, -2)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if causal:
        row = torch.arange(begin, begin + q.shape[2], device=q.device).unsqueeze(1)
        scores = scores.masked_fill(torch.arange(k.shape[1], device=q.device) > row, -torch.inf)
    return scores


def _explicit_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float, softcap: float
) -> tuple[Tensor, Tensor, Tensor]:
    rows, kind = q.shape[2], sum_dtype(q.dtype)
    dq = torch.empty_like(q, dtype=kind)
    dk, dv = torch.zeros_like(k, dtype=kind), torch.zeros_like(v, dtype=kind)
    delta = (grad.to(kind) * out.to(kind)).sum(-1, keepdim=True)
    for begin in range(0, rows, EXPLICIT_ROWS):
        block = slice(begin, min(begin + EXPLICIT_ROWS, rows))
        keys = block.stop if causal else k.shape[1]
        b_q, b_grad = q[:, :, block].to(kind), grad[:, :, block].to(kind)
        scores = _scores(b_q, k[:, :keys].to(kind), begin, causal, scale, softcap)
        weights = torch.exp(scores - lse[:, :, block].unsqueeze(-1))
        dv[:, :keys] += (weights.transpose(-1, -2) @ b_grad).sum(1)
        dscores = weights * (b_grad @ v[:, None, :keys].to(kind).transpose(-1, -2) - delta[:, :, block])
        if softcap:
            dscores = dscores * (1 - (scores.masked_fill(weights == 0, 0) / softcap) ** 2)
        dq[:, :, block] = dscores @ k[:, None, :keys].to(kind) * scale
        dk[:, :keys] += (dscores.transpose(-1, -2) @ b_q).sum(1) * scale
    return dq, dk, dv


def _share(x: Tensor, heads: int) -> Tensor:
    return x.unsqueeze(1).expand(-1, heads, -1, -1)


def _sum_heads(x: Tensor) -> Tensor:
    return x[:, 0] if x.shape[1] == 1 else x.sum(1, dtype=sum_dtype(x.dtype))


def _one_width(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    depth, width = q.shape[-1], v.shape[-1]
    q, k, v = _dense_rows(q), _dense_rows(k), _dense_rows(v)
    if depth < width:
        return F.pad(q, (0, width - depth)), F.pad(k, (0, width - depth)), v
    return (q, k, F.pad(v, (0, depth - width))) if width < depth else (q, k, v)


def _dense_rows(x: Tensor) -> Tensor:
    """The kernels read rows of D as one run."""
    return x if x.stride(-1) == 1 else x.contiguous()
