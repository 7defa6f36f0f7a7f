"""Target `onnx`: prefill and decode as ONNX models over one file of weights.

Prefill is the routed program of one request: an `If` for each routable layer, routers inside, `route_bias` an input;
it hands out keys (after RoPE) and values. Decode is batched, has no branch, and keeps one cache a layer. Attention is
written in standard operators (`onnx_attention.py`): ONNX Runtime's own GroupQueryAttention took as long on the CPU.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from torch.export.exported_program import ExportedProgram

from fluxc import kernels, passes
from fluxc.errors import InternalError, TargetError
from fluxc.exporters.onnx_attention import OPSET
from fluxc.exporters.onnx_functions import Functions
from fluxc.exporters.onnx_hf import FILE as HF
from fluxc.exporters.onnx_hf import hf_model, write_configs
from fluxc.exporters.onnx_operations import check_operations
from fluxc.exporters.onnx_options import OnnxOptions
from fluxc.exporters.onnx_phases import OnnxPhases
from fluxc.exporters.onnx_sessions import OnnxSessions
from fluxc.exporters.onnx_translate import translate
from fluxc.exporters.onnx_weights import save_models
from fluxc.ir.kv import kv_geometry
from fluxc.ir.layers import attention_nodes
from fluxc.ir.nodes import argument, calls
from fluxc.passes.drop_routers import DropRouters
from fluxc.passes.insert_past import check_rope
from fluxc.passes.insert_slot_cache import InsertSlotCache
from fluxc.passes.rope_per_request import RopePerRequest

PREFILL, DECODE, WEIGHTS = "prefill.onnx", "decode.onnx", "weights.bin"
OPTIONS = frozenset(field.name for field in dataclasses.fields(OnnxOptions))
TOOLS = ("onnx", "onnxscript", "onnx-ir", "onnxruntime")
KV = {"layout": "slots", "axes": "B,Hk,C,D", "prefill": "k_<a>, v_<a>", "decode": "k_cache_<a>, v_cache_<a>"}


def check(routed: ExportedProgram, **options: Any) -> None:
    """What can be known to fail before long work.

    Raises OptionError for options out of range; TargetError for operations ONNX cannot express, for a dtype ONNX
    Runtime has no kernels for, and for attention that has no ONNX form, naming the layer; UnsupportedAttentionError for
    layers that one cache cannot hold.
    """
    OnnxOptions(**options)
    kernels.register()
    geometry = kv_geometry(attention_nodes(routed.graph))
    if geometry.dtype != torch.float32:
        name = str(geometry.dtype).removeprefix("torch.")
        raise TargetError(
            f"the model is {name}, and ONNX engines compute in float32", hint="transform it with --dtype float32"
        )
    for node in calls(routed, torch.ops.fluxc.routed_attention):
        if argument(node, "kind") == "block":
            raise TargetError(
                f"layer {argument(node, 'layer')} has the sparse kind block, which has no ONNX form",
                hint="transform with --sparse-kind streaming or triangle",
            )
    check_operations(routed)
    if options.get("io") == "hf":
        check_rope(routed)


def build(routed: ExportedProgram, root: Path, **options: Any) -> dict[str, Any]:
    """Write the two models and their weights to `root`; returns `programs` of the manifest.

    Raises CaptureError naming an operation that ONNX cannot express.
    """
    settings = OnnxOptions(**options)
    models = {PREFILL: _prefill(routed, settings), DECODE: decode_model(routed, settings.opset)}
    if settings.io == "hf":
        models[HF] = hf_model(routed, settings)
    save_models(models, root, WEIGHTS)
    for name in models:
        onnx.checker.check_model(root / name, full_check=True)
    if settings.io == "hf":
        write_configs(root, settings, models[HF])
    programs = {Path(name).stem: {"file": name, **signature(model)} for name, model in models.items()}
    _check_conditionals(models[PREFILL], routed, len(settings.pins))
    return programs


def phases(root: Path) -> OnnxPhases:
    """The engine in `root`, runnable on torch tensors."""
    return OnnxPhases(OnnxSessions(root, {"prefill": PREFILL, "decode": DECODE}, arena=False))


def tools() -> dict[str, str]:
    """Versions of the libraries that shape this target's files."""
    return {name: importlib.metadata.version(name) for name in TOOLS}


def _prefill(routed: ExportedProgram, options: OnnxOptions) -> ir.Model:
    program = passes.prefill_pipeline().run(routed, "routed").program
    kept = [f"{name}_{index}" for index in range(len(attention_nodes(program.graph))) for name in "kv"]
    axes = {"input_ids": ("B", "S"), "logits_at": ("B", "N")}
    functions = Functions(opset=options.opset, pins=options.pins)
    return translate(program, ["logits", "routes", "scores", *kept], axes, functions)


def decode_model(routed: ExportedProgram, opset: int = OPSET) -> ir.Model:
    """The decode step over one cache a layer: batched, without routers and branches."""
    program = routed
    for step in (DropRouters(), RopePerRequest(), InsertSlotCache()):
        program = step.apply(program).program
    caches = [f"{name}_cache_{index}" for index in range(_layers(routed)) for name in "kv"]
    axes: dict[str, tuple[str, ...]] = {"input_ids": ("B", "one")}
    axes |= {name: ("B", "Hk", f"C_{name.rpartition('_')[2]}", "D") for name in caches}
    names = ["logits", *[f"{name}_out" for name in caches]]
    results: Any = program.graph.output_node().args[0]
    return translate(program, names, axes, Functions(opset=opset), attentions=results[1::2])


def _layers(routed: ExportedProgram) -> int:
    return len(attention_nodes(routed.graph))


def signature(model: ir.Model) -> dict[str, Any]:
    """dtype and shape of every input and output."""
    return {
        kind: {str(value.name): _type(value) for value in values}
        for kind, values in (("inputs", model.graph.inputs), ("outputs", model.graph.outputs))
    }


def _type(value: ir.Value) -> dict[str, Any]:
    shape = [size if isinstance(size, int) else str(size.value) for size in value.shape or ()]
    return {"dtype": value.dtype.numpy().name if value.dtype else "", "shape": shape}


def _check_conditionals(model: ir.Model, routed: ExportedProgram, pinned: int) -> None:
    """Every routable layer that is not pinned must have become a conditional of its own."""
    found = sum(1 for _ in _routed_calls(model))
    expected = len(calls(routed, torch.ops.fluxc.routed_attention)) - pinned
    if found != expected:
        raise InternalError(f"{found} of {expected} routable layers became conditionals")


def _routed_calls(model: ir.Model) -> Iterator[ir.Node]:
    with_if = {key for key, body in model.functions.items() if any(node.op_type == "If" for node in body)}
    return (node for node in model.graph if node.op_identifier() in with_if and node.op_type.startswith("routed_"))
