"""The guards of conftest.py."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_repository_root_is_not_importable():
    assert all(Path(entry or ".").resolve() != ROOT for entry in sys.path)


def test_top_level_kernels_is_not_ours():
    spec = importlib.util.find_spec("kernels")
    assert spec is None or not str(spec.origin).startswith(str(ROOT))


def test_golden_refuses_other_text(golden, tmp_path):
    other = type(golden)(tmp_path, bless=False)
    with pytest.raises(AssertionError, match="missing"):
        other.check("text", "a")
    type(golden)(tmp_path, bless=True).check("text", "a\n")
    other.check("text", "a")
    with pytest.raises(AssertionError):
        other.check("text", "b")
