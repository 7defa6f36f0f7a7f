"""Target `trt`: prefill and decode as TensorRT engines, each built from an ONNX file that ONNX Runtime runs as well.

The parity check runs those very files. The engines hold the weights, each its own copy: TensorRT shares none, and
leaves them out only on a machine with a GPU.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch.export.exported_program import ExportedProgram

from fluxc import kernels
from fluxc.errors import TargetError
from fluxc.exporters import trt_process
from fluxc.exporters.onnx import KV, signature
from fluxc.exporters.onnx_phases import OnnxPhases
from fluxc.exporters.onnx_sessions import OnnxSessions
from fluxc.exporters.trt_builder import installed
from fluxc.exporters.trt_graphs import FUSED, WEIGHTS, routed_calls, shapes, write_models
from fluxc.exporters.trt_options import TrtOptions
from fluxc.exporters.trt_read import Reading, read
from fluxc.exporters.trt_split import SplitPhases
from fluxc.hashed_files import FileEntry
from fluxc.ir.kv import kv_geometry
from fluxc.ir.layers import attention_nodes
from fluxc.ir.nodes import argument, calls

__all__ = ["COPIES", "KV", "OPTIONS", "build", "check", "limits", "phases", "tidy", "tools"]
OPTIONS = frozenset(field.name for field in dataclasses.fields(TrtOptions))
COPIES = 4
"""Times the weights that an export needs on the disk: the ONNX file, and up to three engines."""
ROWS = 512
"""No tensor of an engine holds more attention weights than heads x ROWS x the longest prompt."""
TOOLS = ("onnx", "onnxscript", "onnx-ir", "onnxruntime")
_PARSE_SECONDS = 600.0
_PARTIAL = "give --allow-partial to keep it, --plan split for engines without conditionals"


def check(routed: ExportedProgram, **options: Any) -> None:
    """What can be known to fail before long work.

    Raises OptionError for options out of range; TargetError for a dtype, experts or an attention that has no form here,
    naming it; UnsupportedAttentionError for layers that one cache cannot hold.
    """
    settings = TrtOptions(**options)
    kernels.register()
    geometry = kv_geometry(attention_nodes(routed.graph))
    if geometry.dtype != torch.float32:
        name = str(geometry.dtype).removeprefix("torch.")
        raise TargetError(
            f"the model is {name}, and TensorRT engines are built from float32",
            hint="transform it with --dtype float32",
        )
    for node in calls(routed, torch.ops.fluxc.grouped_mm):
        raise TargetError(
            f"the model has a mixture of experts ({node.name}), in a form that TensorRT does not build",
            hint="use --target onnx for this model",
        )
    for node in calls(routed, torch.ops.fluxc.attention) if settings.attention == "fused" else ():
        raise TargetError(
            f"layer {argument(node, 'layer')} has a window of its own, which TensorRT-RTX does not build beside its "
            "fused attention",
            hint="leave --attention out",
        )
    for node in calls(routed, torch.ops.fluxc.routed_attention):
        if argument(node, "kind") == "block":
            raise TargetError(
                f"layer {argument(node, 'layer')} has the sparse kind block, which has no TensorRT form",
                hint="transform with --sparse-kind streaming or triangle",
            )


def build(routed: ExportedProgram, root: Path, **options: Any) -> dict[str, Any]:
    """Write ONNX models and engines to `root`; returns `programs` of the manifest, with what was read of each engine.

    Raises CaptureError or TargetError naming an operation that ONNX or TensorRT cannot express, before anything is
    built; InternalError with the last lines of a builder that crashed, and for an engine in which not every routable
    layer is a conditional (unless allow_partial).
    """
    settings = TrtOptions(**options)
    models = write_models(routed, root, settings)
    parsed = {phase: trt_process.parse(root / f"{phase}.onnx", _PARSE_SECONDS) for phase in models}
    return {
        phase: _program(phase, model, root, settings, parsed[phase], _heads(routed)) for phase, model in models.items()
    }


def _program(
    phase: str, model: ir.Model, root: Path, settings: TrtOptions, parsed: dict[str, Any], heads: int
) -> dict[str, Any]:
    onnx, engine, inspect = (root / f"{phase}.{end}" for end in ("onnx", "engine", "inspect"))
    onnx = fused if (fused := root / f"{phase}{FUSED}").is_file() else onnx
    profile = shapes(model, settings.length, settings.batch)
    made = trt_process.build(onnx, engine, profile, settings.time_limit, inspect)
    names = routed_calls(model) if phase == "prefill" else []
    reading = read(engine, names, inspect)
    inspect.unlink(missing_ok=True)
    _check_conditionals(phase, names, reading, settings)
    built = {
        "library": installed(),
        "version": made["version"],
        "seconds": round(made["build_seconds"], 2),
        "peak_bytes": made["peak_bytes"],
        "bytes": made["bytes"],
        "network_layers": parsed["layers"],
        "read_from": reading.source,
        "conditionals": len(reading.conditionals),
        "routable": len(names),
        "largest_buffer_bytes": reading.largest_region,
        "attention_bound_bytes": heads * ROWS * settings.length * 4,
        "onnx_sha256": FileEntry.of(onnx).sha256,
        "attention": "fused" if onnx.name.endswith(FUSED) else "decomposed",
    }
    return {"file": engine.name, **signature(model), "profile": profile, "built": built}


def _check_conditionals(phase: str, names: list[str], reading: Reading, settings: TrtOptions) -> None:
    if len(reading.conditionals) == len(names) or settings.allow_partial:
        return
    missing = ", ".join(name for name in names if name not in reading.conditionals)
    what = f"only {len(reading.conditionals)} of {len(names)} routable layers are conditionals ({missing} are not)"
    raise TargetError(f"the engine of {phase} was read back: {what}", hint=_PARTIAL)


def _heads(routed: ExportedProgram) -> int:
    return max(int(argument(node, "q").meta["val"].shape[1]) for node in attention_nodes(routed.graph))


def phases(root: Path) -> OnnxPhases | SplitPhases:
    """The ONNX files the engines in `root` were built from, runnable on torch tensors."""
    if (root / "prefill.onnx").is_file():
        return OnnxPhases(OnnxSessions(root, {"prefill": "prefill.onnx", "decode": "decode.onnx"}, arena=False))
    full, sparse = (
        OnnxPhases(OnnxSessions(root, {"prefill": f"prefill_{branch}.onnx", "decode": "decode.onnx"}, arena=False))
        for branch in ("full", "sparse")
    )
    return SplitPhases(full, sparse)


def limits(**options: Any) -> tuple[int, int]:
    """The most tokens and the most requests of a decode step that the engines take."""
    settings = TrtOptions(**options)
    return settings.length, settings.batch


def tidy(root: Path, **options: Any) -> None:
    """Remove the ONNX files after they were checked, unless they are to be kept."""
    if TrtOptions(**options).keep_onnx:
        return
    for file in [*root.glob("*.onnx"), root / WEIGHTS]:
        file.unlink()


def tools() -> dict[str, str]:
    """Versions of the libraries that shape this target's files."""
    return {name: importlib.metadata.version(name) for name in (*TOOLS, installed().replace("_", "-"))}
