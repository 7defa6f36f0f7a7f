"""Classing the casts of a traced program, and binding the model's real weights and dtype to it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Node

from fluxc.errors import CaptureError
from fluxc.ir.graph import Draft
from fluxc.passes.set_dtype import CAST, KEEP, custom, floating_dtype_arguments


def class_casts(program: ExportedProgram, marker: torch.dtype) -> ExportedProgram:
    """Mark every floating-point dtype argument "back" (it is `marker`) or "up", and weights that are not in `marker`.

    The program was traced with the model's own weights in `marker`; see passes/set_dtype.py for the marks.
    """
    draft = Draft(program)
    for node in draft.graph.nodes:
        found = floating_dtype_arguments(node)
        if found:
            _mark(node, CAST, "back" if marker in found else "up")
    for node, spec in zip(draft.placeholders(), draft.input_specs, strict=True):
        if spec.target and _keeps_dtype(node, marker):
            for user in node.users:
                _mark(user, KEEP, ",".join(filter(None, (custom(user).get(KEEP), spec.target))))
    return draft.close()


def bind(program: ExportedProgram, weights: dict[str, Tensor]) -> ExportedProgram:
    """Replace the empty weights of the trace by the model's own, frozen, by reference."""
    draft = Draft(program)
    frozen: dict[int, Tensor] = {}
    for spec in draft.input_specs:
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER) and spec.target in weights:
            tensor = weights[spec.target]
            draft.state_dict[spec.target] = frozen.setdefault(id(tensor), _frozen(tensor))
    return draft.close()


def _keeps_dtype(node: Node, marker: torch.dtype) -> bool:
    val: Any = node.meta.get("val")
    return isinstance(val, Tensor) and val.is_floating_point() and val.dtype != marker


def _mark(node: Node, key: str, value: str) -> None:
    node.meta["custom"] = {**custom(node), key: value}


def _frozen(tensor: Tensor) -> Tensor:
    if isinstance(tensor, torch.nn.Parameter):
        return torch.nn.Parameter(tensor.detach(), requires_grad=False)
    return tensor.detach()


def replace_constants(program: ExportedProgram, names: list[str], exact: ExportedProgram) -> ExportedProgram:
    """Take the constants `names` from `exact`, another trace of the same model."""
    ours, theirs = _constant_names(program), _constant_names(exact)
    if len(ours) != len(theirs):
        raise CaptureError("the model makes other constants in fp32 than in half precision")
    draft = Draft(program)
    for name, other in zip(ours, theirs, strict=True):
        if name in names:
            draft.constants[name] = exact.constants[other]
    return draft.close()


def _constant_names(program: ExportedProgram) -> list[str]:
    specs = program.graph_signature.input_specs
    return [str(spec.target) for spec in specs if spec.kind == InputKind.CONSTANT_TENSOR]
