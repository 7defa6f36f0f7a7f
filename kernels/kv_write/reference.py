"""Reference of `fluxc::kv_write`: one token at a time."""

from __future__ import annotations

from torch import Tensor

from fluxc.kernels.schemas import PAGE


def kv_write(cache: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    """Write k, v [B,Hk,S,D] into cache [pages,2,Hk,PAGE,D] at slots i64[B,S], in place; -1 drops the token."""
    for b, row in enumerate(slots.tolist()):
        for s, slot in enumerate(row):
            if slot >= 0:
                page, offset = divmod(slot, PAGE)
                cache[page, 0, :, offset] = k[b, :, s]
                cache[page, 1, :, offset] = v[b, :, s]
