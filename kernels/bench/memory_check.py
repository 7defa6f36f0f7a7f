"""Every Triton kernel once, on small odd shapes, for the memory checker:

compute-sanitizer --tool memcheck python -m fluxc.kernels.bench.memory_check, with PYTORCH_NO_CUDA_MEMORY_CACHING=1
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fluxc.kernels import (
    triton_append,
    triton_backward,
    triton_block,
    triton_config,
    triton_decode,
    triton_fused,
    triton_kv,
    triton_qkv,
    triton_router,
    triton_scores,
)
from fluxc.kernels.schemas import PAGE
from fluxc.kernels.triton_launch import Call, attend, attend_with_lse

ROWS = 301
DTYPE = torch.bfloat16


def main() -> None:
    """Run them all; raises if one gives something that is not finite."""
    for width in (64, 128, 256):
        _attention(width)
        _gradients(width)
        _paged(width)
        _blocks(width)
        _projections(width)
    for width in (64, 128):
        _router(width)
    _elementwise()


def _operands(width: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(1, ROWS, n, width, device="cuda", dtype=DTYPE).transpose(1, 2) for n in (4, 2, 2))
    return q, k, v


def _attention(width: int) -> None:
    lens, route = torch.tensor([ROWS - 9], device="cuda"), torch.tensor([False], device="cuda")
    tables = triton_config.TILES[90, width], triton_config.PLAIN_TMA[width], triton_config.POINTER_90[width]
    for tiles in tables:
        for call in (Call(0.1), Call(0.1, 20, 70), Call(0.1, 20, 70, 30, False, lens, route)):
            q, k, v = _operands(width)
            _finite(attend(q, k, v, call, tiles))


def _gradients(width: int) -> None:
    q, k, v = _operands(width)
    call = Call(0.1, 20, 70)
    out, lse = attend_with_lse(q, k, v, call)
    _finite(*triton_backward.gradients(q, k, v, out, lse, torch.randn_like(out), call))


def _paged(width: int) -> None:
    cache = torch.randn(9, 2, 2, PAGE, width, device="cuda", dtype=DTYPE)
    table = torch.randperm(9, device="cuda")[:8].int().view(1, 8)
    lens = torch.tensor([8 * PAGE - 12], device="cuda", dtype=torch.int32)
    q = torch.randn(1, 8, width, device="cuda", dtype=DTYPE)
    _finite(triton_decode.decode_attention(q, cache, table, lens, scale=0.1))
    (turn, k, v), zero = _operands(width), torch.zeros(1, dtype=torch.int64, device="cuda")
    for sinks, windows, start in ((zero, zero, lens.long()), (zero + 20, zero + 480, zero + 900)):
        kept = torch.minimum(lens, torch.where(windows == 0, lens, sinks + windows).int())
        args = (turn, k, v, cache, table, kept, start, sinks, windows)
        _finite(*(triton_append.append_attention(*args, scale=0.1, parts=parts) for parts in (1, 3)))
    triton_kv.kv_write(cache, k, v, torch.arange(ROWS, device="cuda")[None] - 1)
    _finite(cache)


def _blocks(width: int) -> None:
    q, k, v = _operands(width)
    # At a stride of 2 there are whole tiles for TMA, a tile behind them, and with no room a launch for each.
    for scorer, stride, room in (("antidiagonal", 8, 1 << 28), ("pooled", 8, 1 << 28), ("antidiagonal", 2, 0)):
        how: dict[str, Any] = {
            "scale": 0.1,
            "block": 64,
            "stride": stride,
            "threshold": 0.5,
            "scorer": scorer,
            "room": room,
        }
        lists = triton_scores.block_scores(q, k, **how)
        _finite(triton_block.block_attention(q, k, v, *lists, scale=0.1, block=64))


def _projections(width: int) -> None:
    q, k, v = _operands(width)
    weight, angles = torch.randn(width, device="cuda", dtype=DTYPE), torch.rand(1, ROWS, width, device="cuda").to(DTYPE)
    cache = torch.zeros(9, 2, 2, PAGE, width, device="cuda", dtype=DTYPE)
    slots, lens = torch.arange(ROWS, device="cuda")[None] - 1, torch.tensor([ROWS - 3], device="cuda")
    args = (q, k, v, weight, weight, angles, angles, cache, slots, lens)
    _finite(*triton_qkv.qk_norm_rope_cache(*args, eps=1e-6, pool=100), cache)


def _elementwise() -> None:
    x = torch.randn(3, ROWS, 2 * 577, device="cuda", dtype=DTYPE)
    _finite(triton_fused.swiglu(*x.chunk(2, -1)), *triton_fused.add_rms_norm(x, x, x[0, 0], eps=1e-6))


def _router(width: int) -> None:
    q, lens = _operands(width)[0], torch.tensor([ROWS], device="cuda")
    weights = []
    for rows, columns in ((8, 1), (2, 8), (4, 2), (1, 4)):
        weights += [torch.randn(rows * width, columns * width, device="cuda"), torch.randn(rows * width, device="cuda")]
    weights += [torch.randn(2, width, device="cuda"), torch.randn(2, device="cuda")]
    for fused in (True, False):
        _finite(triton_router.router(q, lens, *weights, pool=100, fused=fused))
    _finite(triton_router.router_pool(q, lens, pool=100))


def _finite(*outputs: Tensor) -> None:
    if not all(x.isfinite().all() for x in outputs):
        raise RuntimeError("a kernel gave a value that is not finite")


if __name__ == "__main__":
    main()
