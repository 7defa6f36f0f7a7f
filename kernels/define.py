"""How an attention op is defined in torch: schema, fake, Autograd kernel, and the choice among its providers."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fluxc.errors import InternalError
from fluxc.kernels import autograd
from fluxc.kernels.row_call import RowCall, check
from fluxc.kernels.schemas import NAMESPACE, SCHEMAS
from fluxc.kernels.triton_available import unavailable


@dataclass(frozen=True)
class Provider:
    """One way to compute an op. Both functions take the op's own arguments; `supported` says why not, or None."""

    name: str
    supported: Callable[..., str | None]
    run: Callable[..., Any]


def choose(op: str, providers: tuple[Provider, ...], *args: Any, **kwargs: Any) -> Provider:
    """The first provider that supports the call; raises InternalError with every reason when none does."""
    reasons = []
    for provider in providers:
        reason = provider.supported(*args, **kwargs)
        if reason is None:
            return provider
        reasons.append(f"{provider.name}: {reason}")
    raise InternalError(f"fluxc::{op}: no provider takes this call ({'; '.join(reasons)})")


def triton_provider(op: str) -> Provider:
    """The op's Triton kernel, whose module is imported by the first call on a tensor that Triton can run on."""
    module = f"{__package__}.{op}.triton_impl"

    def supported(q: Tensor, *args: Any, **kwargs: Any) -> str | None:
        return unavailable(q) or importlib.import_module(module).supported(q, *args, **kwargs)

    return Provider(
        "triton", supported, lambda *args, **kwargs: importlib.import_module(module).forward(*args, **kwargs)
    )


def pieces_provider(row_call: Callable[..., RowCall]) -> Provider:
    """Flash pieces, on any device, of every call."""
    return Provider(
        "pieces", lambda *args, **kwargs: None, lambda *args, **kwargs: row_call(*args, **kwargs).forward()[0]
    )


def define_attention(
    op: str, row_call: Callable[..., RowCall], run: Callable[..., Tensor], by_torch: Provider | None = None
) -> None:
    """Define torch.ops.fluxc.<op>. `row_call` maps its arguments to a RowCall; `run` computes it without a tape.

    `by_torch`: a provider that torch differentiates by itself, for the calls with a tape that it supports; it checks
    its arguments.
    """
    name = f"{NAMESPACE}::{op}"

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        check(op, row_call(*args, **kwargs))
        return run(*args, **kwargs)

    def with_tape(*args: Any, **kwargs: Any) -> Tensor:
        call = row_call(*args, **kwargs)
        if autograd.needs_grad(call):
            if by_torch is None or by_torch.supported(*args, **kwargs) is not None:
                return autograd.apply(op, call)
            return by_torch.run(*args, **kwargs)
        with torch._C._AutoDispatchBelowAutograd():
            return getattr(torch.ops.fluxc, op)(*args, **kwargs)

    torch.library.define(name, SCHEMAS[op], tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(name, "CompositeExplicitAutograd", forward)
    torch.library.impl(name, "Autograd", with_tape)
    torch.library.register_fake(name, fake)


def define_plain(op: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define torch.ops.fluxc.<op> without gradients, computed by `run`, with outputs as `fake` makes them."""
    name = f"{NAMESPACE}::{op}"
    torch.library.define(name, SCHEMAS[op], tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(name, "CompositeExplicitAutograd", run)
    torch.library.register_fake(name, fake)


def fake(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The output of every attention op: fresh, contiguous [B,S,H,Dv]."""
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])
