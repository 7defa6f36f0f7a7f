"""fluxc puts a Layer Router in front of every attention of a frozen language model (Flux Attention, arXiv 2604.07394).

Importing this package is cheap: torch is imported by the first verb that is used.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_VERBS: dict[str, str] = {
    "capture": "fluxc.capture.api",
    "transform": "fluxc.calibrate.transform",
    "calibrate": "fluxc.calibrate.retarget",
    "train": "fluxc.train.api",
    "export": "fluxc.exporters.export",
    "load": "fluxc.engine.load",
}

__all__ = ["__version__", *_VERBS]


def __getattr__(name: str) -> Any:
    if name in _VERBS:
        return getattr(importlib.import_module(_VERBS[name]), name)
    raise AttributeError(f"module 'fluxc' has no attribute {name!r}")
