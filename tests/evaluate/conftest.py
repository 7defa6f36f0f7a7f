"""One calibrated tiny model for the tests of evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from fluxc.evaluate.subjects import FluxSubject

SINK, WINDOW = 4, 96


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny` (a Hugging Face folder) and `tiny.flux`, calibrated with sink 4 and window 96."""
    from fluxc.calibrate.options import CalibrateOptions
    from fluxc.calibrate.transform import transform
    from fluxc.tiny_folder import save_tiny_model

    base = tmp_path_factory.mktemp("model")
    options = CalibrateOptions(effort="quick", sparse_kind="streaming", sink=SINK, window=WINDOW)
    transform(save_tiny_model(base / "tiny", layers=2), base / "tiny.flux", options=options)
    return base


@pytest.fixture(scope="session")
def subject(folder: Path) -> FluxSubject:
    from fluxc.evaluate.subjects import FluxSubject

    return FluxSubject(folder / "tiny.flux", "cpu")
