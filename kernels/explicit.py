"""Attention with its scores written out, a block of rows at a time: soft caps, and devices without a flash kernel.

Memory grows with rows-of-a-block x keys, never with rows x keys. Axes as in `flash_pieces`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK_ROWS = 128


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums run in: fp64 for fp64 inputs, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def explicit(
    q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float, causal: bool, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attention of q [X,Y,R,D] over k, v [X,Y|1,T,D] -> out [X,Y,R,D] and log-sum-exp [X,Y,R]; mask [..,R,T]."""
    kind = sum_dtype(q.dtype)
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    lse = q.new_empty(q.shape[:-1], dtype=kind)
    for rows, keys in _blocks(q.shape[2], k.shape[2], causal):
        scores = _scores(q[:, :, rows], k[:, :, keys], scale, softcap)
        _hide(scores, rows, keys, causal, mask)
        lse[:, :, rows] = torch.logsumexp(scores, -1)
        weights = scores.sub_(lse[:, :, rows].unsqueeze(-1)).exp_()
        out[:, :, rows] = weights @ v[:, :, keys].to(kind)
    return out, lse


def explicit_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    softcap: float,
    causal: bool,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients dq [X,Y,R,D], dk and dv [X,Y|1,T,D] in the sums dtype, given the whole row's out and lse."""
    kind = sum_dtype(q.dtype)
    dq, dk, dv = (torch.zeros(x.shape, dtype=kind, device=x.device) for x in (q, k, v))
    for rows, keys in _blocks(q.shape[2], k.shape[2], causal):
        b_q, b_grad, b_out = (x[:, :, rows].to(kind) for x in (q, grad, out))
        b_k, b_v = k[:, :, keys].to(kind), v[:, :, keys].to(kind)
        scores = _scores(b_q, k[:, :, keys], scale, softcap)
        slope = 1 - (scores / softcap) ** 2 if softcap else 1.0
        _hide(scores, rows, keys, causal, mask)
        weights = scores.sub_(lse[:, :, rows].unsqueeze(-1)).exp_()
        delta = (b_grad * b_out).sum(-1, keepdim=True)
        dscores = weights * (b_grad @ b_v.transpose(-1, -2) - delta) * slope * scale
        dq[:, :, rows] = dscores @ b_k
        dk[:, :, keys] += (dscores.transpose(-1, -2) @ b_q).sum_to_size(b_k.shape)
        dv[:, :, keys] += (weights.transpose(-1, -2) @ b_grad).sum_to_size(b_v.shape)
    return dq, dk, dv


def _blocks(rows: int, keys: int, causal: bool) -> Iterator[tuple[slice, slice]]:
    for begin in range(0, rows, BLOCK_ROWS):
        end = min(begin + BLOCK_ROWS, rows)
        yield slice(begin, end), slice(0, end if causal else keys)


def _scores(q: Tensor, k: Tensor, scale: float, softcap: float) -> Tensor:
    kind = sum_dtype(q.dtype)
    scores = (q.to(kind) * scale) @ k.to(kind).transpose(-1, -2)
    return scores.div_(softcap).tanh_().mul_(softcap) if softcap else scores


def _hide(scores: Tensor, rows: slice, keys: slice, causal: bool, mask: Tensor | None) -> None:
    if mask is not None:
        scores.add_(mask[..., rows, keys])
    if causal:
        row = torch.arange(rows.start, rows.stop, device=scores.device).unsqueeze(1)
        scores.masked_fill_(torch.arange(keys.stop, device=scores.device) > row, -torch.inf)
