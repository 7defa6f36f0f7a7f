"""Target trt with TensorRT: engines built on the CPU and read back. No engine is run: that needs a GPU it supports."""

from __future__ import annotations

import json
import math
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx (95 MB) is not installed")

import torch

import fluxc
from fluxc.capture.api import capture
from fluxc.cli import main
from fluxc.engine.traced import layer_shapes
from fluxc.errors import ArchiveError, SelfCheckError, TargetError
from fluxc.exporters import parity, trt, trt_process
from fluxc.exporters.engine_dir import open_engine
from fluxc.exporters.trt_graphs import write_models
from fluxc.exporters.trt_options import TrtOptions
from fluxc.ir.graph import runnable
from fluxc.ir.sparse import SparseSettings
from fluxc.testing import TINY_FAMILIES
from fluxc.tiny_folder import save_tiny_model
from fluxc.toy_decoder import ToyConfig, toy_program
from fluxc.toy_flux import META, TOY, flux_of, toy_flux

pytestmark = pytest.mark.slow

LONG = 8192
ROUTABLE = sum(window == 0 for window in TOY.windows)


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    """The toy model with a context that its attention is chunked for."""
    folder = tmp_path_factory.mktemp("made")
    return flux_of(folder / "toy.flux", toy_program(TOY), META | {"context": LONG})


@pytest.fixture(scope="module")
def exported(flux):
    return fluxc.export(flux.path, target="trt", output=flux.path.parent / "engine")


@pytest.fixture
def engine(exported, tmp_path):
    return shutil.copytree(exported.path, tmp_path / "engine")


def test_every_routable_layer_is_a_conditional_of_the_engine(exported):
    built = exported.report["built"]["prefill"]
    assert (built["conditionals"], built["routable"], built["read_from"]) == (ROUTABLE, ROUTABLE, "plan")


def test_nothing_in_the_engine_is_larger_than_chunks_of_512_rows(exported):
    """All pairs would be 64 times as much: the largest is half the bound, as chunks have 256 rows."""
    built = exported.report["built"]["prefill"]
    assert built["attention_bound_bytes"] == TOY.heads * 512 * LONG * 4
    assert built["largest_buffer_bytes"] == built["attention_bound_bytes"] // 2


