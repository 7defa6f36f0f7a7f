"""The targets of export, and whether this machine and this version have them. Imports none of their libraries."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from typing import Any

from fluxc.errors import OptionError, TargetError


@dataclasses.dataclass(frozen=True)
class Target:
    """One target: its exporter is the module of that name beside this one. `libraries`: any one of each tuple."""

    name: str
    does: str
    libraries: tuple[tuple[str, ...], ...]
    install: str


TARGETS = {
    target.name: target
    for target in (
        Target(
            "onnx",
            "ONNX Runtime",
            (("onnx",), ("onnxscript",), ("onnxruntime",)),
            "pip install onnx onnxscript onnxruntime",
        ),
        Target("aoti", "AOTInductor", (("torch",),), "pip install torch"),
        Target(
            "trt",
            "TensorRT",
            (("onnx",), ("onnxscript",), ("onnxruntime",), ("tensorrt", "tensorrt_rtx")),
            "pip install onnx onnxscript onnxruntime tensorrt-rtx",
        ),
        Target("torch-trt", "torch-tensorrt", (("torch_tensorrt",),), "pip install torch-tensorrt"),
    )
}


def exporter(name: str) -> Any:
    """The module that exports to `name`, with `check(flux)` and `build(flux, root)`.

    Raises OptionError for an unknown target, TargetError for one whose library is missing or that is not built yet.
    """
    if name not in TARGETS:
        raise OptionError(f"{name!r} is no target", hint=f"use one of {', '.join(TARGETS)}")
    target = TARGETS[name]
    missing = [" or ".join(choice) for choice in target.libraries if not any(map(_is_here, choice))]
    if missing:
        raise TargetError(f"target {name} needs {', '.join(missing)}, which is not installed", hint=target.install)
    module = f"fluxc.exporters.{name.replace('-', '_')}"
    if importlib.util.find_spec(module) is None:
        raise TargetError(
            f"this version of fluxc has no exporter for {name} ({target.does}) yet", hint="use --target onnx"
        )
    return importlib.import_module(module)


def _is_here(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # a module put into sys.modules without a spec
        return False
