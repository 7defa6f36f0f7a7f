"""Programs of the engine: what prefill hands out, and that every layer writes and reads the cache it is given."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.export.exported_program import ExportedProgram
from torch.fx import Node

from fluxc.ir.check_routes import route_problems, router_problems
from fluxc.ir.nodes import argument, calls, is_call, user_inputs

aten = torch.ops.aten
_ATTENTIONS = {"decode": "decode_attention", "append": "append_attention"}
_OF_LAYER = {
    "decode": ("page_table", "lens"),
    "append": ("page_table", "lens", "sinks", "windows"),
}


def prefill_problems(program: ExportedProgram, stage: str) -> Iterator[str]:
    """Outputs that are not those of the routed or captured program and then k_0, v_0, k_1, v_1, ..."""
    is_routed = "route_bias" in user_inputs(program)
    if is_routed:
        yield from router_problems(program, stage)
        yield from route_problems(program, stage)
    outputs: Any = program.graph.output_node().args[0]
    nodes = [*calls(program, torch.ops.fluxc.attention), *calls(program, torch.ops.fluxc.routed_attention)]
    in_order = [node for node in program.graph.nodes if node in nodes]
    expected = [argument(node, name) for node in in_order for name in "kv"]
    if list(outputs[3 if is_routed else 1 :]) != expected:
        yield "the last outputs are not key and value of each attention in graph order"


def cache_problems(program: ExportedProgram, stage: str) -> Iterator[str]:
    """Attentions that do not read the cache, or that have no write of their own on the right side of them."""
    nodes = calls(program, getattr(torch.ops.fluxc, _ATTENTIONS[stage]))
    writes = [node for node in program.graph.nodes if _writes(node)]
    lens = next((node for node in program.graph.nodes if node.name == "lens"), None)
    held = lens.meta["val"].shape[0] if lens else 0
    if not len(nodes) == len(writes) == held:
        yield f"{len(nodes)} attentions, {len(writes)} writes, and inputs for {held} layers"
        return
    layers = [argument(node, "layer") for node in nodes]
    if len(set(layers)) < len(layers):
        yield f"attentions share a layer index: {layers}"
    order = {node: place for place, node in enumerate(program.graph.nodes)}
    for index, (node, write) in enumerate(zip(nodes, writes, strict=True)):
        yield from _layer_problems(node, write, index, stage)
        if (order[write] < order[node]) != (stage == "decode"):
            yield f"node {write.name} stands on the wrong side of {node.name}"


def _writes(node: Node) -> bool:
    """Whether the node writes to slots of the engine; the fused op may also write to none."""
    is_fused = is_call(node, torch.ops.fluxc.qk_norm_rope_cache) and str(argument(node, "cache")) == "cache"
    return is_fused or is_call(node, torch.ops.fluxc.kv_write)


def _layer_problems(node: Node, write: Node, index: int, stage: str) -> Iterator[str]:
    for call in (node, write):
        if str(argument(call, "cache")) != "cache":
            yield f"node {call.name} does not use the input cache"
    pairs = [(node, name) for name in _OF_LAYER[stage]] + [(write, "slots")]
    for call, name in pairs:
        if _row_of(argument(call, name), name) != index:
            yield f"node {call.name} does not take {name}[{index}]"


def _row_of(value: Any, name: str) -> int | None:
    """The index a where `value` is name[a], None for anything else."""
    if not is_call(value, aten.select) or value.args[1] != 0:
        return None
    source = value.args[0]
    if is_call(source, aten.unsqueeze):  # slots [A,B] of a decode program as [A,B,1]
        source = source.args[0]
    return value.args[2] if str(source) == name else None
