"""The ONNX models that TensorRT engines are built from, and the shapes they are built for."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir
from torch.export.exported_program import ExportedProgram

from fluxc import passes
from fluxc.exporters.onnx import decode_model
from fluxc.exporters.onnx_translate import translate
from fluxc.exporters.onnx_weights import save_models
from fluxc.exporters.trt_attention import fused_function
from fluxc.exporters.trt_functions import Branch, TrtFunctions, fused
from fluxc.exporters.trt_options import TrtOptions
from fluxc.ir.layers import attention_nodes
from fluxc.kernels.schemas import PAGE

WEIGHTS, FUSED = "weights.bin", ".fused.onnx"
MOST_ROWS = 16
"""Rows of a prompt that one prefill gives logits of, at most."""
Shapes = dict[str, list[list[int]]]


def write_models(routed: ExportedProgram, root: Path, options: TrtOptions) -> dict[str, ir.Model]:
    """Write the ONNX models over one file of weights to `root`; returns them by phase.

    Phases: prefill and decode, or prefill_full, prefill_sparse and decode. Raises CaptureError naming an operation
    that ONNX cannot express.
    """
    program = passes.prefill_pipeline().run(routed, "routed").program
    branches: dict[str, Branch] = {"prefill": "both"}
    if options.plan == "split":
        branches = {"prefill_full": "full", "prefill_sparse": "sparse"}
    functions = {phase: TrtFunctions(branch=branch, pins=options.pins) for phase, branch in branches.items()}
    models = {phase: prefill_model(program, functions[phase]) for phase in functions}
    models["decode"] = decode_model(routed)
    save_models({f"{phase}.onnx": model for phase, model in models.items()}, root, WEIGHTS)
    for phase in models:
        onnx.checker.check_model(root / f"{phase}.onnx", full_check=True)
    if options.attention == "fused":
        for phase, written in functions.items():
            _fuse(root / f"{phase}.onnx", root / f"{phase}{FUSED}", written)
    return models


def _fuse(source: Path, target: Path, functions: TrtFunctions) -> None:
    """Write `source` again with TensorRT's own attention in place of the loops over full rows, if it has any."""
    model = onnx.load(source, load_external_data=False)
    replaced = [function for function in model.functions if fused(functions.rows.get(function.name))]
    for function in replaced:
        function.CopyFrom(onnx.parser.parse_function(fused_function(functions.rows[function.name])))
    if replaced:
        onnx.save(model, target)


def prefill_model(program: ExportedProgram, functions: TrtFunctions) -> ir.Model:
    """The model of a prefill program, whose attentions `functions` writes."""
    kept = [f"{name}_{index}" for index in range(len(attention_nodes(program.graph))) for name in "kv"]
    axes = {"input_ids": ("B", "S"), "logits_at": ("B", "N")}
    return translate(program, ["logits", "routes", "scores", *kept], axes, functions)


def routed_calls(model: ir.Model) -> list[str]:
    """Names of the nodes that call a routed attention, in graph order."""
    return [str(node.name) for node in model.graph if node.op_type.startswith("routed_")]


def shapes(model: ir.Model, length: int, batch: int) -> Shapes:
    """For each input with free sizes its least, usual and largest shape."""
    profile = {}
    for value in model.graph.inputs:
        sizes = [size if isinstance(size, int) else str(size.value) for size in value.shape or ()]
        if any(isinstance(size, str) for size in sizes):
            ranges = [_range(size, length, batch) for size in sizes]
            profile[str(value.name)] = [list(shape) for shape in zip(*ranges, strict=True)]
    return profile


def _range(size: int | str, length: int, batch: int) -> tuple[int, int, int]:
    if isinstance(size, int):
        return size, size, size
    if size == "B":
        return 1, 1, batch
    if size == "N":
        return 1, 1, min(MOST_ROWS, length)
    # S, or the slots of a cache: whole pages of the engine, and one that padding is written to.
    most = length if size == "S" else -(-length // PAGE) * PAGE + 1
    return 1, max(1, length // 2), most
