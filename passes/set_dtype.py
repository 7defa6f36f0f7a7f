"""Pass `set-dtype`: give a captured program another dtype, as if it had been captured in that dtype.

Capture leaves two kinds of marks in `meta["custom"]`, which survive save and load: `fluxc_cast` says whether a dtype
argument means fp32 whatever the model's dtype ("up") or the model's own dtype ("back"), and `fluxc_keep` names those
weights of a call that keep their dtype in every model dtype (RoPE frequencies).

1. Weights, buffers and constants in floating point that no `fluxc_keep` names: cast.
2. A dtype argument of a "back" call: the new dtype. "up" calls stay.
3. Fake values: computed again, in graph order.

    before: x = to(h, float32) {up}; n = to(x * r, float32) {back}; y = mul(w: float32, n)
    after:  x = to(h, float32) {up}; n = to(x * r, bfloat16) {back}; y = mul(w: bfloat16, n)
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch.export.graph_signature import InputKind
from torch.fx import Node
from torch.utils import _pytree as pytree

from fluxc.errors import CaptureError, OptionError
from fluxc.ir.graph import Draft
from fluxc.ir.pass_base import Note, Pass

CAST = "fluxc_cast"
KEEP = "fluxc_keep"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_WEIGHTS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


def torch_dtype(name: str) -> torch.dtype:
    """The dtype called `name` (float32, bfloat16, float16, or fp32, bf16, fp16); raises OptionError for others."""
    full = _SHORT.get(name, name)
    if full not in DTYPES:
        raise OptionError(f"{name!r} is not a model dtype", hint=f"use one of {', '.join(DTYPES)}")
    return DTYPES[full]


@dataclasses.dataclass(frozen=True)
class SetDtype(Pass):
    """Retype a captured program to `dtype`. The count is of the weights and calls that changed.

    Raises CaptureError where a floating-point cast was never classed.
    """

    dtype: str = "bfloat16"

    name: ClassVar[str] = "set-dtype"

    def rewrite(self, draft: Draft, notes: list[Note]) -> int:
        """Retype weights and back casts, then compute all fake values again."""
        dtype = torch_dtype(self.dtype)
        count = _retype_weights(draft, dtype)
        count += sum(_retype_call(node, dtype) for node in draft.graph.nodes)
        if count:
            refresh_values(draft)
        return count


def custom(node: Node) -> dict[str, Any]:
    """The marks capture left on a node."""
    return node.meta.get("custom") or {}


def floating_dtype_arguments(node: Node) -> set[torch.dtype]:
    """Floating-point dtypes among a call's arguments."""
    if node.op != "call_function":
        return set()
    leaves = pytree.tree_leaves((node.args, dict(node.kwargs)))
    return {leaf for leaf in leaves if isinstance(leaf, torch.dtype) and leaf.is_floating_point}


def refresh_values(draft: Draft) -> None:
    """Run every call of the graph on fake values again."""
    for node in draft.graph.nodes:
        if node.op == "call_function":
            draft.refresh(node)


def _retype_weights(draft: Draft, dtype: torch.dtype) -> int:
    """Case 1. Weights that are one tensor stay one tensor."""
    cast: dict[int, Any] = {}
    count = 0
    for node, spec in zip(draft.placeholders(), draft.input_specs, strict=True):
        val, name = node.meta.get("val"), str(spec.target)
        if spec.kind not in _WEIGHTS or not _follows(node, val, name):
            continue
        tensors = draft.state_dict if name in draft.state_dict else draft.constants
        tensor = tensors[name]
        tensors[name] = cast.setdefault(id(tensor), _cast(tensor, dtype))
        count += tensor.dtype != dtype or val.dtype != dtype  # type: ignore[union-attr]
        with draft.fake_mode:
            node.meta["val"] = val.to(dtype)  # type: ignore[union-attr]
    return count


def _follows(node: Node, val: Any, name: str) -> bool:
    """Whether a weight is in the model's dtype, rather than in one of its own."""
    floating = isinstance(val, torch.Tensor) and val.is_floating_point()
    return floating and not any(name in custom(user).get(KEEP, "").split(",") for user in node.users)


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if tensor.dtype == dtype:
        return tensor
    if isinstance(tensor, torch.nn.Parameter):
        return torch.nn.Parameter(tensor.detach().to(dtype), requires_grad=tensor.requires_grad)
    return tensor.to(dtype)


def _retype_call(node: Node, dtype: torch.dtype) -> int:
    """Case 2."""
    found = floating_dtype_arguments(node)
    if not found:
        return 0
    kind = custom(node).get(CAST)
    if kind is None:
        raise CaptureError(
            f"node {node.name} casts to {found.pop()} and was not classed when captured",
            hint="capture the model again, in the dtype it is to run in",
        )
    if kind == "up" or found == {dtype}:
        return 0
    arguments = (node.args, dict(node.kwargs))
    node.args, node.kwargs = pytree.tree_map_only(
        torch.dtype, lambda old: dtype if old.is_floating_point else old, arguments
    )
    return 1
