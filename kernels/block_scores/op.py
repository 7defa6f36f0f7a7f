"""`fluxc::block_scores`: which blocks of keys each block of queries needs, without a score matrix and without a sort.

XAttention (Xu et al. 2025, section 2.1): the sums along antidiagonals of small squares of the score matrix predict
how much weight a block holds. The blocks kept are those above a cut, which bisection finds: the largest value above
which the weights still reach the threshold.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fluxc.errors import UserError
from fluxc.kernels.define import Provider, choose, define_plain, triton_provider
from fluxc.kernels.explicit import sum_dtype
from fluxc.kernels.row_call import DTYPES

SCORERS = ("antidiagonal", "pooled")
BISECTIONS = 24  # halvings of the range of a cut: as fine as fp32
ROW_CHUNKS = 256  # chunks of queries whose scores are in memory at a time


def define() -> None:
    """Define torch.ops.fluxc.block_scores."""
    define_plain("block_scores", run, _fake)


def providers() -> tuple[Provider, ...]:
    """In order of preference."""
    return triton_provider("block_scores"), Provider("torch", lambda *args, **kwargs: None, _by_rows)


def run(q: Tensor, k: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """block_index i32[B,H,Sb,Sb], block_count i32[B,H,Sb] by the first provider that takes the call."""
    options = {"scorer": "antidiagonal"} | options
    if problem := _problem(q, k) or _option_problem(**options):
        raise UserError(f"fluxc::block_scores: {problem}")
    return choose("block_scores", providers(), q, k, **options).run(q, k, **options)


def _fake(q: Tensor, k: Tensor, *, block: int, **options: Any) -> tuple[Tensor, Tensor]:
    blocks = (q.shape[2] + block - 1) // block
    if isinstance(blocks, torch.SymInt):
        # A size of its own: whether a rounded-up quotient is 1 would be a guard on the length.
        blocks = torch.library.get_ctx().new_dynamic_size(min=0)
    size = q.shape[0], q.shape[1], blocks
    return q.new_empty(*size, blocks, dtype=torch.int32), q.new_empty(size, dtype=torch.int32)


def chunks(x: Tensor, stride: int, scorer: str, *, keys: bool) -> Tensor:
    """x [B,H,S,D] as [B,H,C,..] such that the product of a chunk of queries and one of keys is their score."""
    x = F.pad(x, (0, 0, 0, -x.shape[2] % stride)).unflatten(2, (-1, stride))
    if scorer == "pooled":
        return x.mean(3, dtype=sum_dtype(x.dtype)).to(x.dtype)
    return (x.flip(3) if keys else x).flatten(3)


def keep(sums: Tensor, rows: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """The blocks kept out of sums [...,R,Sb] of the blocks of queries `rows` [R]: index [...,R,Sb], count [...,R]."""
    block = torch.arange(sums.shape[-1], device=sums.device)
    above = sums > _cut(sums, threshold)
    kept = (above | (block == 0) | (block == rows[:, None])) & (block <= rows[:, None])
    place = kept.cumsum(-1) - 1
    index = torch.zeros(kept.shape, dtype=torch.int32, device=sums.device)
    spare = torch.where(kept, place, sums.shape[-1])
    index = F.pad(index, (0, 1)).scatter(-1, spare, block.int().expand(kept.shape))[..., :-1]
    return index, kept.sum(-1).int()


def _cut(sums: Tensor, threshold: float) -> Tensor:
    """The largest of 2^BISECTIONS levels such that the sums above it reach threshold x the total: [...,R,1]."""
    wanted = threshold * sums.sum(-1, keepdim=True)
    low, high = torch.full_like(wanted, -1.0), sums.amax(-1, keepdim=True)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        enough = sums.masked_fill(sums <= middle, 0).sum(-1, keepdim=True) >= wanted
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return low


def _by_rows(
    q: Tensor, k: Tensor, *, scale: float, layer: int, block: int, stride: int, threshold: float, scorer: str
) -> tuple[Tensor, Tensor]:
    """ROW_CHUNKS chunks of queries at a time."""
    per, kind = block // stride, sum_dtype(q.dtype)
    b_q = chunks(q, stride, scorer, keys=False).unflatten(1, (k.shape[1], -1))
    b_k = chunks(k, stride, scorer, keys=True)
    count = b_k.shape[2]
    factor = scale / (1 if scorer == "pooled" else stride)
    found = []
    step = max(per, ROW_CHUNKS // per * per)
    for begin in range(0, count, step):
        end = min(begin + step, count)
        rows = b_q[:, :, :, begin:end].flatten(2, 3).to(kind)
        scores = (rows @ b_k[:, :, :end].to(kind).transpose(-1, -2)).unflatten(2, (-1, end - begin)) * factor
        chunk = torch.arange(count, device=q.device)
        weights = scores.masked_fill(chunk[:end] > chunk[begin:end, None], -torch.inf).softmax(-1).flatten(1, 2)
        weights = F.pad(weights, (0, -(-count // per) * per - end, 0, -(end - begin) % per))
        sums = weights.unflatten(3, (-1, per)).unflatten(2, (-1, per)).sum((3, 5))
        block_rows = begin // per + torch.arange(sums.shape[2], device=q.device)
        found.append(keep(sums, block_rows, threshold))
    index, counts = zip(*found, strict=True)
    return torch.cat(index, 2), torch.cat(counts, 2)


def _problem(q: Tensor, k: Tensor) -> str | None:
    for name, x in (("q", q), ("k", k)):
        if x.dim() != 4 or x.numel() == 0:
            return f"{name} must have 4 axes and not be empty, is {tuple(x.shape)}"
    if q.dtype not in DTYPES:
        return f"q is {q.dtype}, must be one of {', '.join(map(str, DTYPES))}"
    if (k.dtype, k.device) != (q.dtype, q.device):
        return f"k is {k.dtype} on {k.device}, q is {q.dtype} on {q.device}"
    if k.shape != (q.shape[0], k.shape[1], q.shape[2], q.shape[3]) or q.shape[1] % k.shape[1]:
        return f"k is {tuple(k.shape)}, which does not fit q {tuple(q.shape)}"
    return None


def _option_problem(*, block: int, stride: int, threshold: float, scorer: str, scale: float, layer: int) -> str | None:
    if block < 16 or block & (block - 1):
        return f"block is {block}, must be a power of two, at least 16"
    if stride < 1 or block % stride:
        return f"stride is {stride}, must divide block, {block}"
    if not 0 < threshold <= 1:
        return f"threshold is {threshold}, must lie in 0..1, above 0"
    return None if scorer in SCORERS else f"scorer is {scorer!r}, must be one of {', '.join(SCORERS)}"
