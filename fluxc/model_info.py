"""What a plan and an artifact remember of the model they belong to: enough to refuse another one and to size its KV."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from fluxc.errors import PlanError
from fluxc.json_form import strict

if TYPE_CHECKING:
    from torch.export import ExportedProgram

_ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclasses.dataclass(frozen=True)
class AttentionInfo:
    """One attention of the model. `window` 0: it sees all keys, so it is routable; else it has a window of its own."""

    layer: int
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    window: int = 0

    @property
    def routable(self) -> bool:
        """Whether a router may choose this attention's kind (DESIGN section 1)."""
        return self.window == 0


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    """The model: family name, context in tokens (0: unknown), dtype and digest of its weights, and its attentions."""

    family: str
    context: int
    dtype: str
    weights: str
    attentions: tuple[AttentionInfo, ...]

    def __post_init__(self) -> None:
        if self.dtype not in _ELEMENT_BYTES:
            raise PlanError(f"dtype {self.dtype!r} is not one of {', '.join(_ELEMENT_BYTES)}")

    @property
    def layers(self) -> int:
        """Number of attentions, routable or not."""
        return len(self.attentions)

    @property
    def routable(self) -> tuple[int, ...]:
        """Layer indices of the routable attentions, in graph order: the axis L of routes, scores and biases."""
        return tuple(a.layer for a in self.attentions if a.routable)

    @property
    def element_bytes(self) -> int:
        """Bytes of one number of the KV cache."""
        return _ELEMENT_BYTES[self.dtype]

    def difference(self, other: ModelInfo) -> str:
        """Why a plan made for `other` does not fit this model, "" where it does."""
        for field in dataclasses.fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if mine != theirs:
                return _describe(field.name, mine, theirs)
        return ""

    @classmethod
    def from_dict(cls, values: Any) -> ModelInfo:
        """From its JSON form; raises PlanError for unknown or missing keys."""
        info = strict(cls, values, PlanError, "the plan's model")
        if not isinstance(info.attentions, (list, tuple)):
            raise PlanError("attentions of the plan's model is no list")
        attentions = tuple(strict(AttentionInfo, a, PlanError, "an attention of the model") for a in info.attentions)
        return dataclasses.replace(info, attentions=attentions)

    @classmethod
    def of(cls, program: ExportedProgram, meta: dict[str, Any], weights: str) -> ModelInfo:
        """Read a captured program. `meta` is the capture's (family, context); `weights` the digest of its weights."""
        from fluxc import kernels
        from fluxc.ir.graph import calls

        kernels.register()
        import torch

        nodes = calls(program, torch.ops.fluxc.attention)
        dtype = str(nodes[0].args[0].meta["val"].dtype).removeprefix("torch.")  # type: ignore[union-attr]
        context = int(meta["context"])
        return cls(str(meta["family"]), context, dtype, weights, tuple(_attention(node) for node in nodes))


def _attention(node: Any) -> AttentionInfo:
    from fluxc.ir.graph import argument

    q, k, v = (argument(node, name).meta["val"] for name in ("q", "k", "v"))
    return AttentionInfo(
        layer=argument(node, "layer"),
        heads=int(q.shape[1]),
        kv_heads=int(k.shape[1]),
        key_dim=int(k.shape[3]),
        value_dim=int(v.shape[3]),
        window=argument(node, "window"),
    )


def _describe(name: str, mine: Any, theirs: Any) -> str:
    if name == "weights":
        return f"its weights are others ({theirs[:12]}, not {mine[:12]})"
    if name == "attentions":
        return f"its attentions have other shapes ({len(theirs)} layers, not {len(mine)} of these)"
    return f"its {name} is {theirs}, not {mine}"
