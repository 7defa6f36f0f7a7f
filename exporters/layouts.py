"""Where an engine stands in the directory that is written: alone, or in a model repository of Triton Inference Server.

triton-server:   fluxc/config.pbtxt   fluxc/1/model.py   fluxc/1/engine/ (the engine directory)
"""

from __future__ import annotations

from pathlib import Path

from fluxc.errors import OptionError
from fluxc.exporters.engine_dir import EngineManifest
from fluxc.exporters.triton_server import ENGINE, config_text

TRITON = "triton-server"
MODEL = "fluxc"
_VERSION = "1"
_MODEL_FILE = '''"""The model that Triton's Python backend loads: fluxc has to be installed in its Python."""

from fluxc.exporters.triton_server import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''


def check_layout(layout: str | None) -> None:
    """Raise OptionError for an unknown layout."""
    if layout not in (None, TRITON):
        raise OptionError(f"{layout!r} is no layout", hint=f"use {TRITON}, or none")


def engine_folder(root: Path, layout: str | None) -> Path:
    """Where the engine directory goes; it is made."""
    folder = root if layout is None else root / MODEL / _VERSION / ENGINE
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_layout(root: Path, layout: str | None, manifest: EngineManifest) -> None:
    """Write what stands around the engine; raises OSError as the disk does."""
    if layout is None:
        return
    (root / MODEL / _VERSION / "model.py").write_text(_MODEL_FILE, encoding="utf-8")
    (root / MODEL / "config.pbtxt").write_text(config_text(MODEL, manifest.device), encoding="utf-8")
