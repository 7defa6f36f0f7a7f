"""Target trt without TensorRT: the ONNX files its engines are built from, and what surrounds the builder."""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path

import pytest
import torch

pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

from fluxc.cli import main
from fluxc.engine.traced import layer_shapes
from fluxc.errors import InternalError, OptionError, StorageError, TargetError
from fluxc.exporters import parity, targets, trt, trt_builder, trt_process
from fluxc.exporters.trt_graphs import MOST_ROWS, routed_calls, shapes, write_models
from fluxc.exporters.trt_options import DEFAULT_LENGTH, TrtOptions
from fluxc.exporters.trt_read import read
from fluxc.exporters.trt_split import choose
from fluxc.ir.sparse import SparseSettings
from fluxc.passes.apply_plan import ApplyPlan
from fluxc.toy_flux import TOY, toy_flux

ROUTABLE = sum(window == 0 for window in TOY.windows)


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    return toy_flux(tmp_path_factory.mktemp("made") / "toy.flux")


@pytest.fixture(scope="module")
def routed(flux):
    return flux.load("routed")


@pytest.fixture(scope="module")
def written(routed, tmp_path_factory):
    """Folder and models of the ONNX files."""
    root = tmp_path_factory.mktemp("written")
    return root, write_models(routed, root, TrtOptions())


def ifs(graph):
    """All `If`s of a graph, those inside loops and branches too."""
    for node in graph:
        yield from [node] if node.op_type == "If" else []
        for attribute in node.attributes.values():
            if str(attribute.type) == "GRAPH":
                yield from ifs(attribute.value)


def test_each_routable_layer_is_one_call_with_one_if(written):
    model = written[1]["prefill"]
    assert len(routed_calls(model)) == ROUTABLE
    bodies = [model.functions[node.op_identifier()] for node in model.graph if node.op_type.startswith("routed_")]
    assert [len(list(ifs(body))) for body in bodies] == [1] * ROUTABLE


def test_the_files_compute_the_routed_program(written, routed, flux):
    found = parity.check_parity(trt.phases(written[0]), routed, layer_shapes(routed), flux.plan)
    assert found.lengths == [1, 4, 17]
    assert 0 < max(found.prefill, found.decode) < 1e-5


def test_a_long_prompt_is_the_same(written, routed, flux):
    engine = trt.phases(written[0])
    found = parity.check_parity(engine, routed, layer_shapes(routed), flux.plan, lengths=(1000,))
    assert 0 < max(found.prefill, found.decode) < 1e-5


@pytest.mark.parametrize(
    ("bias", "scores", "full", "runs"),
    [
        ([math.inf, math.inf], [-9.0, -9.0], True, [True]),
        ([-math.inf, -math.inf], [9.0, 9.0], False, [False]),
        ([0.0, 0.0, 0.0], [1.0, -1.0, -1.0], False, [False]),
        ([0.0, 0.0, 0.0], [1.0, 1.0, -1.0], True, [False, True]),
        ([2.0, 2.0, math.inf], [-1.0, -3.0, -5.0], True, [False, True]),
    ],
)
def test_the_host_chooses_by_vote(bias, scores, full, runs):
    asked = []

    def prefill(full):
        asked.append(full)
        return {"scores": torch.tensor(scores), "routes": torch.tensor([True] + [False] * (len(scores) - 1))}

    found = choose(prefill, torch.tensor(bias))
    assert found["routes"].tolist() == [full] * len(scores)
    assert asked == runs


def test_profiles(written):
    prefill, decode = (shapes(written[1][phase], 100, 3) for phase in ("prefill", "decode"))
    assert prefill["input_ids"] == [[1, 1], [1, 50], [1, 100]]
    assert prefill["logits_at"] == [[1, 1], [1, 1], [1, MOST_ROWS]]
    assert "route_bias" not in prefill
    assert decode["input_ids"] == [[1, 1], [1, 1], [3, 1]]
    assert decode["k_cache_1"][2] == [3, 1, 129, TOY.head_dim]


def test_options_out_of_range():
    for wrong in ({"plan": "both"}, {"attention": "none"}, {"time_limit": 0}, {"batch": 0}, {"max_length": -1}):
        with pytest.raises(OptionError):
            TrtOptions(**wrong)
    with pytest.raises(OptionError, match="does not build its fused attention inside a conditional"):
        TrtOptions(attention="fused")
    with pytest.raises(OptionError, match="max_length 9 is above the model's context of 8 tokens"):
        TrtOptions(max_length=9, context=8)
    assert [TrtOptions(max_length=a, context=b).length for a, b in ((0, 0), (0, 8), (4, 8))] == [DEFAULT_LENGTH, 8, 4]


def test_the_kind_block_is_refused(toy_routed):
    blocks = SparseSettings("block", decode_full=True, block=16, stride=4, threshold=0.9)
    trt.check(toy_routed())
    with pytest.raises(TargetError, match="layer 1 has the sparse kind block, which has no TensorRT form"):
        trt.check(ApplyPlan({1: blocks}).apply(toy_routed()).program)


JUMP = 'cjmp={{ name="cbr" input={{"a" "b" }} op=eq target={{x y }} layers="[ONNX Layer: part | {} (routed_x)]" }}\n'


def test_reading_a_plan(tmp_path):
    plan = tmp_path / "e.engine"
    region = "region = { name=devmem_topdown_0 size=4096 alignment=1 }\n"
    plan.write_text("\0binary\0" + region + JUMP.format("call") + JUMP.format("call_10") + region.replace("4096", "9"))
    found = read(plan, ["call", "call_1", "call_10"])
    assert (found.source, found.conditionals, found.largest_region) == ("plan", ("call", "call_10"), 4096)
    plan.write_bytes(b"\0" * 64)
    assert read(plan, ["call"]).source == ""


