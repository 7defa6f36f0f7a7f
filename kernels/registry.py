"""Defines the ops in torch and says which providers each attention op has."""

from __future__ import annotations

import importlib

import torch

from fluxc.kernels.define import Provider
from fluxc.kernels.schemas import NAMESPACE

# Ops that have an implementation; routed_attention comes after the ops it calls.
OPS = (
    "attention",
    "streaming_attention",
    "triangle_attention",
    "block_scores",
    "block_attention",
    "routed_attention",
    "router_pool",
    "router",
    "grouped_mm",
    "kv_write",
    "decode_attention",
    "append_attention",
    "qk_norm_rope_cache",
    "add_rms_norm",
    "swiglu",
)


def register() -> None:
    """Define all ops that have an implementation as `torch.ops.fluxc.*`. Does nothing the second time."""
    if is_defined(OPS[-1]):
        return
    importlib.import_module("fluxc.kernels.autograd").define()
    for op in OPS:
        importlib.import_module(f"fluxc.kernels.{op}.op").define()


def is_defined(op: str) -> bool:
    """Whether torch already knows fluxc::<op>."""
    return hasattr(getattr(torch.ops, NAMESPACE), op)


def providers(op: str) -> tuple[Provider, ...]:
    """Providers of an op, in order of preference."""
    return importlib.import_module(f"fluxc.kernels.{op}.op").providers()
