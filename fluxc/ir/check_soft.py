"""Softened programs: both branches in every routable layer, mixed by the output weights; only routers train."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.export.exported_program import ExportedProgram
from torch.fx import Node

from fluxc.ir.nodes import argument, calls, is_call
from fluxc.router import PREFIX

aten = torch.ops.aten


def soft_problems(program: ExportedProgram, stage: str) -> Iterator[str]:
    """Layers without a sparse branch, mixes by another weight than the output's, weights that should (not) train."""
    fluxc = torch.ops.fluxc
    full = [node for node in calls(program, fluxc.attention) if not argument(node, "window")]
    sparse = [node for op in (fluxc.streaming_attention, fluxc.triangle_attention) for node in calls(program, op)]
    by_layer = {argument(node, "layer"): node for node in sparse}
    layers = [argument(node, "layer") for node in full]
    if sorted(by_layer) != sorted(layers) or len(sparse) != len(full):
        yield f"layers {layers} have full branches, layers {sorted(by_layer)} sparse ones"
        return
    yield from _weight_problems(program, [(node, by_layer[argument(node, "layer")]) for node in full])
    yield from _training_problems(program)


def _weight_problems(program: ExportedProgram, branches: list[tuple[Node, Node]]) -> Iterator[str]:
    outputs: Any = program.graph.output_node().args[0]
    weights: Any = outputs[1] if len(outputs) > 1 else None
    if not is_call(weights, aten.stack) or len(weights.args[0]) != len(branches):
        yield f"the output weights is not a stack of {len(branches)} weights"
        return
    for weight, (full, sparse) in zip(weights.args[0], branches, strict=True):
        if _share(full) is not weight or _rest(sparse) is not weight:
            yield f"nodes {full.name} and {sparse.name} are not mixed by {weight.name} and 1 - {weight.name}"
        if _operands(full) != _operands(sparse):
            yield f"nodes {full.name} and {sparse.name} attend to different tensors"


def _operands(node: Node) -> list[Any]:
    return [argument(node, name) for name in ("q", "k", "v", "scale")]


def _share(branch: Node) -> Any:
    """w of `branch * view(w)`, None for another use."""
    factor = _factor(branch)
    return factor.args[0] if is_call(factor, aten.view) else None


def _rest(branch: Node) -> Any:
    """w of `branch * (1 - view(w))`, None for another use."""
    factor = _factor(branch)
    if not is_call(factor, aten.rsub) or factor.args[1] != 1:
        return None
    share: Any = factor.args[0]
    return share.args[0] if is_call(share, aten.view) else None


def _factor(branch: Node) -> Any:
    users = list(branch.users)
    return users[0].args[1] if len(users) == 1 and is_call(users[0], aten.mul) else None


def _training_problems(program: ExportedProgram) -> Iterator[str]:
    for name, tensor in program.state_dict.items():
        if tensor.requires_grad != name.startswith(PREFIX):
            yield f"the weight {name} {'trains' if tensor.requires_grad else 'does not train'}"
