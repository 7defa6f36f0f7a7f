"""Attention and its gradient over the row segments of `row_plan`, one request at a time.

A request never sees the others of its batch: its result is the same bit for bit alone and in any batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fluxc.kernels.flash_pieces import flash, flash_backward, merge_, sum_dtype
from fluxc.kernels.row_plan import Segment, Tile, tiles


@dataclass(frozen=True)
class Scores:
    """How scores are formed: scale, then the soft cap (0: none)."""

    scale: float
    softcap: float = 0.0


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
        b_q, b_out, b_lse = _grouped(q[b], out[b], lse[b], k.shape[1])
        for segment in plan:
            for group in tiles(segment):
                _forward_group(b_q, k[b], v[b], b_out, b_lse, group, plan[0].begin, how)
    if sink_logits is not None:
        _add_sink_logits(out, lse, sink_logits)
    return out, lse


def attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plans: Sequence[list[Segment]], how: Scores
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attend` for q, k, v, from its merged out [B,S,H,Dv] and log-sum-exp [B,H,S]."""
    kind = sum_dtype(q.dtype)
    dq, dk, dv = (torch.zeros(x.shape, dtype=kind, device=x.device) for x in (q, k, v))
    for b, plan in enumerate(plans):
        b_q, b_out, b_lse = _grouped(q[b], out[b], lse[b], k.shape[1])
        b_dq, b_grad, _ = _grouped(dq[b], grad[b], lse[b], k.shape[1])
        for segment in plan:
            for group in tiles(segment):
                for tile in group:
                    _backward_tile(
                        (b_dq, dk[b], dv[b]), (b_grad, b_q, k[b], v[b], b_out, b_lse), tile, plan[0].begin, how
                    )
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def sink_logits_grad(grad: Tensor, out: Tensor, lse: Tensor, sink_logits: Tensor) -> Tensor:
    """Gradient [H] of the sink logits: minus their weight times <grad, out>, over all rows."""
    delta = (grad.to(lse.dtype) * out.to(lse.dtype)).sum(-1).transpose(1, 2)
    weight = torch.exp(sink_logits.to(lse.dtype)[:, None] - lse)
    return -(weight * delta).sum((0, 2)).to(sink_logits.dtype)


def _grouped(q: Tensor, out: Tensor, lse: Tensor, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views [Hk,G,S,..] of q [H,S,D], out [S,H,Dv], lse [H,S]."""
    split = (kv_heads, q.shape[0] // kv_heads)
    return q.unflatten(0, split), out.unflatten(1, split).permute(1, 2, 0, 3), lse.unflatten(0, split)


def _forward_group(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, group: list[Tile], start: int, how: Scores
) -> None:
    for index, tile in enumerate(group):
        rows = slice(tile.row - start, tile.row - start + tile.rows)
        keys = slice(tile.key, tile.key + tile.keys)
        piece_out, piece_lse = _piece(q[:, :, rows], k[:, keys], v[:, keys], tile, how)
        if index == 0:
            out[:, :, rows], lse[:, :, rows] = piece_out, piece_lse
        else:
            merge_(out[:, :, rows], lse[:, :, rows], piece_out, piece_lse)


def _piece(q: Tensor, k: Tensor, v: Tensor, tile: Tile, how: Scores) -> tuple[Tensor, Tensor]:
    if tile.shape != "anticausal":
        return flash(q, k, v, causal=tile.shape == "causal", scale=how.scale, softcap=how.softcap)
    # Reversed in both axes, an anti-causal triangle is a causal one.
    out, lse = flash(q.flip(2), k.flip(1), v.flip(1), causal=True, scale=how.scale, softcap=how.softcap)
    return out.flip(2), lse.flip(2)


def _backward_tile(
    into: tuple[Tensor, Tensor, Tensor], tensors: tuple[Tensor, ...], tile: Tile, start: int, how: Scores
) -> None:
    rows = slice(tile.row - start, tile.row - start + tile.rows)
    keys = slice(tile.key, tile.key + tile.keys)
    grad, q, k, v, out, lse = tensors
    by_row, by_key = [x[:, :, rows] for x in (grad, q, out, lse)], [x[:, keys] for x in (k, v)]
    if tile.shape == "anticausal":
        by_row, by_key = [x.flip(2) for x in by_row], [x.flip(1) for x in by_key]
    (b_grad, b_q, b_out, b_lse), (b_k, b_v) = by_row, by_key
    causal = tile.shape != "rectangle"
    dq, dk, dv = flash_backward(
        b_grad, b_q, b_k, b_v, b_out, b_lse, causal=causal, scale=how.scale, softcap=how.softcap
    )
    if tile.shape == "anticausal":
        dq, dk, dv = dq.flip(2), dk.flip(1), dv.flip(1)
    into[0][:, :, rows] += dq
    into[1][:, keys] += dk
    into[2][:, keys] += dv


def _add_sink_logits(out: Tensor, lse: Tensor, sink_logits: Tensor) -> None:
    sink = sink_logits.to(lse.dtype)[:, None]
    keep = torch.sigmoid(lse - sink).transpose(1, 2).unsqueeze(-1)
    out.copy_(out * keep)
    torch.logaddexp(lse, sink.expand_as(lse), out=lse)
