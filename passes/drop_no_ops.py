"""Pass `drop-no-ops`: erase calls that return their input, and second names of one weight.

1. `slice(x, dim, 0, max)` with step 1: x.
2. `dropout(x, p, train=False)` and `dropout(x, 0, ...)`: x.
3. `to` with a device where x is on that device already: `to.dtype(x, dtype)`, so that no device is named.
4. `detach`, `alias`: x; also `lift_fresh_copy` of a constant that nobody writes to.
5. A weight, buffer or constant that is the same tensor as an earlier one (tied embeddings): the earlier one.

    before: y = to.device(x, cpu, float32); z = slice(y, 1, 0, 9223372036854775807)
    after:  y = to.dtype(x, float32)
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any, ClassVar

import torch
from torch.export.graph_signature import InputKind
from torch.fx import Node

from fluxc.ir.graph import Draft, argument, is_call
from fluxc.ir.pass_base import Note, Pass

aten = torch.ops.aten
_ALIASES = (aten.detach.default, aten.alias.default, aten.detach_.default)


@dataclasses.dataclass(frozen=True)
class DropNoOps(Pass):
    """Erase identities and second names of one weight; counts what it erased or rewrote."""

    name: ClassVar[str] = "drop-no-ops"
    runs_after: ClassVar[tuple[str, ...]] = ("inline-regions", "drop-asserts")

    def rewrite(self, draft: Draft, notes: list[Note]) -> int:
        """Weights last: only then are all their users direct."""
        count = sum(_forward_input(draft, node) for node in list(draft.graph.nodes) if _is_identity(node))
        count += sum(_name_no_device(draft, node) for node in list(draft.graph.nodes))
        return count + _merge_tied(draft)


def _is_identity(node: Node) -> bool:
    if is_call(node, aten.slice.Tensor):  # case 1
        start, end = argument(node, "start"), argument(node, "end")
        return start in (0, None) and end in (sys.maxsize, None) and argument(node, "step") == 1
    if is_call(node, aten.dropout):  # case 2
        return argument(node, "train") is False or argument(node, "p") == 0
    return node.target in _ALIASES or (is_call(node, aten.lift_fresh_copy) and not _written(node))  # case 4


def _written(node: Node) -> bool:
    """Whether a call writes to the value of `node`, under this or another name."""
    for user in node.users:
        if user.target in _ALIASES:
            if _written(user):
                return True
        elif getattr(getattr(user.target, "_schema", None), "is_mutable", False):
            return True
    return False


def _forward_input(draft: Draft, node: Node) -> int:
    node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
    draft.graph.erase_node(node)
    return 1


def _name_no_device(draft: Draft, node: Node) -> int:
    """Case 3."""
    if not (is_call(node, aten.to.device) or is_call(node, aten.to.dtype_layout)):
        return 0
    source: Any = node.args[0]
    value, device, dtype = source.meta["val"], argument(node, "device"), argument(node, "dtype")
    if device is not None and value.device != torch.device(device):
        return 0
    with draft.inserting_before(node):
        cast = draft.call(aten.to.dtype, (source, value.dtype if dtype is None else dtype))
    cast.meta.update({key: value for key, value in node.meta.items() if key != "val"})
    node.replace_all_uses_with(cast)
    draft.graph.erase_node(node)
    return 1


def _weights(draft: Draft) -> list[tuple[Node, Any]]:
    """Placeholders of weights, buffers and constants with their tensors."""
    found = []
    for node, spec in zip(draft.placeholders(), draft.input_specs, strict=True):
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            tensor = draft.state_dict.get(str(spec.target), draft.constants.get(str(spec.target)))
            found.append((node, tensor))
    return found


def _merge_tied(draft: Draft) -> int:
    """Case 5. Tied tensors share storage and shape."""
    first: dict[tuple[Any, ...], Node] = {}
    merged = 0
    for node, tensor in _weights(draft):
        known = first.setdefault(_identity(tensor), node)
        if known is not node:
            node.replace_all_uses_with(known)
            draft.remove_input(node)
            merged += 1
    return merged


def _identity(tensor: torch.Tensor) -> tuple[Any, ...]:
    if tensor.device.type == "meta" or not tensor.numel():
        return (id(tensor),)
    return (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
