"""Which calls a stage may hold, and what their values must look like."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.export.exported_program import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Node
from torch.utils import _pytree as pytree

from fluxc.ir.nodes import graph_modules, is_call

aten = torch.ops.aten
_CAPTURED = ("attention", "grouped_mm")
_SCORED = (*_CAPTURED, "router_pool")
_ROUTED = (*_SCORED, "routed_attention")
_LOWERED = (*_SCORED, "streaming_attention", "triangle_attention")
# Put in by the passes that fuse, for the engine alone: what is exported or trained has none of them.
_FUSED = ("swiglu", "add_rms_norm", "qk_norm_rope_cache")
_OURS = {
    "captured": _CAPTURED,
    "scored": _SCORED,
    "routed": _ROUTED,
    "softened": _LOWERED,
    "lowered": _LOWERED,
    "prefill": (*_ROUTED, *_FUSED),
    "decode": ("decode_attention", "kv_write", "grouped_mm", *_FUSED),
    "append": ("append_attention", "kv_write", "grouped_mm", *_FUSED),
}
# What remains of ops that the pre-dispatch form keeps whole, once somebody decomposed it.
_DECOMPOSED = ("_softmax", "_log_softmax", "native_layer_norm", "native_dropout", "_to_copy", "_unsafe_view", "t")


def call_problems(program: ExportedProgram, stage: str) -> Iterator[str]:
    """Ops that do not belong to the stage, positions made inside, devices other than the program's own."""
    tokens = next(node for node in program.graph.nodes if node.name == "input_ids").meta["val"]
    for module in graph_modules(program.graph_module):
        for node in module.graph.nodes:
            if node.op == "call_function":
                yield from _op_problems(node, stage)
                yield from _position_problems(node, tokens)
            yield from _device_problems(node, tokens.device)
    yield from _weight_problems(program, tokens.device)


def _op_problems(node: Node, stage: str) -> Iterator[str]:
    target: Any = node.target
    namespace, name = getattr(target, "namespace", ""), getattr(target, "_opname", "")
    if isinstance(target, torch._ops.HigherOrderOperator):
        if stage != "lowered" or target is not torch.ops.higher_order.cond:
            yield f"node {node.name} is a region ({target.name()})"
    elif namespace == "fluxc":
        if name not in _OURS[stage]:
            yield f"node {node.name} calls fluxc::{name}, which no {stage} program has"
    elif namespace == "aten":
        yield from _aten_problems(node, name)
    elif not _is_size_arithmetic(target):
        yield f"node {node.name} calls {target}, which is no aten op"


def _aten_problems(node: Node, name: str) -> Iterator[str]:
    if "scaled_dot_product" in name:
        yield f"node {node.name} is {name}, not fluxc::attention"
    elif name == "_assert_tensor_metadata":
        yield f"node {node.name} pins the dtype and device of the capture"
    elif name in _DECOMPOSED:
        yield f"node {node.name} is {name}: the program was decomposed"


def _is_size_arithmetic(target: Any) -> bool:
    module = getattr(target, "__module__", "")
    return module in ("_operator", "math") or getattr(target, "__name__", "").startswith("sym_")


def _position_problems(node: Node, tokens: torch.Tensor) -> Iterator[str]:
    val = node.meta.get("val")
    counts = is_call(node, aten.arange) or is_call(node, aten.cumsum)
    if counts and isinstance(val, torch.Tensor) and any(str(size) == str(tokens.shape[1]) for size in val.shape):
        yield f"node {node.name} counts positions itself; they come from position_ids"


def _device_problems(node: Node, device: torch.device) -> Iterator[str]:
    for leaf in pytree.tree_leaves((node.args, dict(node.kwargs))):
        if isinstance(leaf, torch.device) and leaf != device:
            yield f"node {node.name} makes a tensor on {leaf}, the program is on {device}"
    for val in pytree.tree_leaves(node.meta.get("val")):
        if isinstance(val, torch.Tensor) and val.device != device:
            yield f"the value of node {node.name} is on {val.device}, the program is on {device}"


def _weight_problems(program: ExportedProgram, device: torch.device) -> Iterator[str]:
    held = {**program.constants, **program.state_dict}
    for spec in program.graph_signature.input_specs:
        tensor = held.get(str(spec.target))
        if spec.kind != InputKind.USER_INPUT and tensor is None:
            yield f"there is no tensor for {spec.target}"
        elif isinstance(tensor, torch.Tensor) and tensor.device not in (device, torch.device("meta")):
            yield f"{spec.target} is on {tensor.device}, the program is on {device}"
