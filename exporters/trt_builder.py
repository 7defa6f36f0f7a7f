"""Builds one TensorRT engine, in a process of its own: `python -P -m fluxc.exporters.trt_builder job.json`.

A builder that crashes takes its process with it, and this one only. Imports neither torch nor onnx.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

LIBRARIES = ("tensorrt_rtx", "tensorrt")
"""The first of them that is installed builds; engines of one do not run in the other."""
WORKSPACE_BYTES = 8 << 30


@dataclasses.dataclass(frozen=True)
class Job:
    """`onnx`: the model's file. `engine`: file to write, "" to parse only. `shapes`: for each input with free sizes its
    least, usual and largest shape. `result`: file for what was found. `library`: one of LIBRARIES. `inspect`: file for
    the engine inspector's text, written where a device lets the engine be opened."""

    onnx: str
    engine: str
    shapes: dict[str, list[list[int]]]
    result: str
    library: str
    inspect: str = ""


def installed() -> str:
    """The library that builds here, "" where none is installed."""
    return next((name for name in LIBRARIES if importlib.util.find_spec(name) is not None), "")


def run(job: Job) -> dict[str, Any]:
    """Parse, and build where an engine is asked for; returns plain values. `errors` says what the parser refused."""
    trt: Any = importlib.import_module(job.library)
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    started = time.perf_counter()
    parsed = parser.parse_from_file(job.onnx)
    found: dict[str, Any] = {"version": trt.__version__, "parse_seconds": time.perf_counter() - started}
    found["errors"] = [] if parsed else [_error(parser.get_error(index)) for index in range(parser.num_errors)]
    found["layers"] = network.num_layers
    found["conditionals"] = _count(network, trt.LayerType.CONDITION)
    found["shape_inputs"] = [name for name, tensor in _inputs(network) if tensor.is_shape_tensor]
    if parsed and job.engine:
        found |= _build(trt, logger, builder, network, job)
    found["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return found


def _build(trt: Any, logger: Any, builder: Any, network: Any, job: Job) -> dict[str, Any]:
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # the engine then says which ONNX node a part is of
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, WORKSPACE_BYTES)
    profile = builder.create_optimization_profile()
    for name, shapes in job.shapes.items():
        profile.set_shape(name, *shapes)
    config.add_optimization_profile(profile)
    started = time.perf_counter()
    plan = builder.build_serialized_network(network, config)
    seconds = time.perf_counter() - started
    if plan is None:
        raise SystemExit("the builder returned no engine")
    Path(job.engine).write_bytes(plan)
    return {"build_seconds": seconds, "bytes": plan.nbytes, "inspected": _inspect(trt, logger, plan, job.inspect)}


def _inspect(trt: Any, logger: Any, plan: Any, path: str) -> bool:
    """Write what the engine inspector says; opening an engine needs a device that it runs on."""
    runtime = trt.Runtime(logger) if path and _has_driver() else None
    engine = runtime.deserialize_cuda_engine(plan) if runtime else None
    if engine is None:
        return False
    text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    Path(path).write_text(text, encoding="utf-8")
    return True


def _has_driver() -> bool:
    import ctypes

    try:
        return ctypes.CDLL("libcuda.so.1").cuInit(0) == 0
    except OSError:
        return False


def _inputs(network: Any) -> list[tuple[str, Any]]:
    tensors = [network.get_input(index) for index in range(network.num_inputs)]
    return [(tensor.name, tensor) for tensor in tensors]


def _count(network: Any, kind: Any) -> int:
    return sum(network.get_layer(index).type == kind for index in range(network.num_layers))


def _error(error: Any) -> dict[str, str]:
    return {"operator": error.node_operator(), "node": error.node_name(), "reason": error.desc()}


def main(path: str) -> None:
    """Do the job in the file `path`."""
    job = Job(**json.loads(Path(path).read_text(encoding="utf-8")))
    Path(job.result).write_text(json.dumps(run(job)), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
