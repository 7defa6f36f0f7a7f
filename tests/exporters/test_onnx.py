"""Target onnx: what it refuses before any work, and that every family it takes computes the same."""

from __future__ import annotations

import errno

import pytest

pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

import onnx as onnx_library
import torch

import fluxc
from fluxc.artifact import update_plan
from fluxc.errors import DataError, OptionError, PlanError, StorageError, TargetError, UserError
from fluxc.exporters import onnx
from fluxc.exporters.engine_dir import open_engine
from fluxc.ir.sparse import SparseSettings
from fluxc.passes.apply_plan import ApplyPlan
from fluxc.passes.set_dtype import SetDtype
from fluxc.plan import Plan
from fluxc.testing import TINY_FAMILIES, ToyConfig
from fluxc.toy_decoder import toy_program
from fluxc.toy_flux import flux_of, toy_flux
from fluxc.toy_flux import toy_routed as route


def test_bfloat16_is_refused():
    captured = fluxc.capture(TINY_FAMILIES["llama"](), dtype="float32").program
    with pytest.raises(TargetError, match="the model is bfloat16, and ONNX engines compute in float32"):
        onnx.check(route(SetDtype("bfloat16").apply(captured).program))


def test_the_kind_block_is_refused(toy_routed):
    blocks = SparseSettings("block", decode_full=True, block=16, stride=4, threshold=0.9)
    onnx.check(toy_routed())
    with pytest.raises(TargetError, match="layer 1 has the sparse kind block, which has no ONNX form"):
        onnx.check(ApplyPlan({1: blocks}).apply(toy_routed()).program)


def test_an_operation_onnx_does_not_have_is_named(toy_routed):
    program = toy_routed()
    with pytest.raises(TargetError, match=r"ONNX has no form for fluxc\.kv_write"):
        node = next(node for node in program.graph.nodes if node.op == "call_function")
        with program.graph.inserting_after(node):
            program.graph.call_function(torch.ops.fluxc.kv_write.default, (node, node, node, node))
        onnx.check(program)


@pytest.mark.parametrize("options", [{"opset": 17}, {"opset": 99}, {"profile": "fast"}, {"io": "kv"}])
def test_options_out_of_range(toy_routed, options):
    with pytest.raises(OptionError, match=next(iter(options))):
        onnx.check(toy_routed(), **options)


@pytest.mark.parametrize("pin", ["full", pytest.param("sparse", marks=pytest.mark.slow)])
def test_pins_are_folded_and_bound_the_budgets(tmp_path, pin):
    """Three routable layers, the first pinned, under two opsets; the biases of that layer no longer matter."""
    flux = toy_flux(tmp_path / "m.flux", toy_program(ToyConfig(windows=(0, 0, 8, 0))))
    values = flux.plan.to_dict()
    values["layers"][0]["pin"] = pin
    update_plan(flux.path, Plan.from_dict(values))
    opset = {"full": 18, "sparse": 23}[pin]
    path = fluxc.export(flux.path, target="onnx", output=tmp_path / "e", pin=True, options={"opset": opset}).path
    manifest = open_engine(path).manifest
    assert manifest.pins == {"0": pin}
    assert manifest.budgets == pytest.approx([1 / 3, 1] if pin == "full" else [0, 2 / 3])
    model = onnx_library.load(path / "prefill.onnx", load_external_data=False)
    assert sum(node.op_type.startswith("routed_") for node in model.graph.node) == 2
    assert {each.version for each in model.opset_import if not each.domain} == {opset}
    with pytest.raises(PlanError, match="1 folded layers"):
        fluxc.calibrate(path, budget=0.1 if pin == "full" else 0.9)
    with fluxc.load(path) as engine:
        found = engine.generate([3, 4, 5], routes=[pin != "full"] * 3, max_new_tokens=2)
        assert found.routes.tolist() == [pin == "full", pin != "full", pin != "full"]


def test_pins_need_a_plan_that_pins(tmp_path):
    flux = toy_flux(tmp_path / "m.flux")
    with pytest.raises(OptionError, match="this plan pins none"):
        fluxc.export(flux.path, target="onnx", output=tmp_path / "e", pin=True)


def test_sizes_dtypes_and_layouts_that_cannot_be(tmp_path):
    path = toy_flux(tmp_path / "m.flux").path
    for options, said in (
        ({"options": {"max_length": 257}}, "max-length 257 is above the model's context of 256"),
        ({"options": {"batch": 0}}, "batch 0"),
        ({"options": {"time_limit": 3}}, "target onnx has no option --time-limit"),
        ({"dtype": "int8"}, "'int8' is not a model dtype"),
        ({"dtype": "bfloat16"}, "the model is bfloat16, and ONNX engines compute in float32"),
        ({"layout": "kserve"}, "'kserve' is no layout"),
    ):
        with pytest.raises(UserError, match=said):
            fluxc.export(path, target="onnx", output=tmp_path / "e", dry_run=True, **options)


@pytest.mark.slow
def test_a_smaller_engine_keeps_its_sizes(tmp_path):
    flux = toy_flux(tmp_path / "m.flux")
    options = {"max_length": 40, "batch": 2}
    path = fluxc.export(flux.path, target="onnx", output=tmp_path / "e", options=options).path
    with fluxc.load(path) as engine:
        assert (engine.programs.context, engine.options.max_batch) == (40, 2)
        with pytest.raises(DataError, match="context of 40"):
            engine.generate([1] * 40)


# Sinks, experts, windows of their own, softcaps, learned positions, factors chosen by length.
@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt-oss", "qwen3-moe", "gemma2", "opt", "gpt2", "phi3-longrope", "gpt-neox"])
def test_families(family, tmp_path):
    found = fluxc.capture(TINY_FAMILIES[family]())
    meta = {**found.meta, "family": family, "context": 128}
    flux = flux_of(tmp_path / "m.flux", found.program, meta)
    verified = fluxc.export(flux.path, target="onnx", output=tmp_path / "engine").report["verified"]
    assert verified["lengths"] == [1, 4, 17]
    assert max(verified["prefill"], verified["decode"]) < 1e-5


def test_a_disk_that_fills_up(tmp_path, monkeypatch):
    """The write of the weights fails half way: an error of the user's kind, and nothing is left."""
    flux = toy_flux(tmp_path / "m.flux")

    def full(routed, root, **options):
        (root / "weights.bin").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(onnx, "build", full)
    with pytest.raises(StorageError, match="No space left on device"):
        fluxc.export(flux.path, target="onnx", output=tmp_path / "e")
    assert [path.name for path in tmp_path.iterdir()] == ["m.flux"]


@pytest.mark.slow
def test_a_model_past_2_gb(tmp_path):
    """No file but the weights is large, and the engine answers."""
    captured = fluxc.capture(TINY_FAMILIES["llama"](vocab_size=300_000, hidden_size=1024, tie_word_embeddings=False))
    flux = flux_of(tmp_path / "m.flux", captured.program, {**captured.meta, "context": 128})
    del captured
    path = fluxc.export(flux.path, target="onnx", output=tmp_path / "engine").path
    sizes = {file.name: file.stat().st_size for file in path.iterdir() if file.is_file()}
    assert sizes.pop("weights.bin") > 2**31
    assert max(sizes.values()) < 2**20
    with fluxc.load(path) as engine:
        assert len(engine.generate([3, 4, 5], max_new_tokens=2, eos_token_id=[]).tokens) == 2
