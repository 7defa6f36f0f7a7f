"""`fluxc::attention`: full causal attention, the normal form of every attention after capture."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fluxc.kernels.attention import triton_impl
from fluxc.kernels.define import Provider, choose, define_attention, pieces_provider, triton_provider
from fluxc.kernels.row_call import RowCall, RowOptions, check


def define() -> None:
    """Define torch.ops.fluxc.attention. SDPA's gradient is faster than ours."""
    define_attention("attention", row_call, run, Provider("sdpa", _sdpa_unsupported, _checked_sdpa))


def row_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    layer: int,
    window: int = 0,
    softcap: float = 0.0,
    sink_logits: Tensor | None = None,
    q_start: Tensor | None = None,
) -> RowCall:
    """The op's arguments as a RowCall: a window is a streaming set without sink."""
    options = RowOptions(scale, softcap, window=window)
    return RowCall(q, k, v, options, q_start=q_start, sink_logits=sink_logits)


def providers() -> tuple[Provider, ...]:
    """In order of preference: our kernel where it was measured faster than SDPA, else SDPA, else whatever serves."""
    triton = triton_provider("attention")
    return Provider("sdpa", _sdpa_supported, _sdpa), triton, pieces_provider(row_call)


def run(*args: Any, **kwargs: Any) -> Tensor:
    """Output [B,S,H,Dv] by the first provider that takes the call."""
    return choose("attention", providers(), *args, **kwargs).run(*args, **kwargs)


def _sdpa_supported(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> str | None:
    if reason := _sdpa_unsupported(q, k, v, **kwargs):
        return reason
    if triton_impl.supported(q, k, v, **kwargs) is None and triton_impl.fastest(q, k, v, **kwargs):
        return "our kernel is faster here"
    return None


def _sdpa_unsupported(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> str | None:
    if q.device.type == "cpu":
        return "on the CPU flash pieces are as fast and independent of the batch"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"SDPA has no flash kernel for {q.dtype}"
    if any(kwargs.get(name) for name in ("window", "softcap")):
        return "SDPA has no window or soft cap"
    if kwargs.get("sink_logits") is not None or kwargs.get("q_start") is not None:
        return "SDPA has no sink logits or query offset"
    return None if q.shape[2] == k.shape[2] else "as many keys as queries needed"


def _sdpa(q: Tensor, k: Tensor, v: Tensor, *, scale: float, **kwargs: Any) -> Tensor:
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2).contiguous()


def _checked_sdpa(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Tensor:
    check("attention", row_call(q, k, v, **kwargs))
    return _sdpa(q, k, v, **kwargs)
