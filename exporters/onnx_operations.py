"""Which operations of a program ONNX can express, known before anything is translated."""

from __future__ import annotations

from typing import Any

import torch
from torch.export.exported_program import ExportedProgram

from fluxc.errors import TargetError
from fluxc.exporters.onnx_translate import quiet
from fluxc.ir.graph import graph_modules

_OURS = ("attention", "routed_attention", "router_pool", "grouped_mm")


def check_operations(program: ExportedProgram) -> None:
    """Raise TargetError naming the first operations of the program that have no ONNX form."""
    with quiet():
        known, made_of_others = _registry(), torch.export.default_decompositions()
    missing = sorted({_name(target) for target in _targets(program) if not _expressible(target, known, made_of_others)})
    if missing:
        names = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise TargetError(f"ONNX has no form for {names}", hint="`fluxc inspect --graph` shows where the model uses it")


def _targets(program: ExportedProgram) -> set[Any]:
    modules = graph_modules(program.graph_module)
    return {node.target for module in modules for node in module.graph.nodes if node.op == "call_function"}


def _expressible(target: Any, known: Any, made_of_others: Any) -> bool:
    """An operator of torch that the exporter knows, or that is made of others; Python's own work on sizes."""
    if not isinstance(target, torch._ops.OpOverload):
        return True
    if target.namespace == "fluxc":
        return target._opname in _OURS
    return known.is_registered(target) or target in made_of_others or target._can_decompose()


def _registry() -> Any:
    from torch.onnx._internal.exporter import _registration

    return _registration.ONNXRegistry.from_torchlib()


def _name(target: Any) -> str:
    return str(target).removesuffix(".default")
