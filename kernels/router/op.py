"""`fluxc::router`: pool, encoder and head of the Layer Router in one op, put in when a program is lowered."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fluxc.errors import UserError
from fluxc.kernels.define import Provider, choose, define_plain, triton_provider
from fluxc.kernels.explicit import sum_dtype
from fluxc.kernels.router_pool import op as router_pool


def define() -> None:
    """Define torch.ops.fluxc.router."""
    define_plain("router", run, lambda q, *args, **kwargs: q.new_empty(q.shape[0], 2, dtype=sum_dtype(q.dtype)))


def providers() -> tuple[Provider, ...]:
    """In order of preference."""
    return triton_provider("router"), Provider("torch", lambda *args, **kwargs: None, _composed)


def run(q: Tensor, prompt_lens: Tensor, *weights: Tensor, pool: int) -> Tensor:
    """Logits [B,2], full first, by the first provider that takes the call; raises UserError for wrong arguments."""
    router_pool.check("router", q, prompt_lens, pool)
    _check(q, weights)
    return choose("router", providers(), q, prompt_lens, *weights, pool=pool).run(q, prompt_lens, *weights, pool=pool)


def _composed(q: Tensor, prompt_lens: Tensor, *weights: Tensor, pool: int) -> Tensor:
    w0, b0, w1, b1, w2, b2, w3, b3, w4, b4 = weights
    encoded = F.linear(F.silu(F.linear(router_pool.run(q, prompt_lens, pool=pool), w0, b0)), w1, b1)
    return F.linear(F.silu(F.linear(F.silu(F.linear(encoded, w2, b2)), w3, b3)), w4, b4)


def _check(q: Tensor, weights: tuple[Tensor, ...]) -> None:
    d = q.shape[-1]
    names = ("encoder_0", "encoder_2", "head_0", "head_2", "head_4")
    sizes = ((8 * d, d), (2 * d, 8 * d), (4 * d, 2 * d), (d, 4 * d), (2, d))
    for n, (name, size) in enumerate(zip(names, sizes, strict=True)):
        for x, part, shape in ((weights[2 * n], "weight", size), (weights[2 * n + 1], "bias", size[:1])):
            if x.shape != shape or x.dtype != sum_dtype(q.dtype):
                found, wanted = f"{x.dtype} {tuple(x.shape)}", f"{sum_dtype(q.dtype)} {shape}"
                raise UserError(f"fluxc::router: {name}_{part} must be {wanted} for queries of width {d}, is {found}")
