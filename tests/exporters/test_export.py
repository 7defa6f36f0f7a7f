"""`fluxc.export --target onnx`: what is written, that it computes the routed program, and what a bad directory does."""

from __future__ import annotations

import collections
import functools
import json
import math
import shutil
import subprocess
import sys

import pytest

pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

import numpy as np  # noqa: E402

import fluxc  # noqa: E402
from fluxc.errors import ArchiveError, PlanError, SelfCheckError, TargetError  # noqa: E402
from fluxc.exporters import engine_dir, parity  # noqa: E402
from fluxc.exporters.engine_dir import open_engine, update_plan  # noqa: E402
from fluxc.exporters.onnx import phases  # noqa: E402
from fluxc.exporters.onnx_attention import CHUNK  # noqa: E402
from fluxc.flux_dir import open_flux  # noqa: E402
from fluxc.ir.sparse import SparseSettings  # noqa: E402
from fluxc.toy_flux import TOY  # noqa: E402

ROUTABLE = sum(window == 0 for window in TOY.windows)


@pytest.fixture
def engine(made, tmp_path):
    return shutil.copytree(made[1].path, tmp_path / "engine")


def test_it_was_compared_at_every_length_the_context_allows(made):
    verified = made[1].report["verified"]
    assert verified["lengths"] == [1, 4, 17]
    assert 0 < max(verified["prefill"], verified["decode"]) < 1e-5


def test_a_long_prompt_is_the_same(made):
    flux, exported = made
    routed = flux.load("routed")
    found = parity.check_parity(phases(exported.path), routed, _layers(routed), flux.plan, lengths=(17, 1000, 4096))
    assert found.lengths == [17, 1000, 4096]
    assert 0 < max(found.prefill, found.decode) < 1e-5


def _layers(program):
    from fluxc.engine.traced import layer_shapes

    return layer_shapes(program)


def test_a_wrong_engine_is_found(made):
    flux, exported = made
    routed = flux.load("routed")
    right = phases(exported.path)

    class Wrong:
        decode, close = right.decode, right.close

        def prefill(self, ids, bias, at):
            return right.prefill(ids.flip(1), bias, at)

    with pytest.raises(SelfCheckError, match="prefill of 4 tokens, routes full"):
        parity.check_parity(Wrong(), routed, _layers(routed), flux.plan)


def test_full_layers_by_blocks_are_refused_by_name(made, tmp_path, monkeypatch):
    from fluxc import toy_flux

    blocks = SparseSettings(sink=4, window=12, block=16, stride=4, threshold=0.9, full_kind="block")
    monkeypatch.setattr(toy_flux, "toy_routed", functools.partial(toy_flux.toy_routed, sparse=blocks))
    monkeypatch.setattr(toy_flux, "flat_plan", functools.partial(toy_flux.flat_plan, sparse=blocks))
    flux = toy_flux.toy_flux(tmp_path / "toy.flux")
    for dry_run in (True, False):
        with pytest.raises(TargetError, match="layer 0 has the full kind block, which target onnx has no form of"):
            fluxc.export(flux.path, target="onnx", output=tmp_path / "engine", dry_run=dry_run)
    assert not (tmp_path / "engine").exists()


def test_contents(made):
    flux, exported = made
    found = open_engine(exported.path, "onnx")
    names = {"README.md", "plan.json", "prefill.onnx", "decode.onnx", "weights.bin"}
    assert {name for name in found.manifest.files if not name.startswith("tokenizer/")} == names
    assert "tokenizer/tokenizer.json" in found.manifest.files
    assert found.plan == flux.plan
    assert (found.manifest.vocabulary, found.manifest.dtype) == (TOY.vocab, "float32")
    assert [layer["routable"] for layer in found.manifest.layers] == [True, False, True]
    readme = (exported.path / "README.md").read_text()
    assert "prefill.onnx" in readme
    assert "streaming (sink 4, window 12)" in readme


def test_weights_are_stored_once(made):
    flux, exported = made
    stored = sum(t.nbytes for t in (*flux.weights.values(), *flux.routers.values()))
    assert (exported.path / "weights.bin").stat().st_size <= 1.15 * stored
    assert (exported.path / "decode.onnx").stat().st_size < stored


def test_nothing_in_it_names_this_machine(made):
    root = str(made[1].path.parent)
    for path in made[1].path.rglob("*.*"):
        content = path.read_bytes()
        assert b"site-packages" not in content
        assert root.encode() not in content


def profile(engine, tmp_path, length, bias):
    """Events of the nodes that ran in one prefill."""
    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "profile")
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(engine / "prefill.onnx", options, providers=["CPUExecutionProvider"])
    at = np.array([[length - 1]])
    inputs = {
        "input_ids": np.zeros((1, length), np.int64),
        "position_ids": np.arange(length)[None],
        "seq_lens": np.array([length]),
        "prompt_lens": np.array([length]),
        "route_bias": np.full((ROUTABLE, 1), bias, np.float32),
        "logits_at": at,
    }
    session.run(None, {each.name: inputs[each.name] for each in session.get_inputs()})
    with open(session.end_profiling()) as file:
        return [event for event in json.load(file) if event["name"].endswith("_kernel_time")]