def test_reading_what_the_inspector_says(tmp_path):
    part = "[ONNX Layer: out | full ({}) | part (If) | {} (routed_x)]"
    parts = [part.format(branch, "one") for branch in ("then_branch", "else_branch")]
    text = tmp_path / "e.inspect"
    text.write_text(
        json.dumps({"Layers": [{"Metadata": line} for line in [*parts, part.format("then_branch", "two")]]})
    )
    found = read(tmp_path / "none", ["one", "two"], text)
    assert (found.source, found.conditionals) == ("inspector", ("one",))


@pytest.fixture
def builder(tmp_path, monkeypatch):
    """Makes `trt_process` start a shell script in place of the builder."""

    def use(script):
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IEXEC)
        monkeypatch.setattr(trt_process.sys, "executable", str(path))

    return use


def test_a_builder_that_crashes(builder):
    builder("for n in 1 2 3 4; do echo line $n >&2; done; kill -SEGV $$")
    with pytest.raises(InternalError, match=r"Segmentation fault.*Its last lines: line 2; line 3; line 4") as raised:
        trt_process.parse(Path("prefill.onnx"), 60)
    assert "\n" not in str(raised.value)
    builder("exit 3")
    with pytest.raises(InternalError, match=r"exit code 3.*it said nothing"):
        trt_process.parse(Path("prefill.onnx"), 60)


def test_a_builder_that_takes_too_long(builder):
    builder("exec sleep 30")
    with pytest.raises(TargetError, match=r"more than 0\.2 s to build prefill\.onnx\. give it more with --time-limit"):
        trt_process.build(Path("prefill.onnx"), Path("e"), {}, 0.2, Path("i"))


def test_a_disk_that_is_full(builder):
    builder("echo 'OSError: [Errno 28] No space left on device' >&2; exit 1")
    with pytest.raises(StorageError, match="No space left on device"):
        trt_process.parse(Path("prefill.onnx"), 60)


def test_an_operation_that_is_refused(builder, tmp_path, monkeypatch):
    error = {"operator": "NonZero", "node": "node_7", "reason": "no importer\nregistered"}
    (tmp_path / "said.json").write_text(json.dumps({"errors": [error]}))
    builder(f"""job=$4; result=$(sed 's/.*"result": "\\([^"]*\\)".*/\\1/' $job); cp {tmp_path}/said.json $result""")
    with pytest.raises(
        TargetError, match=r"cannot express NonZero \(node node_7\) of decode\.onnx: no importer regist"
    ):
        trt_process.parse(Path("decode.onnx"), 60)


@pytest.mark.parametrize(("partial", "code"), [((), 2), (("--allow-partial",), 0)])
def test_an_engine_with_too_few_conditionals(monkeypatch, tmp_path, flux, written, capsys, partial, code):
    prepare(monkeypatch, tmp_path, flux, written)
    assert main(["export", "--target", "trt", "--no-verify", *partial]) == code
    error = capsys.readouterr().err
    assert ("only 1 of 2 routable layers are conditionals" in error) == bool(code)
    assert (tmp_path / "engine-trt").exists() == (code == 0)


def test_nothing_is_left_of_a_build_that_crashes(monkeypatch, tmp_path, flux, written, capsys, builder):
    prepare(monkeypatch, tmp_path, flux, written, fake=False)
    builder("echo 'out of luck' >&2; kill -ABRT $$")
    assert main(["export", "--target", "trt"]) == 1
    assert "Its last lines: out of luck" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["python", "toy.flux"]


def prepare(monkeypatch, tmp_path, flux, written, fake=True):
    """A working directory with one model, its ONNX files at hand; `fake`: an engine with half its conditionals."""
    root, models = written
    calls = routed_calls(models["prefill"])

    def copy(routed, place, options):
        for file in root.iterdir():
            (place / file.name).write_bytes(file.read_bytes())
        return models

    def build(onnx, engine, profile, seconds, inspect):
        engine.write_text(JUMP.format(calls[0]))
        return {"version": "1", "build_seconds": 1.0, "peak_bytes": 1, "bytes": 1}

    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy.flux").symlink_to(flux.path)
    monkeypatch.setattr(targets, "_is_here", lambda module: True)
    monkeypatch.setattr(trt, "write_models", copy)
    if fake:
        monkeypatch.setattr(trt_process, "parse", lambda onnx, seconds: {"layers": 1})
        monkeypatch.setattr(trt_process, "build", build)
        monkeypatch.setattr(trt, "tools", dict)


def test_options_of_other_targets(monkeypatch, tmp_path, flux, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy.flux").symlink_to(flux.path)
    assert main(["export", "--target", "onnx", "--plan", "split"]) == 2
    assert "target onnx has no option --plan" in capsys.readouterr().err


def test_the_builder_says_which_library_it_would_use(monkeypatch):
    monkeypatch.setattr(trt_builder.importlib.util, "find_spec", lambda name: name == "tensorrt" or None)
    assert trt_builder.installed() == "tensorrt"
    monkeypatch.setattr(trt_builder.importlib.util, "find_spec", lambda name: None)
    assert trt_builder.installed() == ""


def test_the_builder_never_imports_torch():
    import subprocess
    import sys

    code = "import fluxc.exporters.trt_builder, sys; print([m for m in ('torch', 'onnx', 'numpy') if m in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": ""}
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "[]"
