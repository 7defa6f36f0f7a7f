"""From a transformers causal LM to a captured program."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Node

import fluxc.kernels
from fluxc.capture import casts
from fluxc.capture.masks import probe_layers
from fluxc.capture.refuse import refuse_unsupported
from fluxc.capture.selfcheck import self_check
from fluxc.capture.trace import trace
from fluxc.capture.twin import MARKER, fp32_twin, model_dtype, reference_twin, trace_twin, weights_of
from fluxc.errors import CaptureError
from fluxc.ir.graph import calls
from fluxc.ir.verifier import verify
from fluxc.passes.dead_code import DeadCode
from fluxc.passes.drop_asserts import DropAsserts
from fluxc.passes.drop_no_ops import DropNoOps
from fluxc.passes.group_experts import GroupExperts
from fluxc.passes.inline_regions import InlineRegions
from fluxc.passes.place import Place
from fluxc.passes.set_dtype import SetDtype

# Weights, in elements, up to which a half-precision model is checked in fp32 (8 GB of them).
_FP32_CHECK_LIMIT = 2_000_000_000


def capture_model(model: Any) -> tuple[ExportedProgram, dict[str, Any]]:
    """The program in normal form, over the model's own weights, dtype and device, and the self-check's result.

    The model is left as it was. Raises CaptureError (UnsupportedAttentionError) for what fluxc does not represent,
    SelfCheckError where the program does not compute what the model does.
    """
    fluxc.kernels.register()
    refuse_unsupported(model)
    context = context_of(model.config)
    layers = probe_layers(reference_twin(model), context)
    program = _bound(_traced(model, context), model)
    _check_attentions(program, [layer.call.layer for layer in layers], type(model).__name__)
    verify(program, "captured", "capture")
    edges = [layer.call.window for layer in layers] + _original_contexts(model.config)
    return program, self_check(*_comparable(program, model), context, edges)


def unbound_program(model: Any) -> ExportedProgram:
    """The program in normal form over the empty CPU weights of its trace, in the model's dtype; nothing is checked.

    For models whose weights come later, and may have no memory yet. What the model computes when it is made (the
    frequencies of RoPE) has to be real. Raises CaptureError as `capture_model` does.
    """
    fluxc.kernels.register()
    program = _normal_weights(_traced(model, context_of(model.config)), model)
    verify(program, "captured", "capture")
    return program


def context_of(config: Any) -> int:
    """Positions the model has, in tokens; 0 where its config does not say."""
    return int(getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 0)


def _comparable(program: ExportedProgram, model: Any) -> tuple[ExportedProgram, Any]:
    """The program and a reference in fp32, where differences mean something; in their own dtype for large models.

    In half precision a mixture of experts may send a token elsewhere after a single rounding.
    """
    if model_dtype(model) == torch.float32 or sum(p.numel() for p in model.parameters()) > _FP32_CHECK_LIMIT:
        return program, reference_twin(model)
    reference = fp32_twin(model)
    program = casts.bind(program, weights_of(reference))
    return SetDtype("float32").apply(program).program, reference


def _traced(model: Any, context: int) -> ExportedProgram:
    """The trace without regions, its casts classed, its weights still empty, its constants exact."""
    program = _normal_form(trace(trace_twin(model), context))
    rounded = _constants(program, MARKER)
    marked = casts.class_casts(program, MARKER)
    if rounded:
        # A constant made in the model's dtype was rounded to the marker's: take it from a second trace in fp32.
        exact = trace(trace_twin(model, torch.float32), context)
        marked = casts.replace_constants(marked, rounded, exact)
    return marked


def _constants(program: ExportedProgram, dtype: torch.dtype) -> list[str]:
    specs = program.graph_signature.input_specs
    names = [str(spec.target) for spec in specs if spec.kind == InputKind.CONSTANT_TENSOR]
    return [name for name in names if program.constants[name].dtype == dtype]


def _normal_form(program: ExportedProgram) -> ExportedProgram:
    for step in (InlineRegions(), DropAsserts(), GroupExperts()):
        program = step.apply(program).program
    return program


def _bound(program: ExportedProgram, model: Any) -> ExportedProgram:
    """The program over the real weights, in their dtype and on their device; tied ones once, unused ones gone."""
    device = next(model.parameters()).device
    program = _normal_weights(casts.bind(program, weights_of(model)), model)
    return program if device.type == "cpu" else Place(str(device)).apply(program).program


def _normal_weights(program: ExportedProgram, model: Any) -> ExportedProgram:
    """Tied weights once, unused ones gone, in the model's dtype."""
    for step in (DropNoOps(), DeadCode()):
        program = step.apply(program).program
    return SetDtype(str(model_dtype(model)).removeprefix("torch.")).apply(program).program


def _check_attentions(program: ExportedProgram, layers: list[int], model: str) -> None:
    """One node a layer, as many as the model called, and no position made inside."""
    found = [node.kwargs["layer"] for node in calls(program, torch.ops.fluxc.attention)]
    if not found:
        raise CaptureError(f"{model} has no attention that goes through transformers' AttentionInterface")
    if found != layers or len(set(found)) != len(found):
        raise CaptureError(f"{model} calls attentions {layers}, of which the trace holds {found}")
    length = next(node for node in program.graph.nodes if node.name == "input_ids").meta["val"].shape[1]
    for node in program.graph.nodes:
        if node.op == "call_function" and _makes_positions(node, length):
            raise CaptureError(f"{model} computes positions itself (node {node.name}), not from position_ids")


def _makes_positions(node: Node, length: torch.SymInt) -> bool:
    """Whether a call counts along the sequence: arange to S, or a cumulative sum over S."""
    val: Any = node.meta.get("val")
    counts = getattr(node.target, "overloadpacket", None) in (torch.ops.aten.arange, torch.ops.aten.cumsum)
    return counts and isinstance(val, Tensor) and any(str(size) == str(length) for size in val.shape)


def _original_contexts(config: Any) -> list[int]:
    parameters = getattr(config, "rope_parameters", None) or {}
    return (
        [int(parameters["original_max_position_embeddings"])]
        if "original_max_position_embeddings" in parameters
        else []
    )
