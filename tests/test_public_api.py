"""What `import fluxc` offers, and what it costs."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import fluxc


def loaded_by(code: str) -> set[str]:
    """Modules a fresh interpreter has loaded after running `code`."""
    command = [sys.executable, "-P", "-c", f"{code}\nimport sys; print(*sys.modules)"]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


def test_everything_listed_can_be_had() -> None:
    for name in fluxc.__all__:
        assert getattr(fluxc, name) is not None


@pytest.mark.parametrize("name", ["capture", "calibrate", "train"])
def test_a_verb_that_is_a_package_too_can_be_called_again(name: str) -> None:
    importlib.import_module(f"fluxc.{name}")
    with pytest.raises(TypeError, match="argument"):
        getattr(fluxc, name)()


def test_import_is_cheap() -> None:
    heavy = {"torch", "transformers", "numpy", "rich", "click"}
    assert heavy & loaded_by("import fluxc") == set()


def test_importing_the_ops_loads_no_torch() -> None:
    assert "torch" not in loaded_by("import fluxc.kernels, fluxc.kernels.schemas, fluxc.errors, fluxc.options")
