"""Target onnx: what it refuses before any work, and that every family it takes computes the same."""

from __future__ import annotations

import pytest

pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

import fluxc
from fluxc.errors import TargetError
from fluxc.exporters import onnx
from fluxc.ir.sparse import SparseSettings
from fluxc.passes.apply_plan import ApplyPlan
from fluxc.passes.set_dtype import SetDtype
from fluxc.testing import TINY_FAMILIES
from fluxc.toy_flux import flux_of
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
