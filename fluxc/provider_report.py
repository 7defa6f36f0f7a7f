"""Which provider serves each attention op on each device, and why those preferred to it were skipped."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

ATTENTION_OPS = ("attention", "streaming_attention", "triangle_attention")


@dataclasses.dataclass(frozen=True)
class Serving:
    """Which provider serves an op on a device, and why those preferred to it were skipped."""

    op: str
    device: str
    provider: str
    skipped: dict[str, str]


def serve_all(devices: Sequence[str]) -> tuple[Serving, ...]:
    """Who serves a plain call of every op (batch 1, 256 tokens, 4/2 heads of 64) on each device."""
    return tuple(_serving(op, device) for op in ATTENTION_OPS for device in devices)


def _serving(op: str, device: str) -> Serving:
    from fluxc.kernels import registry

    registry.register()
    tensors, attributes = _sample_call(op, device)
    skipped: dict[str, str] = {}
    for provider in registry.providers(op):
        reason = provider.supported(*tensors, **attributes)
        if reason is None:
            return Serving(op, device, provider.name, skipped)
        skipped[provider.name] = reason
    return Serving(op, device, "", skipped)


def _sample_call(op: str, device: str) -> tuple[list[Any], dict[str, Any]]:
    import torch

    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    q, kv = (torch.zeros(1, heads, 256, 64, dtype=dtype, device=device) for heads in (4, 2))
    tensors = {"q": q, "k": kv, "v": kv, "prompt_lens": torch.tensor([256], device=device)}
    sizes = {"scale": 0.125, "layer": 0, "sink": 16, "window": 64, "last": 16}
    schema = getattr(torch.ops.fluxc, op).default._schema
    required = [a.name for a in schema.arguments if not a.has_default_value()]
    given = [tensors[name] for name in required if name in tensors]
    return given, {name: sizes[name] for name in required if name in sizes}
