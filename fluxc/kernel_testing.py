"""What the kernel tests share: the tolerance table, random operands, and modes that watch allocations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Largest difference from the reference in fp32 (fp64 for fp64), for outputs that average values drawn from N(0, 1).
TOLERANCES: dict[torch.dtype, dict[str, float]] = {
    # Sums of some thousand products in another order.
    torch.float64: {"rtol": 1e-10, "atol": 1e-10},
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    # 11 bits: weights, the pieces' outputs and the result are each rounded once (2 ** -11 of values up to 4).
    torch.float16: {"rtol": 2e-3, "atol": 4e-3},
    # 8 bits: the same three roundings, 2 ** -8 each.
    torch.bfloat16: {"rtol": 1.6e-2, "atol": 3e-2},
}
# A gradient sums over rows what an output averages, and is built from outputs already rounded.
GRADIENT_FACTOR = 8.0


def assert_close(actual: Tensor, expected: Tensor, *, factor: float = 1.0) -> None:
    """Compare `actual` with a wider `expected` under the tolerance of `actual`'s dtype times `factor`."""
    limit = TOLERANCES[actual.dtype]
    rtol, atol = limit["rtol"] * factor, limit["atol"] * factor
    torch.testing.assert_close(actual.to(expected.dtype), expected, rtol=rtol, atol=atol)


def random_qkv(
    B: int, H: int, Hk: int, S: int, D: int, Dv: int | None = None, *, T: int | None = None, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """q [B,H,S,D], k [B,Hk,T,D], v [B,Hk,T,Dv] as models make them: transposed views of [B,S,H,D]. Seeded.

    `options`: dtype, requires_grad, seed.
    """
    seed, dtype = options.get("seed", 0), options.get("dtype", torch.float32)
    generator = torch.Generator().manual_seed(seed)
    shapes = ((B, S, H, D), (B, T or S, Hk, D), (B, T or S, Hk, Dv or D))
    made = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).transpose(1, 2) for shape in shapes]
    q, k, v = (x.requires_grad_(options.get("requires_grad", False)) for x in made)
    return q, k, v


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The values of x [B,H,S,D] in memory layouts an op may meet."""
    spread = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1])
    spread[..., ::2] = x
    return {
        "heads first": x.contiguous(),
        "rows first": x.transpose(1, 2).contiguous().transpose(1, 2),
        "rows apart": spread[..., ::2],
        "width first": x.transpose(2, 3).contiguous().transpose(2, 3),
    }


class LargestAllocation(TorchDispatchMode):
    """Remembers the bytes of the largest storage any torch call returned: `with LargestAllocation() as seen: ...`."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, Tensor):
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return result


class PoisonedMemory(TorchDispatchMode):
    """Fills uninitialised floating-point memory with NaN, so that a row nobody writes is seen."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("empty", "new_empty", "empty_like", "empty_strided") and result.is_floating_point():
            result.fill_(torch.nan)
        return result


def gradients(run: Callable[..., Tensor], *inputs: Tensor, seed: int = 1) -> tuple[Tensor, ...]:
    """Gradients of <run(*inputs), fixed random weights> for the inputs."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = run(*leaves)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.autograd.grad(out, leaves, weights.to(out.dtype))
