"""Target `torch-trt`: what lies between the attentions of a prefill, lowered by torch-tensorrt.

torch-tensorrt does not convert conditionals, so attentions stay calls of fluxc's ops, and the routed ones take the
branch of their route as they do in eager torch; decode stays a traced program. Nothing of this was run on a GPU by its
authors: it is tested over a stand-in for torch-tensorrt.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim
from torch.export.exported_program import ExportedProgram

from fluxc import kernels, passes
from fluxc.errors import TargetError
from fluxc.exporters.onnx import KV
from fluxc.exporters.torch_trt_phases import DECODE, PIECES, TorchTrtPhases
from fluxc.ir.graph import user_inputs
from fluxc.ir.kv import kv_geometry
from fluxc.ir.layers import attention_nodes
from fluxc.ir.nodes import argument, calls
from fluxc.ir.phases import Phases
from fluxc.passes.drop_routers import DropRouters
from fluxc.passes.insert_slot_cache import InsertSlotCache
from fluxc.passes.rope_per_request import RopePerRequest
from fluxc.passes.split_phases import SplitPhases

__all__ = ["KV", "build", "check", "phases", "tools"]
LIBRARY = "torch_tensorrt"
_LENGTH, _ROWS = 61, 7
"""Tokens and rows of logits of the example: sizes that no axis of a model has, so that free axes are known by them."""


def check(routed: ExportedProgram) -> None:
    """What can be known to fail before long work.

    Raises TargetError where torch-tensorrt does not import, saying why, and for a model that is not on a GPU;
    UnsupportedAttentionError for layers that one cache cannot hold.
    """
    kernels.register()
    library()
    kv_geometry(attention_nodes(routed.graph))
    device = _device(routed)
    if device.type != "cuda":
        raise TargetError(f"torch-tensorrt compiles for a GPU, and the model is on {device}", hint="give --device cuda")
    for node in calls(routed, torch.ops.fluxc.routed_attention):
        if argument(node, "kind") == "block":
            raise TargetError(
                f"layer {argument(node, 'layer')} has the sparse kind block",
                hint="transform with --sparse-kind streaming",
            )


def library() -> Any:
    """The module torch_tensorrt; raises TargetError with the reason where it does not import."""
    try:
        return importlib.import_module(LIBRARY)
    except Exception as cause:  # a missing libnvinfer is an OSError, a missing driver whatever the library likes
        reason = next(iter(str(cause).strip().splitlines()), type(cause).__name__)
        raise TargetError(
            f"{LIBRARY} does not import here: {reason}", hint="it needs TensorRT's libraries and a CUDA build of torch"
        ) from cause


def build(routed: ExportedProgram, root: Path) -> dict[str, Any]:
    """Compile the dense pieces of the prefill and write all pieces to `root`; returns `programs` of the manifest."""
    program = passes.prefill_pipeline().run(routed, "routed").program
    cut = SplitPhases().apply(program)
    files = _write_pieces(cut, _example(routed), root)
    plan = {"outputs": [*cut.outputs, *(name for layer in cut.layers for name in (layer.k, layer.v))], "pieces": files}
    (root / PIECES).write_text(json.dumps(plan), encoding="utf-8")
    step = routed
    for each in (DropRouters(), RopePerRequest(), InsertSlotCache()):
        step = each.apply(step).program
    torch.export.save(step, root / DECODE)
    lowered = sum(piece["lowered"] for piece in files)
    return {"prefill": {"file": PIECES, "lowered": lowered, "kept": len(files) - lowered}, "decode": {"file": DECODE}}


def _write_pieces(cut: Phases, values: dict[str, Tensor], root: Path) -> list[dict[str, Any]]:
    compiler, kept = library(), {id(layer.attend) for layer in cut.layers}
    files = []
    for number, piece in enumerate(cut.pieces()):
        given = tuple(values[name] for name in piece.enters)
        name, lowered = f"piece-{number:03d}.pt2", id(piece) not in kept
        program = _exported(piece.module, given)
        if lowered:
            module = compiler.dynamo.compile(program, arg_inputs=list(given))
            compiler.save(module, str(root / name), output_format="exported_program", arg_inputs=list(given))
        else:
            torch.export.save(program, root / name)
        with torch.no_grad():
            values |= dict(zip(piece.leaves, piece.module(*given), strict=True))
        files.append({"file": name, "enters": piece.enters, "leaves": piece.leaves, "lowered": lowered})
    return files


def _exported(module: Any, given: tuple[Tensor, ...]) -> ExportedProgram:
    """The piece with every axis free that has the example's length or its number of rows."""
    free = [{axis: Dim.AUTO for axis, size in enumerate(value.shape) if size in (_LENGTH, _ROWS)} for value in given]
    with torch.no_grad():
        return torch.export.export(module, given, dynamic_shapes=tuple(free), strict=False)


def _example(routed: ExportedProgram) -> dict[str, Tensor]:
    device = _device(routed)
    layers = len(calls(routed, torch.ops.fluxc.routed_attention))
    length = torch.tensor([_LENGTH], device=device)
    return {
        "input_ids": torch.zeros(1, _LENGTH, dtype=torch.int64, device=device),
        "position_ids": torch.arange(_LENGTH, device=device)[None],
        "seq_lens": length,
        "prompt_lens": length,
        "route_bias": torch.zeros(layers, 1, device=device),
        "logits_at": torch.arange(_ROWS, device=device)[None],
    }


def _device(routed: ExportedProgram) -> torch.device:
    nodes = {node.name: node for node in routed.graph.nodes if node.op == "placeholder"}
    found: torch.device = nodes[user_inputs(routed)[0]].meta["val"].device
    return found


def phases(root: Path) -> TorchTrtPhases:
    """The engine in `root`, runnable."""
    library()  # registers the operators of the compiled pieces
    return TorchTrtPhases(root)


def tools() -> dict[str, str]:
    """Versions of the libraries that shape this target's files."""
    return {LIBRARY: str(library().__version__)}
