"""What the inputs of somebody else's program mean: tokens, padding mask, positions."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.export.graph_signature import ConstantArgument, InputKind
from torch.fx import Node

from fluxc.errors import CaptureError
from fluxc.ir.graph import Draft

_EXPORT_AGAIN = "export it with input_ids [B,S] and, at most, attention_mask and position_ids of that shape"
_DYNAMIC = 'export it with dynamic_shapes={"input_ids": {0: Dim("B"), 1: Dim("S")}} (the same for its other inputs)'


@dataclasses.dataclass(frozen=True)
class Roles:
    """The user inputs by meaning; `constants` are inputs without a tensor (use_cache=False and the like)."""

    tokens: Node
    padding: Node | None = None
    positions: Node | None = None
    arange: Node | None = None
    constants: tuple[Node, ...] = ()

    @property
    def batch(self) -> Any:
        """The symbol of the batch size."""
        return self.tokens.meta["val"].shape[0].node.expr

    @property
    def length(self) -> Any:
        """The symbol of the padded length."""
        return self.tokens.meta["val"].shape[1].node.expr

    @property
    def lengths(self) -> set[Any]:
        """Every symbol that stands for the length: an exporter may give each input its own."""
        return {
            node.meta["val"].shape[-1].node.expr for node in self._inputs() if not _fixed(node.meta["val"].shape[-1])
        }

    @property
    def batches(self) -> set[Any]:
        """Every symbol that stands for the batch size."""
        sizes = [node.meta["val"].shape[0] for node in self._inputs() if node.meta["val"].dim() == 2]
        return {size.node.expr for size in sizes if not _fixed(size)}

    def sizes(self, batch: int, length: int) -> dict[Any, int]:
        """Numbers for the size symbols of all inputs."""
        return {**dict.fromkeys(self.batches, batch), **dict.fromkeys(self.lengths, length)}

    def _inputs(self) -> list[Node]:
        return [node for node in (self.tokens, self.padding, self.positions, self.arange) if node is not None]


def read_roles(draft: Draft) -> Roles:
    """Tell the inputs apart by name, dtype and rank.

    Raises CaptureError, naming the input, for embeddings, caches and unknown inputs, and for a fixed batch or length.
    """
    found: dict[str, Any] = {"constants": ()}
    for node, spec in zip(draft.placeholders(), draft.input_specs, strict=True):
        if spec.kind != InputKind.USER_INPUT:
            continue
        if isinstance(spec.arg, ConstantArgument) or not isinstance(node.meta.get("val"), torch.Tensor):
            found["constants"] += (node,)
            continue
        role = _role(node)
        if role in found:
            raise CaptureError(f"the program takes two inputs of {role}: {found[role].name}, {node.name}")
        found[role] = node
    if "tokens" not in found:
        raise CaptureError("the program takes no token ids", hint=_EXPORT_AGAIN)
    _check_free(found["tokens"])
    return Roles(**found)


def _role(node: Node) -> str:
    val, name = node.meta["val"], node.name
    whole = val.dtype in (torch.int64, torch.int32)
    if "embed" in name and val.is_floating_point():
        raise CaptureError(f"the program takes embeddings ({name}), not token ids", hint=_EXPORT_AGAIN)
    if "past" in name or "cache" in name.replace("cache_position", "") or val.dim() == 4:
        raise CaptureError(f"the program takes a key-value cache or a ready mask ({name})", hint=_EXPORT_AGAIN)
    if "position" in name and whole and val.dim() == 2:
        return "positions"
    if "position" in name and whole and val.dim() == 1:
        return "arange"
    if "mask" in name and val.dim() == 2:
        return "padding"
    if whole and val.dim() == 2 and "type" not in name and "label" not in name and "decoder" not in name:
        return "tokens"
    raise CaptureError(f"the program takes the input {name} {tuple(val.shape)}, unknown to fluxc", hint=_EXPORT_AGAIN)


def _check_free(tokens: Node) -> None:
    """Batch and length must be symbols of their own."""
    for size, axis in zip(tokens.meta["val"].shape, ("batch", "length"), strict=True):
        if _fixed(size):
            raise CaptureError(f"the program's {axis} is fixed at {size} (input {tokens.name})", hint=_DYNAMIC)
        if not size.node.expr.is_Symbol:
            raise CaptureError(f"the program's {axis} must be {size.node.expr} for a whole number", hint=_DYNAMIC)


def _fixed(size: Any) -> bool:
    return not isinstance(size, torch.SymInt) or size.node.expr.is_Integer
