"""The attention function that transformers models call while they are captured.

transformers hands every attention of a model to a function registered by name. `tracing()` registers one that leaves
a single `fluxc::attention` node per layer; `probing()` one that records what each layer asks for, with the mask the
model would have used. Both names exist only inside their context.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fluxc.errors import UnsupportedAttentionError

TRACE = "fluxc"
PROBE = "fluxc_probe"

# Facts about the call, not about what is computed: masks and caches come to us by other ways, or not at all.
_BOOKKEEPING = {"position_ids", "cache_position", "use_cache", "return_dict", "attention_mask"}


@dataclasses.dataclass(frozen=True)
class AttentionCall:
    """What one layer asked of its attention: `fluxc::attention`'s keywords, without the tensors."""

    layer: int
    scale: float
    window: int
    softcap: float
    sink_logits: Tensor | None

    def keywords(self) -> dict[str, Any]:
        """Keyword arguments of the op; those that have their default value are left out."""
        wanted: dict[str, Any] = {"scale": self.scale, "layer": self.layer}
        optional = {"window": self.window, "softcap": self.softcap}
        wanted.update({name: value for name, value in optional.items() if value})
        return wanted if self.sink_logits is None else {**wanted, "sink_logits": self.sink_logits}


@dataclasses.dataclass(frozen=True)
class ProbedLayer:
    """A layer's call in the probe run, and the mask function the model made for it (None: it made none)."""

    call: AttentionCall
    mask: Callable[..., Tensor] | None


@dataclasses.dataclass(frozen=True)
class _MaskTag:
    """Stands in for a mask during the probe run."""

    function: Callable[..., Tensor]


@contextlib.contextmanager
def tracing(context: int) -> Iterator[None]:
    """Register the attention function `fluxc` for models whose context is `context` tokens."""

    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> tuple[Tensor, None]:
        call = read_call(module, q, k, mask, context, kwargs)
        return torch.ops.fluxc.attention(q, k, v, **call.keywords()), None

    with _registered(TRACE, attend):
        yield


@contextlib.contextmanager
def probing(context: int) -> Iterator[list[ProbedLayer]]:
    """Register `fluxc_probe`; yields the list that a forward pass fills with one entry a layer."""
    layers: list[ProbedLayer] = []

    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> tuple[Tensor, None]:
        function = mask.function if isinstance(mask, _MaskTag) else None
        call = read_call(module, q, k, None if function else mask, context, kwargs)
        layers.append(ProbedLayer(call, function))
        return v.new_zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[3]), None

    def tag(*_: Any, mask_function: Callable[..., Tensor], **__: Any) -> _MaskTag:
        return _MaskTag(mask_function)

    with _registered(PROBE, attend, tag):
        yield layers


@contextlib.contextmanager
def _registered(name: str, attend: Callable[..., Any], mask: Callable[..., Any] | None = None) -> Iterator[None]:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(name, attend)
    if mask is not None:
        AttentionMaskInterface.register(name, mask)
    try:
        yield
    finally:
        AttentionInterface._global_mapping.pop(name, None)
        AttentionMaskInterface._global_mapping.pop(name, None)


def read_call(module: Any, q: Tensor, k: Tensor, mask: Any, context: int, kwargs: dict[str, Any]) -> AttentionCall:
    """Translate transformers' keywords; raises UnsupportedAttentionError for one that fluxc does not represent."""
    rest = dict(kwargs)
    layer = _layer_of(module, rest)
    scale = rest.pop("scaling", None)
    window, softcap = rest.pop("sliding_window", None), rest.pop("softcap", None)
    sinks, dropout = rest.pop("s_aux", None), rest.pop("dropout", 0.0)
    _refuse_if(mask is not None, layer, "gets a mask that does not come from transformers' mask functions")
    _refuse_if(bool(dropout), layer, "has dropout")
    _refuse_if(rest.pop("is_causal", None) not in (None, True), layer, "is not causal")
    _refuse_if(getattr(module, "is_causal", True) is False, layer, "is not causal")
    _refuse_if(_lengths_differ(q, k), layer, "attends to another sequence (cross attention or a cache)")
    for name, value in rest.items():
        unknown = name not in _BOOKKEEPING and value is not None and value is not False
        _refuse_if(unknown, layer, f"passes {name!r}, which fluxc does not know")
    return AttentionCall(
        layer=layer,
        scale=float(q.shape[-1] ** -0.5 if scale is None else scale),
        window=_window(window, context),
        softcap=float(softcap or 0.0),
        sink_logits=sinks,
    )


def _layer_of(module: Any, rest: dict[str, Any]) -> int:
    layer = getattr(module, "layer_idx", None)
    layer = rest.pop("layer_idx", None) if layer is None else layer
    if not isinstance(layer, int):
        raise UnsupportedAttentionError(f"{type(module).__name__} does not say which layer it is")
    return layer


def _lengths_differ(q: Tensor, k: Tensor) -> bool:
    from torch.fx.experimental.symbolic_shapes import guard_or_true

    return guard_or_true(q.shape[2] != k.shape[2])


def _window(window: int | None, context: int) -> int:
    """A window that no prompt can reach past is no window: such a layer is routable."""
    return 0 if not window or (context and window >= context) else int(window)


def _refuse_if(condition: bool, layer: int, reason: str) -> None:
    if condition:
        raise UnsupportedAttentionError(
            f"the attention of layer {layer} {reason}",
            hint="fluxc captures causal attention with optional window, soft cap and sink logits",
        )
