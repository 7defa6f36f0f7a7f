"""`fluxc export`: what it says before any work, and that nothing is left behind."""

from __future__ import annotations

import importlib.util
import json

import pytest

pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

from fluxc.cli import main
from fluxc.errors import InternalError
from fluxc.exporters import targets
from fluxc.toy_flux import toy_flux


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    return toy_flux(tmp_path_factory.mktemp("made") / "toy.flux").path


@pytest.fixture
def here(flux, tmp_path, monkeypatch):
    """A working directory with one model."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy.flux").symlink_to(flux)
    return tmp_path


def refuse(capsys, *argv):
    assert main(["export", *argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def test_dry_run_finds_the_only_model(here, capsys):
    assert main(["export", "--target", "onnx", "--dry-run", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["model"], report["engine"], report["attentions"], report["routable"]) == (
        "toy.flux",
        "engine-onnx",
        3,
        2,
    )
    assert [path.name for path in here.iterdir()] == ["toy.flux"]


def test_none_or_several_models(here, capsys, flux):
    (here / "other.flux").symlink_to(flux)
    assert "several *.flux here (other.flux, toy.flux)" in refuse(capsys, "--target", "onnx")
    for path in list(here.iterdir()):
        path.unlink()
    assert "there is no *.flux here" in refuse(capsys, "--target", "onnx")


def test_unknown_target(here, capsys):
    assert "'tflite' is no target; use one of onnx, aoti, trt, torch-trt" in refuse(capsys, "--target", "tflite")


@pytest.mark.parametrize(
    ("target", "gone", "said"),
    [
        ("onnx", {"onnxruntime"}, "target onnx needs onnxruntime, which is not installed; pip install onnx"),
        ("trt", {"tensorrt", "tensorrt_rtx"}, "target trt needs tensorrt or tensorrt_rtx"),
        ("trt", {"fluxc.exporters.trt"}, "has no exporter for trt (TensorRT) yet"),
    ],
)
def test_what_is_missing_is_said_first(here, capsys, monkeypatch, target, gone, said):
    found = importlib.util.find_spec

    def find(name, package=None):
        return None if name in gone else found(name, package) or found("json")

    monkeypatch.setattr(targets.importlib.util, "find_spec", find)
    assert said in refuse(capsys, "no-such.flux", "--target", target)


def test_output_that_exists(here, capsys):
    (here / "engine-onnx").mkdir()
    assert "engine-onnx already exists" in refuse(capsys, "--target", "onnx")
    (here / "engine-onnx" / "mine.txt").write_text("mine")
    assert "was not written by fluxc" in refuse(capsys, "--target", "onnx", "--force")
    assert "does not exist" in refuse(capsys, "--target", "onnx", "-o", "no/folder/engine")


def test_missing_and_damaged_models(here, capsys, tmp_path):
    assert "gone.flux does not exist" in refuse(capsys, "gone.flux", "--target", "onnx")
    assert "is no model.flux directory" in refuse(capsys, ".", "--target", "onnx", "-o", "e")


def test_nothing_is_left_of_an_export_that_fails(here, capsys, monkeypatch):
    from fluxc.exporters import onnx

    def fail(routed, root, **options):
        (root / "prefill.onnx").write_text("half")
        raise InternalError("the builder stopped")

    monkeypatch.setattr(onnx, "build", fail)
    assert main(["export", "--target", "onnx"]) == 1
    assert "error: the builder stopped" in capsys.readouterr().err
    assert [path.name for path in here.iterdir()] == ["toy.flux"]
