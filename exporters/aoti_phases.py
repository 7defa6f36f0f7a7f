"""The programs of an AOTI engine, cut from one routed program: prefill with its conditionals, decode and append."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.export.exported_program import ExportedProgram
from torch.fx import Node

from fluxc import passes
from fluxc.exporters.aoti_pieces import Cut, cut
from fluxc.ir.graph import is_call, user_inputs
from fluxc.ir.layers import attention_nodes
from fluxc.passes.dead_code import DeadCode
from fluxc.passes.expose_kv import ExposeKV
from fluxc.passes.lower_to_cond import LowerToCond

PHASES = ("prefill", "decode", "append")
_AXES = {
    "input_ids": ("B", "S"),
    "logits_at": ("B", "N"),
    "cache": ("pages", "2", "Hk", "64", "D"),
    "page_table": ("A", "B", "P"),
}


@dataclasses.dataclass(frozen=True)
class Phase:
    """One program in pieces; `signature`: dtype and shape of its inputs and outputs, free sizes by name."""

    cut: Cut
    signature: dict[str, Any]


def phases_of(routed: ExportedProgram) -> dict[str, Phase]:
    """Prefill, decode and append, over the routed program's own weights."""
    kept = [f"{name}_{index}" for index in range(len(attention_nodes(routed.graph))) for name in "kv"]
    prefill = _prefill(routed)
    made = cut(prefill, ["logits", "routes", "scores", *kept])
    routes = {f"route_{row}": name for row, name in enumerate(_routes(prefill))}
    outputs = {**made.recipe.outputs, **routes}
    made = dataclasses.replace(made, recipe=dataclasses.replace(made.recipe, outputs=outputs))
    decode = passes.decode_pipeline().run(routed, "routed").program
    append = passes.append_pipeline().run(routed, "routed").program
    return {
        "prefill": Phase(made, _signature(prefill, tuple(outputs))),
        "decode": Phase(cut(decode, ["logits"]), _signature(decode, ("logits",))),
        "append": Phase(cut(append, ["logits"]), _signature(append, ("logits",))),
    }


def conditionals(program: ExportedProgram) -> list[Node]:
    """The conds of a program."""
    return [node for node in program.graph.nodes if is_call(node, torch.ops.higher_order.cond)]


def _routes(prefill: ExportedProgram) -> list[str]:
    """The value bool[1] that each cond's predicate is a view of."""
    predicates = [node.all_input_nodes[0] for node in conditionals(prefill)]
    return [predicate.all_input_nodes[0].name for predicate in predicates]


def _signature(program: ExportedProgram, outputs: tuple[str, ...]) -> dict[str, Any]:
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    inputs = {name: nodes[name].meta["val"] for name in user_inputs(program)}
    names: dict[str, str] = {}
    for name, axes in _AXES.items():
        if name in inputs:
            names |= {str(size): axis for size, axis in zip(inputs[name].shape, axes, strict=True)}
    results: Any = program.graph.output_node().args[0]
    vals = {name: node.meta["val"] for name, node in zip(outputs, results, strict=False)}
    return {"inputs": _types(inputs, names), "outputs": _types(vals, names)}


def _types(vals: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    return {
        name: {
            "dtype": str(val.dtype).removeprefix("torch."),
            "shape": [size if isinstance(size, int) else names.get(str(size), str(size)) for size in val.shape],
        }
        for name, val in vals.items()
    }


def _prefill(routed: ExportedProgram) -> ExportedProgram:
    """One request; a `torch.cond` for each routable layer."""
    program = routed
    for step in (ExposeKV(), LowerToCond(), DeadCode()):
        program = step.apply(program).program
    return program
