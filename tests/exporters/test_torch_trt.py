"""Target torch-trt: what it says where torch-tensorrt is missing, and its pieces over a stand-in for it."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from fluxc.cli import main
from fluxc.engine.traced import layer_shapes
from fluxc.errors import TargetError
from fluxc.exporters import parity, torch_trt
from fluxc.toy_flux import TOY, toy_flux


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    return toy_flux(tmp_path_factory.mktemp("made") / "toy.flux")


def test_it_says_what_is_missing(flux, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "torch_tensorrt", None)
    assert main(["export", str(flux.path), "--target", "torch-trt"]) == 2
    error = capsys.readouterr().err
    assert "target torch-trt needs torch_tensorrt, which is not installed; pip install torch-tensorrt" in error
    assert not any(tmp_path.iterdir())


def test_it_says_why_the_library_does_not_import(monkeypatch):
    def fail(name):
        raise OSError("libnvinfer.so.10: cannot open shared object file\nand more")

    monkeypatch.setattr(torch_trt.importlib, "import_module", fail)
    with pytest.raises(
        TargetError, match=r"does not import here: libnvinfer\.so\.10: cannot open shared object file\."
    ):
        torch_trt.library()


@pytest.fixture
def compiled(monkeypatch):
    """A stand-in that compiles nothing: the programs it was given."""
    seen = []
    module = types.ModuleType("torch_tensorrt")
    module.__version__ = "0"
    module.dynamo = types.SimpleNamespace(compile=lambda program, arg_inputs: seen.append(program) or program)
    module.save = lambda program, path, output_format, arg_inputs: torch.export.save(program, path)
    monkeypatch.setitem(sys.modules, "torch_tensorrt", module)
    return seen


def test_a_model_that_is_not_on_a_gpu(flux, compiled):
    with pytest.raises(TargetError, match=r"compiles for a GPU, and the model is on cpu\. give --device cuda"):
        torch_trt.check(flux.load("routed"))


@pytest.mark.slow
def test_the_pieces_compute_the_routed_program_and_attentions_are_not_lowered(flux, compiled, tmp_path):
    routed = flux.load("routed")
    programs = torch_trt.build(routed, tmp_path)
    layers = len(TOY.windows)
    assert programs["prefill"] == {"file": "pieces.json", "lowered": 2 * layers + 2, "kept": layers}
    targets = {str(node.target) for program in compiled for node in program.graph.nodes if node.op == "call_function"}
    assert not any("attention" in name for name in targets)
    assert any("linear" in name or "addmm" in name or "matmul" in name for name in targets)
    engine = torch_trt.phases(tmp_path)
    found = parity.check_parity(engine, routed, layer_shapes(routed), flux.plan, lengths=(1, 17, 90))
    assert 0 < max(found.prefill, found.decode) < 1e-6
