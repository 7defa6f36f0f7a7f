"""Attentions, their routers and their routes: complete, in graph order, with valid attributes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.export.exported_program import ExportedProgram
from torch.fx import Node

from fluxc.errors import OptionError
from fluxc.ir.layers import attention_nodes
from fluxc.ir.nodes import argument, calls, is_call
from fluxc.ir.sparse import SparseSettings

aten = torch.ops.aten
_LINEARS = ("encoder.0", "encoder.2", "head.0", "head.2", "head.4")
_PARTS = ("weight", "bias")


def attention_problems(program: ExportedProgram, stage: str) -> Iterator[str]:
    """Attentions whose attributes cannot be right, or that share a layer index."""
    fluxc = torch.ops.fluxc
    nodes = [*calls(program, fluxc.attention), *calls(program, fluxc.routed_attention)]
    if stage != "lowered":
        layers = [argument(node, "layer") for node in nodes]
        for layer in sorted({layer for layer in layers if layers.count(layer) > 1}):
            yield f"{layers.count(layer)} attentions have the layer index {layer}"
    if not nodes:
        yield "there is no attention"
    for node in nodes:
        yield from _shape_problems(node)
        if is_call(node, fluxc.attention) and argument(node, "q_start") is not None:
            yield f"node {node.name} attends from the middle of a sequence"


def _shape_problems(node: Node) -> Iterator[str]:
    q, k, v = (argument(node, name).meta["val"] for name in "qkv")
    if any(t.dim() != 4 for t in (q, k, v)) or q.shape[1] % k.shape[1] or k.shape[1] != v.shape[1]:
        yield f"node {node.name} has q, k, v of shapes {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
    if not {q.dtype} == {k.dtype} == {v.dtype}:
        yield f"node {node.name} has q, k, v of dtypes {q.dtype}, {k.dtype}, {v.dtype}"
    scale = argument(node, "scale")
    if not math.isfinite(scale) or scale <= 0 or argument(node, "softcap") < 0 or argument(node, "window") < 0:
        yield f"node {node.name} has scale {scale}, softcap {argument(node, 'softcap')}, window out of range"


def router_problems(program: ExportedProgram, stage: str) -> Iterator[str]:
    """Routable layers without a router or with an incomplete one; weights that are not fp32."""
    layers = routable_layers(program, stage)
    fused = [node for node in calls(program, torch.ops.fluxc.qk_norm_rope_cache) if argument(node, "pool")]
    pools = len(calls(program, torch.ops.fluxc.router_pool)) + len(fused)
    if pools != len(layers):
        yield f"{len(layers)} routable layers have {pools} routers"
    for name in (f"routers.{layer}.{linear}.{part}" for layer in layers for linear in _LINEARS for part in _PARTS):
        tensor = program.state_dict.get(name)
        if tensor is None:
            yield f"there is no weight {name}"
        elif tensor.dtype != torch.float32:
            yield f"the router weight {name} is {tensor.dtype}, not float32"
    outputs: Any = program.graph.output_node().args[0]
    at = 1 if stage == "scored" else 2
    scores: Any = outputs[at] if at < len(outputs) else None
    if not is_call(scores, aten.stack) or len(scores.args[0]) != len(layers):
        yield f"the output scores is not a stack of {len(layers)} scores"


def routable_layers(program: ExportedProgram, stage: str) -> list[int]:
    """Layer indices of the attentions that have a router at this stage, in graph order."""
    if stage == "lowered":
        conds = [node for node in attention_nodes(program.graph) if is_call(node, torch.ops.higher_order.cond)]
        return [int(str(node.args[1]).rpartition("_")[2]) for node in conds]
    if stage in ("routed", "prefill"):
        return [argument(node, "layer") for node in calls(program, torch.ops.fluxc.routed_attention)]
    return [argument(n, "layer") for n in calls(program, torch.ops.fluxc.attention) if not argument(n, "window")]


def route_problems(program: ExportedProgram, stage: str) -> Iterator[str]:
    """Routable attentions that are not routed, settings out of range, routes that are not score + bias > 0."""
    for node in calls(program, torch.ops.fluxc.attention):
        if not argument(node, "window"):
            yield f"node {node.name} (layer {argument(node, 'layer')}) is routable and not routed"
    routed = calls(program, torch.ops.fluxc.routed_attention)
    for node in routed:
        yield from _setting_problems(node)
    outputs: Any = program.graph.output_node().args[0]
    if len(outputs) < 3:
        return
    _, routes, scores = outputs[:3]
    if not is_call(routes, aten.stack) or list(routes.args[0]) != [argument(node, "route") for node in routed]:
        yield "the output routes is not the stack of the routes of all layers in graph order"
    elif is_call(scores, aten.stack):
        for index, route in enumerate(routes.args[0]):
            is_folded = is_call(route, aten.full)  # by the pass fold-pins
            if not is_folded and _bias_and_score(route) != (index, scores.args[0][index]):
                yield f"node {route.name} is not score + route_bias[{index}] > 0"


def _setting_problems(node: Node) -> Iterator[str]:
    try:
        SparseSettings(**{field.name: argument(node, field.name) for field in dataclasses.fields(SparseSettings)})
    except OptionError as error:
        yield f"node {node.name}: {error}"


def _bias_and_score(route: Node) -> tuple[Any, Any]:
    """(index, score) of a route = score + route_bias[index] > 0; (None, None) for another expression."""
    biased: Any = route.args[0]
    if not is_call(route, aten.gt) or not is_call(biased, aten.add):
        return None, None
    score, bias = biased.args
    is_row = is_call(bias, aten.select) and str(bias.args[0]) == "route_bias"
    return (bias.args[2], score) if is_row else (None, None)
