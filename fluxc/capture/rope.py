"""RoPE kinds: which are captured, and longrope made to choose its factors by the positions it is given."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fluxc.errors import CaptureError

SUPPORTED = ("default", "linear", "llama3", "yarn", "longrope")
_SHORT, _LONG = "fluxc_short_inv_freq", "fluxc_long_inv_freq"


def refuse_unsupported(config: Any) -> None:
    """Raise CaptureError for a RoPE kind whose tables depend on the lengths seen before (dynamic NTK), or unknown."""
    for kind in rope_kinds(config):
        if kind not in SUPPORTED:
            raise CaptureError(
                f"{config.model_type}: RoPE kind {kind!r} cannot be captured",
                hint=f"supported kinds are {', '.join(SUPPORTED)}",
            )


def rope_kinds(config: Any) -> list[str]:
    """RoPE kinds named in a config, one for each layer type that has its own."""
    parameters = getattr(config, "rope_parameters", None) or {}
    groups = [parameters] if "rope_type" in parameters else [g for g in parameters.values() if isinstance(g, dict)]
    return [group.get("rope_type", "default") for group in groups]


def choose_longrope_by_position(model: nn.Module) -> None:
    """Give every longrope module of a twin a forward that holds both tables.

    Long factors apply to the whole call when its largest position is past the original context, as in transformers.
    """
    for module in _longrope_modules(model):
        short, long, limit = _tables(module)
        module.register_buffer(_SHORT, short, persistent=False)
        module.register_buffer(_LONG, long, persistent=False)
        module.forward = _forward(module, limit)


def _longrope_modules(model: nn.Module) -> Iterator[nn.Module]:
    for name, module in model.named_modules():
        kinds = getattr(module, "rope_type", None)
        if isinstance(kinds, dict) and "longrope" in kinds.values():
            raise CaptureError(f"{name}: longrope that differs between layers cannot be captured")
        if kinds == "longrope":
            yield module


def _tables(module: Any) -> tuple[Tensor, Tensor, int]:
    """Short and long inverse frequencies [R/2] in fp32, and the original context in tokens."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    make = ROPE_INIT_FUNCTIONS["longrope"]
    limit = int(module.config.rope_parameters["original_max_position_embeddings"])
    short, _ = make(module.config, torch.device("cpu"), seq_len=limit)
    long, _ = make(module.config, torch.device("cpu"), seq_len=limit + 1)
    return short, long, limit


def _forward(module: Any, limit: int) -> Callable[..., Any]:
    plain = inspect.unwrap(type(module).forward)

    def forward(x: Tensor, position_ids: Tensor) -> Any:
        past = position_ids.max() >= limit
        chosen = torch.where(past, getattr(module, _LONG), getattr(module, _SHORT))
        return plain(_WithFrequencies(module, chosen), x, position_ids)

    return forward


class _WithFrequencies:
    """A rotary module seen with other frequencies."""

    def __init__(self, module: nn.Module, inv_freq: Tensor) -> None:
        self._module = module
        self.inv_freq = inv_freq

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)