@pytest.mark.parametrize("bias", [math.inf, -math.inf])
def test_only_the_chosen_branch_runs_and_nothing_is_as_large_as_all_pairs(engine, tmp_path, bias):
    length = 8 * CHUNK
    events = profile(engine, tmp_path, length, bias)
    ran = collections.Counter(event["args"]["op_name"] for event in events)
    assert (ran["If"], ran["Loop"]) == (ROUTABLE, len(TOY.windows))
    largest = max(int(event["args"].get("output_size", 0)) for event in events)
    keys = length if bias > 0 else CHUNK + 16
    assert CHUNK * CHUNK * 4 < largest <= 4 * TOY.heads * CHUNK * keys


def test_loading_and_answering_import_neither_torch_nor_transformers(made):
    code = "import fluxc, sys\nwith fluxc.load(sys.argv[1]) as engine:\n"
    code += "    one = engine.generate([5, 6], max_new_tokens=3, top_p=0.9, seed=1, stop_strings='!?')\n"
    code += "    assert engine.tokenizer('The quick')['input_ids']\n"
    code += "    talk = engine.conversation(); engine.generate([3, 4], conversation=talk, max_new_tokens=2)\n"
    code += "    engine.generate([[5], [6, 7]], conversation=None, max_new_tokens=2)\n"
    code += "    engine.generate([8, 9], conversation=talk, max_new_tokens=2)\n"
    code += (
        "heavy = ('torch', 'transformers', 'onnxscript', 'onnx', 'fluxc.capture', 'fluxc.calibrate', 'fluxc.train')\n"
    )
    code += "print(len(one.tokens), [name for name in heavy if name in sys.modules])"
    heavy = ("torch", "transformers", "onnxscript", "onnx", "fluxc.capture", "fluxc.calibrate", "fluxc.train")
    command = [sys.executable, "-P", "-c", code, str(made[1].path), *heavy]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.strip() == "3 []", done.stderr


def test_another_budget_changes_the_plan_only(engine):
    before = {path.name: path.read_bytes() for path in engine.rglob("*.*")}
    update_plan(open_engine(engine), open_engine(engine).plan.with_budget(0.7))
    after = {path.name: path.read_bytes() for path in engine.rglob("*.*")}
    assert {name for name in before | after if before.get(name) != after.get(name)} == {"plan.json", "engine.json"}
    assert open_engine(engine).plan.budget == 0.7


def test_a_change_of_plan_that_was_cut_off(engine):
    old = open_engine(engine)
    (engine / "plan.json.next").write_text("half")
    assert open_engine(engine).plan == old.plan
    update_plan(old, old.plan.with_budget(0.7))
    (engine / "plan.json").rename(engine / "plan.json.next")
    (engine / "plan.json").write_text(old.plan.to_json())
    assert open_engine(engine).plan.budget == 0.7


def test_a_plan_with_other_pins_is_refused(engine):
    opened = open_engine(engine)
    values = opened.plan.to_dict()
    values["layers"][0]["pin"] = "full"
    with pytest.raises(PlanError, match="other kinds, sizes or pins"):
        update_plan(opened, type(opened.plan).from_dict(values))


@pytest.mark.parametrize("name", ["weights.bin", "prefill.onnx", "plan.json", "tokenizer/tokenizer.json", "README.md"])
def test_a_changed_byte(engine, name):
    content = bytearray((engine / name).read_bytes())
    content[len(content) // 2] ^= 1
    (engine / name).write_bytes(content)
    with pytest.raises(ArchiveError, match=rf"{name} is damaged"):
        open_engine(engine)


def test_a_missing_file(engine):
    (engine / "decode.onnx").unlink()
    with pytest.raises(ArchiveError, match=r"decode\.onnx is missing"):
        open_engine(engine)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": engine_dir.FORMAT + 1}, "newer than"),
        ({"format": "x"}, "is no fluxc manifest"),
        ({"files": []}, "files"),
        ({"files": {"../x": {"sha256": "", "bytes": 0}}}, "outside the directory"),
        ({"unknown": 1}, "unknown key 'unknown'"),
        ({"plan": "0"}, "is not the plan"),
    ],
)
def test_a_wrong_manifest(engine, change, said):
    values = json.loads((engine / "engine.json").read_text()) | change
    (engine / "engine.json").write_text(json.dumps(values))
    with pytest.raises(ArchiveError, match=said):
        open_engine(engine)


def test_no_manifest_and_another_target(engine, tmp_path):
    with pytest.raises(ArchiveError, match="does not exist"):
        open_engine(tmp_path / "nothing")
    with pytest.raises(ArchiveError, match="is no engine directory"):
        open_engine(tmp_path)
    with pytest.raises(ArchiveError, match="is an engine for onnx, not trt"):
        open_engine(engine, "trt")


def test_cut_manifests_give_clean_errors(engine):
    text = (engine / "engine.json").read_bytes()
    for end in range(0, len(text) - 2, max(1, len(text) // 40)):
        (engine / "engine.json").write_bytes(text[:end])
        with pytest.raises(ArchiveError):
            open_engine(engine)


def test_a_model_flux_is_no_engine(made):
    with pytest.raises(ArchiveError, match="is no engine directory"):
        open_engine(open_flux(made[0].path).path)
