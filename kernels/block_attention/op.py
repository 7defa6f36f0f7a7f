"""`fluxc::block_attention`: causal attention where each block of queries of a head reads a list of blocks of keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fluxc.errors import UserError
from fluxc.kernels.define import Provider, choose, define_plain, fake, triton_provider
from fluxc.kernels.explicit import sum_dtype
from fluxc.kernels.flash_pieces import Scores, as_kernels_want, flash, merge_
from fluxc.kernels.row_call import RowCall, RowOptions, problem


def define() -> None:
    """Define torch.ops.fluxc.block_attention."""
    define_plain("block_attention", run, fake)


def providers() -> tuple[Provider, ...]:
    """In order of preference."""
    return triton_provider("block_attention"), Provider("pieces", lambda *args, **kwargs: None, _pieces)


def run(*args: Any, **kwargs: Any) -> Tensor:
    """Output [B,S,H,Dv] by the first provider that takes the call; raises UserError for arguments that do not fit."""
    _check(*args, **kwargs)
    return choose("block_attention", providers(), *args, **kwargs).run(*args, **kwargs)


def _pieces(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_index: Tensor,
    block_count: Tensor,
    *,
    scale: float,
    layer: int,
    block: int,
    softcap: float = 0.0,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """A block of queries of a head at a time: its own block causally, the blocks before it as one piece."""
    (B, H, S, _), width, how = q.shape, v.shape[-1], Scores(scale, softcap)
    q, k, v = as_kernels_want(q, k, v)
    out = q.new_zeros(B, S, H, v.shape[-1])
    counts = block_count.tolist()
    for b in range(B):
        for h in range(H):
            kv = h // (H // k.shape[1])
            for n, count in enumerate(counts[b][h]):
                rows = slice(n * block, min(n * block + block, S))
                operands = q[b, h, rows], k[b, kv], v[b, kv]
                sink = None if sink_logits is None else sink_logits[h]
                out[b, rows, h] = _rows(*operands, block_index[b, h, n, :count], n, block, how, sink)
    return out[..., :width].contiguous()


def _rows(
    q: Tensor, k: Tensor, v: Tensor, listed: Tensor, own: int, block: int, how: Scores, sink: Tensor | None
) -> Tensor:
    """Rows q [R,D] of block `own` over k, v [S,D] of the blocks listed -> [R,D]."""
    parts = []
    own_listed = bool(len(listed)) and int(listed[-1]) == own
    if own_listed:
        keys = slice(own * block, own * block + len(q))
        parts.append(flash(q[None, None], k[None, None, keys], v[None, None, keys], how, causal=True))
    if len(earlier := listed[: len(listed) - own_listed]):
        at = (earlier.long()[:, None] * block + torch.arange(block, device=q.device)).flatten()
        parts.append(flash(q[None, None], k[None, None, at], v[None, None, at], how))
    if not parts:
        return torch.zeros_like(q)
    out, lse = (x.contiguous() for x in parts[0])
    for part in parts[1:]:
        merge_(out, lse, *part)
    if sink is not None:
        out = (out * torch.sigmoid(lse - sink.to(sum_dtype(q.dtype)))[..., None]).to(q.dtype)
    return out[0, 0]


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_index: Tensor,
    block_count: Tensor,
    *,
    scale: float,
    layer: int,
    block: int,
    softcap: float = 0.0,
    sink_logits: Tensor | None = None,
) -> None:
    options = RowOptions(scale, softcap)
    wrong = problem("attention", RowCall(q, k, v, options, sink_logits=sink_logits))
    wrong = wrong or _list_problem(q, k, block_index, block_count, block)
    if wrong:
        raise UserError(f"fluxc::block_attention: {wrong}")


def _list_problem(q: Tensor, k: Tensor, index: Tensor, count: Tensor, block: int) -> str | None:
    if block < 16 or block & (block - 1):
        return f"block is {block}, must be a power of two, at least 16"
    if k.shape[2] != q.shape[2]:
        return f"k has {k.shape[2]} keys for {q.shape[2]} queries, must have as many"
    size = (q.shape[0], q.shape[1], -(-q.shape[2] // block))
    if count.shape != size or index.shape[:-1] != size or index.shape[-1] == 0:
        found = f"{tuple(index.shape)} and {tuple(count.shape)}"
        return f"block_index and block_count must be {(*size, 'M')} and {size}, are {found}"
    for name, x in (("block_index", index), ("block_count", count)):
        if x.dtype != torch.int32:
            return f"{name} must be int32, is {x.dtype}"
    return None if index.is_cuda else _value_problem(index, count)


def _value_problem(index: Tensor, count: Tensor) -> str | None:
    """What a device cannot be asked without stalling it; its kernel reads no key past the rows and answers NaN."""
    if int(count.min()) < 0 or int(count.max()) > index.shape[-1]:
        return f"block_count must lie in 0..{index.shape[-1]}, found {int(count.min())}..{int(count.max())}"
    own = torch.arange(count.shape[-1])[:, None]
    used = torch.arange(index.shape[-1]) < count[..., None]
    if bool((used & ((index < 0) | (index > own))).any()):
        return "block_index must not name blocks below 0 or after the rows' own"
    if bool((used[..., 1:] & (index[..., 1:] <= index[..., :-1])).any()):
        return "block_index must be ascending"
    return None
