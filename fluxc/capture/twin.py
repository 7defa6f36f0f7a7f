"""Copies of a model that share or replace its weights, so that the model itself is never touched."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Tracing runs in this dtype: half precision keeps promotion rules right, and is not fp32, so that casts to fp32 and
# casts back to the model's dtype can be told apart.
MARKER = torch.bfloat16

WeightMap = Callable[[str, Tensor], Tensor]


def reference_twin(model: Any) -> Any:
    """The model over the same weights, in eval mode, with its own config (under eager attention) and buffers."""
    twin = _twin(model, lambda name, tensor: tensor)
    twin.config._attn_implementation = "eager"
    return twin


def fp32_twin(model: Any) -> Any:
    """Like `reference_twin`, over a copy of the weights in fp32."""
    twin = _twin(model, lambda name, tensor: tensor.detach().float() if tensor.is_floating_point() else tensor)
    twin.config._attn_implementation = "eager"
    return twin


def trace_twin(model: Any, marker: torch.dtype = MARKER) -> Any:
    """The model with empty weights on the CPU: those that follow the model's dtype are in `marker`."""
    follows = follows_model_dtype(model)

    def empty(name: str, tensor: Tensor) -> Tensor:
        dtype = marker if name in follows else tensor.dtype
        return torch.empty_like(tensor, dtype=dtype, device="cpu")

    return _twin(model, empty).to("cpu")


def weights_of(model: Any) -> dict[str, Tensor]:
    """Parameters and persistent buffers by dotted name; a tied tensor appears under every name it has."""
    return model.state_dict(keep_vars=True)


def model_dtype(model: Any) -> torch.dtype:
    """The dtype most weights are in, counted in elements."""
    sizes: dict[torch.dtype, int] = {}
    for tensor in model.parameters():
        if tensor.is_floating_point():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel()
    return max(sizes, key=sizes.__getitem__)


def follows_model_dtype(model: Any) -> set[str]:
    """Names of the weights that are in the model's dtype, and would be in any other the model is loaded in."""
    dtype = model_dtype(model)
    pinned = tuple(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    names = [name for name, tensor in weights_of(model).items() if tensor.dtype == dtype]
    return {name for name in names if not any(part in pinned for part in name.split("."))}


def _twin(model: Any, weight: WeightMap) -> Any:
    """Copy the modules; every weight becomes what `weight` makes of it, tied ones staying tied."""
    memo: dict[int, Any] = {}
    for name, tensor in weights_of(model).items():
        if id(tensor) not in memo:
            memo[id(tensor)] = _same_kind(tensor, weight(name, tensor))
    return copy.deepcopy(model, memo).eval()


def _same_kind(old: Tensor, new: Tensor) -> Tensor:
    if new is old:
        return old
    return torch.nn.Parameter(new, requires_grad=False) if isinstance(old, torch.nn.Parameter) else new
