"""`fluxc::kv_write`: write the keys and values of some tokens to their slots of the paged cache."""

from __future__ import annotations

import torch
from torch import Tensor

from fluxc.errors import UserError
from fluxc.kernels.define import Provider, choose, triton_provider
from fluxc.kernels.schemas import NAMESPACE, PAGE, SCHEMAS


def define() -> None:
    """Define torch.ops.fluxc.kv_write."""
    name = f"{NAMESPACE}::kv_write"
    op = torch.library.custom_op(name, run, mutates_args={"cache"}, schema=SCHEMAS["kv_write"])
    op.register_fake(lambda cache, k, v, slots: None)


def providers() -> tuple[Provider, ...]:
    """In order of preference."""
    return triton_provider("kv_write"), Provider("torch", lambda *args: None, _indexed)


def run(cache: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    """cache [pages,2,Hk,PAGE,D]; k, v [B,Hk,S,D]; slots i64[B,S], -1 drops the token."""
    check("kv_write", cache, k, v, slots)
    choose("kv_write", providers(), cache, k, v, slots).run(cache, k, v, slots)


def _indexed(cache: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    kept = slots >= 0
    at = slots[kept]
    page, offset = at // PAGE, at % PAGE
    for side, x in enumerate((k, v)):
        cache[:, side].transpose(1, 2)[page, offset] = x.transpose(1, 2)[kept]


def check(op: str, cache: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    """Raise UserError, naming the op, the argument and the limit, if the arguments do not fit."""
    pages, sides, heads, page, width = cache.shape if cache.dim() == 5 else (0,) * 5
    if sides != 2 or page != PAGE:
        raise UserError(f"fluxc::{op}: cache must be [pages,2,Hk,{PAGE},D], is {tuple(cache.shape)}")
    expected = (slots.shape[0], heads, slots.shape[-1], width)
    for name, x in (("k", k), ("v", v)):
        if x.shape != expected:
            raise UserError(f"fluxc::{op}: {name} must be {expected}, is {tuple(x.shape)}")
        if x.dtype != cache.dtype:
            raise UserError(f"fluxc::{op}: {name} is {x.dtype}, the cache is {cache.dtype}")
    if slots.is_cuda:
        return  # reading the values would stall the device; its kernel writes no slot outside the cache
    if slots.numel() and (int(slots.max()) >= pages * PAGE or int(slots.min()) < -1):
        raise UserError(f"fluxc::{op}: slots must lie in -1..{pages * PAGE - 1}")
