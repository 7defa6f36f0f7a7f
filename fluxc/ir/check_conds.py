"""What `torch.cond` asks of its branches, said in our words before an exporter says it in its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.export.exported_program import ExportedProgram
from torch.fx import GraphModule, Node

from fluxc.ir.nodes import calls


def cond_problems(program: ExportedProgram, stage: str) -> Iterator[str]:
    """Predicates that are not one bool, operands passed twice, branches that differ, alias or mutate."""
    for node in calls(program, torch.ops.higher_order.cond):
        predicate, *branches, operands = node.args
        val = predicate.meta["val"]  # type: ignore[union-attr]
        if val.dtype != torch.bool or val.dim() != 0:
            yield f"node {node.name} decides by {predicate}, which is not one bool"
        if len(set(operands)) < len(operands):  # type: ignore[arg-type]
            yield f"node {node.name} passes a tensor twice"
        modules = [getattr(program.graph_module, str(branch.target)) for branch in branches]  # type: ignore[union-attr]
        for module, branch in zip(modules, branches, strict=True):
            yield from _branch_problems(module, str(branch))
        layouts = [_layout(module) for module in modules]
        if layouts[0] != layouts[1]:
            yield f"the branches of node {node.name} differ in their results: {layouts[0]} and {layouts[1]}"


def _branch_problems(module: GraphModule, name: str) -> Iterator[str]:
    results: Any = module.graph.output_node().args[0]
    if len(results) != 1:
        yield f"branch {name} has {len(results)} results, not one"
    for result in results:
        if not isinstance(result, Node) or result.op != "call_function":
            yield f"branch {name} returns its own input {result}"
        elif not result.meta["val"].is_contiguous():
            yield f"branch {name} returns {result}, which is not contiguous"
    for node in module.graph.nodes:
        if node.op == "call_function" and getattr(getattr(node.target, "_schema", None), "is_mutable", False):
            yield f"branch {name} writes to a tensor (node {node.name})"


def _layout(module: GraphModule) -> list[tuple[str, ...]]:
    """Dtype, device and sizes of each result."""
    vals = [node.meta["val"] for node in module.graph.output_node().args[0]]  # type: ignore[union-attr]
    return [(str(val.dtype), str(val.device), str(tuple(val.shape)), str(val.stride())) for val in vals]
