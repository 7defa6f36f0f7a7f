"""Which provider serves each op on each device, and why those preferred to it were skipped."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

SERVED_OPS = (
    "attention",
    "streaming_attention",
    "triangle_attention",
    "routed_attention",
    "block_scores",
    "block_attention",
    "router_pool",
    "router",
    "kv_write",
    "decode_attention",
    "append_attention",
    "qk_norm_rope_cache",
    "add_rms_norm",
    "swiglu",
)


@dataclasses.dataclass(frozen=True)
class Serving:
    """Which provider serves an op on a device, and why those preferred to it were skipped."""

    op: str
    device: str
    provider: str
    skipped: dict[str, str]


def serve_all(devices: Sequence[str]) -> tuple[Serving, ...]:
    """Who serves a plain call of every op (batch 1, 256 tokens, 4/2 heads of 64) on each device."""
    return tuple(_serving(op, device) for op in SERVED_OPS for device in devices)


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
    tensors = {**_rows(dtype, device), **_cached(dtype, device), **_fused(dtype, device)}
    if op == "decode_attention":
        tensors["q"] = tensors["q"][:, :, 0]
    options = {"scale": 0.125, "layer": 0, "sink": 16, "window": 64, "last": 16, "kind": "streaming", "pool": 100}
    options |= {"block": 128, "stride": 16, "threshold": 0.9, "eps": 1e-6}
    schema = getattr(torch.ops.fluxc, op).default._schema
    required = [a.name for a in schema.arguments if not a.has_default_value()]
    given = [tensors[name] if name in tensors else _weight(name, device) for name in required if name not in options]
    return given, {name: options[name] for name in required if name in options}


def _rows(dtype: Any, device: str) -> dict[str, Any]:
    import torch

    q, kv = (torch.zeros(1, heads, 256, 64, dtype=dtype, device=device) for heads in (4, 2))
    route, lens = torch.ones(1, dtype=torch.bool, device=device), torch.tensor([256], device=device)
    lists = torch.zeros(1, 4, 2, 2, dtype=torch.int32, device=device)
    blocks = {"block_index": lists, "block_count": lists[..., 0]}
    return {"q": q, "k": kv, "v": kv, "route": route, "prompt_lens": lens, **blocks}


def _fused(dtype: Any, device: str) -> dict[str, Any]:
    import torch

    x, angles, weight = (torch.zeros(*size, 64, dtype=dtype, device=device) for size in ((256,), (1, 256), ()))
    rows = dict.fromkeys(("x", "residual", "gate", "up"), x)
    return {**rows, "weight": weight, "q_weight": weight, "k_weight": weight, "cos": angles, "sin": angles}


def _cached(dtype: Any, device: str) -> dict[str, Any]:
    import torch

    numbers = {name: torch.zeros(1, dtype=torch.int64, device=device) for name in ("start", "sinks", "windows")}
    pages = {
        "cache": torch.zeros(4, 2, 2, 64, 64, dtype=dtype, device=device),
        "page_table": torch.zeros(1, 4, dtype=torch.int32, device=device),
        "lens": torch.zeros(1, dtype=torch.int32, device=device),
        "slots": torch.zeros(1, 256, dtype=torch.int64, device=device),
    }
    return {**numbers, **pages}


def _weight(name: str, device: str) -> Any:
    """A tensor of the router of a head of 64, by its argument's name."""
    import torch

    d = 64
    sizes = {"encoder_0": (8 * d, d), "encoder_2": (2 * d, 8 * d), "head_0": (4 * d, 2 * d), "head_2": (d, 4 * d)}
    size = (sizes | {"head_4": (2, d)})[name.removesuffix("_weight").removesuffix("_bias")]
    return torch.zeros(size if name.endswith("_weight") else size[:1], device=device)