def test_contents(exported, flux):
    found = open_engine(exported.path, "trt")
    assert set(found.manifest.files) == {"README.md", "plan.json", "prefill.engine", "decode.engine"}
    assert found.manifest.versions["tensorrt-rtx"] == found.manifest.programs["prefill"]["built"]["version"]
    assert found.manifest.programs["prefill"]["profile"]["input_ids"] == [[1, 1], [1, LONG // 2], [1, LONG]]
    assert "No TensorRT engine was run by the authors" in (exported.path / "README.md").read_text()


def test_what_was_built_is_what_was_checked(flux, tmp_path):
    options = {"keep_onnx": True, "max_length": 100, "batch": 2}
    done = fluxc.export(flux.path, target="trt", output=tmp_path / "kept", options=options)
    found = open_engine(done.path).manifest
    for phase in ("prefill", "decode"):
        assert found.programs[phase]["built"]["onnx_sha256"] == found.files[f"{phase}.onnx"].sha256
    assert found.programs["decode"]["profile"]["input_ids"][2] == [2, 1]
    assert max(found.verified["prefill"], found.verified["decode"]) < 1e-5


def test_both_files_of_a_split_plan_compute_the_routed_program(flux, tmp_path):
    routed = flux.load("routed")
    write_models(routed, tmp_path, TrtOptions(plan="split"))
    engine = trt.phases(tmp_path)
    found = parity.check_parity(engine, routed, layer_shapes(routed), flux.plan, chosen=False)
    assert 0 < max(found.prefill, found.decode) < 1e-5
    mixed = torch.tensor([[math.inf], [-math.inf]])
    case = parity.expected(runnable(routed), torch.ones(1, 30, dtype=torch.int64), "mixed", mixed)
    with pytest.raises(SelfCheckError, match="chose other routes"):
        parity.compare(engine, [case], layer_shapes(routed), flux.plan)


def test_a_split_plan_builds_three_engines(flux, tmp_path):
    done = fluxc.export(flux.path, target="trt", output=tmp_path / "split", options={"plan": "split"})
    assert set(done.report["built"]) == {"prefill_full", "prefill_sparse", "decode"}
    assert {built["conditionals"] for built in done.report["built"].values()} == {0}
    assert done.report["verified"]["prefill"] < 1e-5


@pytest.mark.parametrize("decode_full", [False, True])
def test_triangles_become_conditionals(tmp_path, decode_full):
    sparse = SparseSettings("triangle", sink=4, window=12, last=5, decode_full=decode_full)
    routed = fluxc_routed(sparse)
    models = write_models(routed, tmp_path, TrtOptions())
    profile = trt.shapes(models["prefill"], 512, 1)
    trt_process.build(tmp_path / "prefill.onnx", tmp_path / "e", profile, 600, tmp_path / "i")
    names = trt.routed_calls(models["prefill"])
    assert trt.read(tmp_path / "e", names).conditionals == tuple(names)


def fluxc_routed(sparse):
    from fluxc.toy_flux import toy_routed

    return toy_routed(toy_program(TOY), sparse)


# Windows of their own with softcaps, norms of queries, learned positions, factors chosen by length.
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3", "opt", "phi3-longrope", "gpt-neox"])
def test_families(family, tmp_path):
    found = capture(TINY_FAMILIES[family]())
    flux = flux_of(tmp_path / "m.flux", found.program, {**found.meta, "family": family, "context": 128})
    report = fluxc.export(flux.path, target="trt", output=tmp_path / "engine").report
    built = report["built"]["prefill"]
    assert built["conditionals"] == built["routable"] == report["routable"] > 0
    assert max(report["verified"]["prefill"], report["verified"]["decode"]) < 1e-5


def test_experts_are_refused_by_name(tmp_path):
    found = capture(TINY_FAMILIES["gpt-oss"]())
    flux = flux_of(tmp_path / "m.flux", found.program, {**found.meta, "family": "gpt-oss", "context": 128})
    with pytest.raises(
        TargetError, match=r"a mixture of experts \(grouped_mm\), in a form that TensorRT does not build"
    ):
        fluxc.export(flux.path, target="trt", output=tmp_path / "engine", dry_run=True)


def test_fused_attention_under_a_split_plan(flux, tmp_path):
    """Experimental: beside loops (windows of a layer's own) the builder crashes, so those are refused."""
    options = {"plan": "split", "attention": "fused"}
    with pytest.raises(TargetError, match="layer 1 has a window of its own"):
        fluxc.export(flux.path, target="trt", output=tmp_path / "fused", options=options, dry_run=True)
    plain = toy_flux(tmp_path / "plain.flux", toy_program(ToyConfig()))
    done = fluxc.export(plain.path, target="trt", output=tmp_path / "fused", options=options)
    kinds = {name: built["attention"] for name, built in done.report["built"].items()}
    assert kinds == {"prefill_full": "fused", "prefill_sparse": "decomposed", "decode": "decomposed"}
    assert not list((tmp_path / "fused").glob("*.onnx"))


def test_the_two_commands_as_they_are_typed(tmp_path):
    folder = save_tiny_model(tmp_path / "tiny", layers=2, context=256)
    capture(folder).save(tmp_path / "model.pt")
    script = Path(sys.executable).with_name("fluxc")
    words = ["the", "moon", "over", "a", "river", "of", "stone", "and", "cloud", "in", "winter"]
    lines = [
        {"prompt": f"Code {n} is {n}00. " + " ".join(random.Random(n).choices(words, k=120)), "answer": f" {n}00"}
        for n in range(12)
    ]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    quick = "--effort quick --prompts mine.jsonl --sink 4 --window 32"  # a tiny model has no use for generated prompts
    for typed in (f"fluxc transform model.pt --budget 0.4 {quick}", "fluxc export --target trt"):
        command = [str(script), *typed.split()[1:]]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert "2 of 2 routable layers are conditionals in the engine" in done.stdout
    assert open_engine(tmp_path / "engine-trt").plan.budget == 0.4


def test_an_operation_that_tensorrt_does_not_take(tmp_path):
    import onnx

    text = '<ir_version: 10, opset_import: ["" : 21]> g (float[2,2] x) => (float y) { y = Det (x) }'
    onnx.save(onnx.parser.parse_model(text), tmp_path / "prefill.onnx")
    with pytest.raises(TargetError, match=r"TensorRT cannot express Det .*of prefill\.onnx"):
        trt_process.parse(tmp_path / "prefill.onnx", 60)


def test_a_build_that_takes_too_long_leaves_nothing(tmp_path, monkeypatch, capsys):
    toy_flux(tmp_path / "toy.flux")
    monkeypatch.chdir(tmp_path)
    assert main(["export", "--target", "trt", "--time-limit", "0.5", "--no-verify"]) == 2
    assert "took more than 0.5 s" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["toy.flux"]


def test_another_budget_changes_the_plan_only(engine):
    before = {path.name: path.read_bytes() for path in engine.iterdir()}
    assert main(["calibrate", str(engine), "--budget", "0.8"]) == 0
    after = {path.name: path.read_bytes() for path in engine.iterdir()}
    assert {name for name in before | after if before.get(name) != after.get(name)} == {"plan.json", "engine.json"}


def test_flipped_and_cut_bytes_give_clean_errors(engine):
    rng = random.Random(0)
    for path in sorted(engine.iterdir()):
        whole = path.read_bytes()
        for _ in range(8):
            changed = bytearray(whole)
            changed[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
            for content in (bytes(changed), whole[: rng.randrange(len(whole))]):
                path.write_bytes(content)
                with pytest.raises((ArchiveError, TargetError)):
                    opened = fluxc.load(engine, "cuda")
                    opened.close()
        path.write_bytes(whole)
    assert open_engine(engine)


def test_loading_says_what_is_missing(exported):
    if torch.cuda.is_available():
        pytest.skip("a machine with a GPU")
    with pytest.raises(TargetError, match="needs an NVIDIA GPU"):
        fluxc.load(exported.path)
