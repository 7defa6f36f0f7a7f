"""A TensorRT engine directory behind `fluxc.load`: its programs, over the store that ONNX engines have."""

from __future__ import annotations

from typing import Any

from fluxc.errors import ArchiveError, OptionError
from fluxc.exporters.cuda_driver import CudaDriver
from fluxc.exporters.engine_dir import NAME, EngineDir
from fluxc.exporters.onnx_programs import OnnxPrograms
from fluxc.exporters.trt_builder import LIBRARIES
from fluxc.exporters.trt_sessions import TrtSessions, open_library
from fluxc.exporters.trt_split import SplitSessions


class TrtPrograms(OnnxPrograms):
    """The programs of a TensorRT engine directory, on one GPU.

    Raises OptionError for a device that is no GPU; TargetError where the library, its version or the GPU is missing.
    """

    def __init__(self, engine: EngineDir, device: str | None, driver: CudaDriver | None = None) -> None:
        try:
            super().__init__(engine)
            files = {phase: str(program["file"]) for phase, program in engine.manifest.programs.items()}
            built = engine.manifest.programs["decode"]["built"]
            library, version = str(built["library"]), str(built["version"])
        except (KeyError, TypeError, AttributeError) as cause:
            raise ArchiveError(
                f"{engine.path / NAME} does not describe its programs", hint="export it again"
            ) from cause
        number = _number(engine, device)
        if library not in LIBRARIES:
            raise ArchiveError(f"{engine.path / NAME} names the library {library!r}, which builds no engines")
        open_library(library, version)
        given = (engine.path, files, driver or CudaDriver(number), library, version)
        sessions: Any = TrtSessions(*given)
        if "prefill" not in files:
            full, sparse = (TrtSessions(*given, f"prefill_{branch}") for branch in ("full", "sparse"))
            sessions = SplitSessions(full, sparse)
        self.sessions = sessions


def _number(engine: EngineDir, device: str | None) -> int:
    kind, _, number = (device or "cuda").partition(":")
    if kind != "cuda" or not (number or "0").isdigit():
        raise OptionError(f"{engine.path} runs on an NVIDIA GPU, not on {device}", hint="give --device cuda")
    return int(number or 0)
