"""Every Triton kernel once, on small odd shapes, for the memory checker:

compute-sanitizer --tool memcheck python -m fluxc.kernels.bench.memory_check, with PYTORCH_NO_CUDA_MEMORY_CACHING=1
"""

from __future__ import annotations

import torch
from torch import Tensor

from fluxc.kernels import triton_backward, triton_config, triton_decode, triton_router
from fluxc.kernels.schemas import PAGE
from fluxc.kernels.triton_launch import Call, attend, attend_with_lse

ROWS = 301
DTYPE = torch.bfloat16


def main() -> None:
    """Run them all; raises if one gives something that is not finite."""
    for width in (64, 128, 256):
        _attention(width)
        _gradients(width)
        _decode(width)
    for width in (64, 128):
        _router(width)


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


def _decode(width: int) -> None:
    cache = torch.randn(9, 2, 2, PAGE, width, device="cuda", dtype=DTYPE)
    table = torch.randperm(9, device="cuda")[:8].int().view(1, 8)
    lens = torch.tensor([8 * PAGE - 12], device="cuda", dtype=torch.int32)
    q = torch.randn(1, 8, width, device="cuda", dtype=DTYPE)
    _finite(triton_decode.decode_attention(q, cache, table, lens, scale=0.1))


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
