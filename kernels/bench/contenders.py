"""Who computes a case: our kernels, and what a user would pick instead."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fluxc.kernels.bench.cases import Case
from fluxc.kernels.bench.operands import Operands
from fluxc.kernels.triton_config import PLAIN_TMA, Tiles, padded, tiles_for
from fluxc.kernels.triton_launch import Call, attend

Run = Callable[[Operands], Tensor]


def ours(case: Case, tiles: Tiles | None = None) -> Run:
    """Our kernel for the case, with its pinned sizes unless `tiles` says others."""
    lens = torch.tensor([case.length], device="cuda") if case.last else None
    call = Call(case.shape.width**-0.5, case.sink, case.window, case.last, prompt_lens=lens)
    return lambda x: attend(*x, call, tiles)


def sdpa(case: Case, backend: SDPBackend) -> Run:
    """Causal SDPA of torch by one backend -> [B,S,H,D]."""

    def run(x: Operands) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*x, is_causal=True, enable_gqa=True).transpose(1, 2)

    return run


def flex(case: Case) -> Run:
    """Compiled FlexAttention with a block mask of the case's own."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    sink, window, dense_from = case.sink, case.window or case.length, case.length - case.last

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & ((j < sink) | (i - j < window) | (i >= dense_from))

    mask = create_block_mask(seen, None, None, case.length, case.length, device="cuda", _compile=True)
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda x: compiled(*x, block_mask=mask, enable_gqa=True).transpose(1, 2)


def contenders(case: Case, with_flex: bool, variants: bool) -> dict[str, tuple[Case, Run]]:
    """By name, what each computes and how: dense cuDNN as the yardstick, ours, and its rivals.

    variants: also our kernels with other tile sizes than the pinned ones.
    """
    found = {"cudnn": (case.dense(), sdpa(case.dense(), SDPBackend.CUDNN_ATTENTION)), "ours": (case, ours(case))}
    if variants:
        pinned = tiles_for(90, case.shape.width)
        other = dataclasses.replace(pinned, wait_last=not pinned.wait_last)
        found[f"ours, wait_last={other.wait_last}"] = case, ours(case, other)
        found["ours, plain Triton"] = case, ours(case, PLAIN_TMA[max(64, padded(case.shape.width))])
    if not case.window:
        found["flash"] = case, sdpa(case, SDPBackend.FLASH_ATTENTION)
    elif with_flex:
        found["flex"] = case, flex(case)
    return found
