"""Inputs and outputs of each stage: names, order, dtypes, and which sizes are the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.export.exported_program import ExportedProgram
from torch.export.graph_signature import OutputKind
from torch.fx import Node

from fluxc.ir.nodes import user_inputs
from fluxc.signature import (
    APPEND_INPUTS,
    CAPTURED_INPUTS,
    CAPTURED_OUTPUTS,
    DECODE_INPUTS,
    KV_TYPES,
    ROUTED_INPUTS,
    ROUTED_OUTPUTS,
    SOFTENED_INPUTS,
    SOFTENED_OUTPUTS,
)

_SCORED_INPUTS = tuple(name for name in ROUTED_INPUTS if name != "route_bias")
_NAMES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "captured": (CAPTURED_INPUTS, CAPTURED_OUTPUTS),
    "scored": (_SCORED_INPUTS, ("logits", "scores")),
    "routed": (ROUTED_INPUTS, ROUTED_OUTPUTS),
    "softened": (SOFTENED_INPUTS, SOFTENED_OUTPUTS),
    "lowered": (ROUTED_INPUTS, ROUTED_OUTPUTS),
    "prefill": (ROUTED_INPUTS, ROUTED_OUTPUTS),
    "decode": (DECODE_INPUTS, CAPTURED_OUTPUTS),
    "append": (APPEND_INPUTS, CAPTURED_OUTPUTS),
}
_ONE_REQUEST = ("lowered", "prefill")
_TYPES: dict[str, tuple[torch.dtype | None, str]] = {
    "input_ids": (torch.int64, "BS"),
    "position_ids": (torch.int64, "BS"),
    "seq_lens": (torch.int64, "B"),
    "prompt_lens": (torch.int64, "B"),
    "route_bias": (torch.float32, "LB"),
    "logits_at": (torch.int64, "BN"),
    "logits": (None, "BNV"),
    "routes": (torch.bool, "LB"),
    "scores": (torch.float32, "LB"),
    "noise": (torch.float32, "LB"),
    "tau": (torch.float32, ""),
    "weights": (torch.float32, "LB"),
    "cache": (None, "G2HTD"),
    **{name: (getattr(torch, dtype), axes) for name, (dtype, axes) in KV_TYPES.items()},
}
_DECODE_TYPES = {**_TYPES, "slots": (torch.int64, "AB"), "logits": (None, "BV")}


def signature_problems(program: ExportedProgram, stage: str) -> Iterator[str]:
    """Inputs and outputs that are not those of the stage; sizes that should be free or alike."""
    inputs, outputs = _names(program, stage)
    if user_inputs(program) != inputs:
        yield f"inputs are {', '.join(user_inputs(program))}, not {', '.join(inputs)}"
        return
    changed = [s.arg.name for s in program.graph_signature.output_specs if s.kind != OutputKind.USER_OUTPUT]
    if changed:
        yield f"the program writes to its weights or inputs ({', '.join(changed)})"
    results: Any = program.graph.output_node().args[0]
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    named = [(name, nodes[name]) for name in inputs]
    if len(results) != len(outputs) and stage != "prefill":  # check_kv looks at what follows there
        yield f"{len(results)} outputs, not {', '.join(outputs)}"
    else:
        named += list(zip(outputs, results, strict=False))
    sizes: dict[str, str] = {"2": "2"}
    types = _DECODE_TYPES if stage == "decode" else _TYPES
    for name, node in named:
        yield from _type_problems(name, node, types[name], sizes)
    yield from _freedom_problems(nodes, stage)


def _names(program: ExportedProgram, stage: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Inputs and outputs of the stage; prefill comes from a routed or from a captured program."""
    is_dense = stage == "prefill" and "route_bias" not in user_inputs(program)
    return _NAMES["captured" if is_dense else stage]


def _type_problems(
    name: str, node: Node, expected: tuple[torch.dtype | None, str], sizes: dict[str, str]
) -> Iterator[str]:
    dtype, axes = expected
    val: Any = node.meta.get("val")
    if not isinstance(val, torch.Tensor) or val.dim() != len(axes):
        yield f"{name} is not a tensor [{','.join(axes)}]"
        return
    if val.dtype != dtype and not (dtype is None and val.is_floating_point()):
        yield f"{name} is {val.dtype}, not {dtype or 'floating point'}"
    for axis, size in zip(axes, val.shape, strict=True):
        if sizes.setdefault(axis, str(size)) != str(size):
            yield f"{name} has {size} where other inputs and outputs have {axis} = {sizes[axis]}"


def _freedom_problems(nodes: dict[str, Node], stage: str) -> Iterator[str]:
    batch, length = nodes["input_ids"].meta["val"].shape
    if stage in _ONE_REQUEST and batch != 1:
        yield f"the batch is {batch}: routes are decided for one request, so the batch must be 1"
    if stage not in _ONE_REQUEST and not isinstance(batch, torch.SymInt):
        yield f"the batch is fixed at {batch}"
    if stage == "decode" and length != 1:
        yield f"the length is {length}: a decode step is one token, so it must be 1"
    for name, size in _free_sizes(nodes, stage):
        if not isinstance(size, torch.SymInt):
            yield f"the {name} is fixed at {size}"


def _free_sizes(nodes: dict[str, Node], stage: str) -> Iterator[tuple[str, Any]]:
    if stage != "decode":
        yield "length", nodes["input_ids"].meta["val"].shape[1]
        yield "number of logits rows", nodes["logits_at"].meta["val"].shape[1]
    if stage in ("decode", "append"):
        yield "number of pages", nodes["cache"].meta["val"].shape[0]
        yield "number of pages of a request", nodes["page_table"].meta["val"].shape[2]
