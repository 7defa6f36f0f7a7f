"""The model.flux directory: round trip, damage, updates, atomicity, size on disk and in memory."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import resource
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from fluxc import artifact, pending
from fluxc.artifact import open_flux, update_flux, update_plan, update_routers, write_flux
from fluxc.errors import ArchiveError, InternalError, OutputExistsError, PlanError, StorageError
from fluxc.ir.graph import runnable
from fluxc.ir.sparse import SparseSettings
from fluxc.model_info import ModelInfo
from fluxc.router import router_state
from fluxc.testing import ToyConfig, toy_inputs, toy_program, toy_routed_inputs
from fluxc.toy_flux import META, TOY, flat_plan, toy_flux, toy_routed
from fluxc.weight_files import split_aliases, weights_digest, write_shards


@pytest.fixture(scope="module")
def programs():
    captured = toy_program(TOY)
    plan = flat_plan(ModelInfo.of(captured, META, weights_digest(captured.state_dict)))
    return captured, toy_routed(captured), plan


@pytest.fixture(scope="module")
def made(programs, tmp_path_factory):
    files = {"tokenizer.json": "{}"}
    return write_flux(tmp_path_factory.mktemp("made") / "model.flux", *programs, META, files)


@pytest.fixture
def flux(made, tmp_path):
    """A fresh copy of the toy directory."""
    shutil.copytree(made.path, tmp_path / "model.flux")
    return open_flux(tmp_path / "model.flux")


@pytest.fixture
def other(programs):
    """The plan of a model with the same graph and other weights."""
    plan = programs[2]
    return dataclasses.replace(plan, model=dataclasses.replace(plan.model, weights="0" * 64))


def names(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_model_info_is_read_from_the_program(programs):
    plan = programs[2]
    assert [(a.layer, a.heads, a.kv_heads, a.key_dim, a.window) for a in plan.model.attentions] == [
        (0, 2, 1, 8, 0),
        (1, 2, 1, 8, 16),
        (2, 2, 1, 8, 0),
    ]
    assert plan.model.routable == (0, 2)
    assert plan.model.dtype == "float32"


def test_programs_come_back_equal_over_one_set_of_tensors(flux, programs):
    captured, routing, _ = programs
    want = runnable(captured)(*toy_inputs())
    dense, routed = flux.load("captured"), flux.load("routed")
    assert torch.equal(runnable(dense)(*toy_inputs()), want)
    logits, routes, scores = runnable(routed)(*toy_routed_inputs(2, torch.inf))
    assert torch.equal(logits, want)
    assert bool(routes.all())
    again = runnable(routing)(*toy_routed_inputs(2, 0.0))
    assert torch.equal(scores, again[2])
    assert torch.equal(runnable(routed)(*toy_routed_inputs(2, 0.0))[0], again[0])
    for name, tensor in dense.state_dict.items():
        assert tensor.data_ptr() == routed.state_dict[name].data_ptr()


def test_layout_and_manifest(flux):
    assert names(flux.path) == {"manifest.json", "plan.json", "weights", "routers.safetensors", "graphs", "tokenizer"}
    values = json.loads((flux.path / "manifest.json").read_text())
    assert set(values["files"]) == {
        "plan.json",
        "routers.safetensors",
        "graphs/captured.pt2",
        "graphs/routed.pt2",
        "tokenizer/tokenizer.json",
        "weights/model-00001.safetensors",
    }
    assert values["plan"] == flux.plan.digest()
    assert values["versions"]["torch"] == importlib.metadata.version("torch")
    assert flux.meta == META


def test_every_damaged_file_is_named(flux):
    for name in flux.manifest.files:
        path = flux.path / name
        good = path.read_bytes()
        path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        with pytest.raises(ArchiveError, match=path.name):
            open_flux(flux.path)
        path.unlink()
        with pytest.raises(ArchiveError, match=f"{path.name} is missing"):
            open_flux(flux.path)
        path.write_bytes(good)
    open_flux(flux.path)


def test_weights_are_not_hashed_when_asked(flux):
    path = flux.path / "weights" / "model-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    open_flux(flux.path, verify_weights=False)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"format": 2}, "newer"),
        ({"format": None}, "no fluxc manifest"),
        ({"surprise": 1}, "surprise"),
        ({"files": {"../outside": {"sha256": "0", "bytes": 1}}}, "outside"),
        ({"files": {"plan.json": {"sha256": "0"}}}, "bytes"),
        ({"files": {}}, "no hash"),
        ({"files": {"/etc/hosts": {"sha256": "0", "bytes": 1}}}, "outside"),
        ({"plan": "0" * 64}, "plan"),
    ],
)
def test_bad_manifests_are_refused(flux, change, word):
    path = flux.path / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ArchiveError, match=word):
        open_flux(flux.path)


def test_paths_that_are_no_model_flux_are_refused(tmp_path):
    with pytest.raises(ArchiveError, match="does not exist"):
        open_flux(tmp_path / "none.flux")
    with pytest.raises(ArchiveError, match=r"no model\.flux directory"):
        open_flux(tmp_path)


def test_an_output_that_exists_needs_force_and_strangers_are_never_replaced(flux, programs, tmp_path):
    with pytest.raises(OutputExistsError):
        write_flux(flux.path, *programs, META)
    captured, routed, plan = programs
    write_flux(flux.path, captured, routed, plan.with_budget(0.3), META, force=True)
    assert open_flux(flux.path).plan == plan.with_budget(0.3)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match="not written by fluxc"):
        write_flux(tmp_path / "notes", *programs, META, force=True)
    assert names(tmp_path) == {"model.flux", "notes"}


def test_a_plan_of_another_model_is_refused(flux, programs, other, tmp_path):
    captured, routed, _ = programs
    with pytest.raises(PlanError, match="weights"):
        write_flux(tmp_path / "new.flux", captured, routed, other, META)
    with pytest.raises(PlanError, match="another model"):
        update_plan(flux.path, other)
    assert open_flux(flux.path).plan == flux.plan
    assert names(tmp_path) == {"model.flux"}


def test_a_plan_with_other_sizes_than_the_graph_is_refused(flux, programs, tmp_path):
    captured, routed, plan = programs
    wider = flat_plan(plan.model, sparse=SparseSettings(sink=4, window=13))
    with pytest.raises(InternalError):
        write_flux(tmp_path / "new.flux", captured, routed, wider, META)
    with pytest.raises(PlanError, match="sizes"):
        update_plan(flux.path, flat_plan(flux.plan.model, sparse=SparseSettings(sink=4, window=13)))
    with pytest.raises(PlanError, match="sizes"):
        update_plan(flux.path, dataclasses.replace(flux.plan, pool=9))


def test_a_disk_that_is_too_small_is_found_before_writing(programs, tmp_path, monkeypatch):
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    with pytest.raises(StorageError, match="GB"):
        write_flux(tmp_path / "model.flux", *programs, META)
    assert not names(tmp_path)


def test_a_disk_that_fills_up_leaves_nothing(programs, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
    try:
        with pytest.raises(StorageError, match="cannot"):
            write_flux(tmp_path / "model.flux", *programs, META)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not names(tmp_path)


def test_a_failure_while_writing_keeps_the_old_directory(flux, programs, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(artifact, "_write_graphs", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_flux(flux.path, *programs, META, force=True)
    assert open_flux(flux.path).plan == flux.plan
    assert names(flux.path.parent) == {"model.flux"}


def test_updates_touch_only_the_small_files(flux):
    before = {path: path.stat().st_mtime_ns for path in flux.path.rglob("*") if path.is_file()}
    update_plan(flux.path, flux.plan.with_budget(0.3))
    state = {name: tensor + 1 for name, tensor in flux.routers.items()}
    update_routers(flux.path, state)
    again = open_flux(flux.path)
    assert again.plan.budget == 0.3
    assert all(torch.equal(again.routers[name], tensor) for name, tensor in state.items())
    bound = router_state(again.load("routed"))
    assert all(torch.equal(bound[name], tensor) for name, tensor in state.items())
    touched = {path.name for path, time in before.items() if path.stat().st_mtime_ns != time}
    assert touched == {"plan.json", "routers.safetensors", "manifest.json"}
    assert {path for path in flux.path.rglob("*") if path.is_file()} == set(before)


def test_measurements_can_be_added_and_are_hashed(flux):
    update_flux(flux.path, measurements={"eval.json": "{}"})
    (flux.path / "measurements" / "eval.json").write_text("[]")
    with pytest.raises(ArchiveError, match=r"eval\.json"):
        open_flux(flux.path)


def test_routers_of_another_shape_are_refused_and_nothing_changes(flux):
    state = dict(flux.routers)
    first = next(iter(state))
    for wrong in ({**state, first: torch.zeros(1)}, {**state, "routers.9.head.0.bias": torch.zeros(1)}):
        with pytest.raises(PlanError, match="routers"):
            update_flux(flux.path, plan=flux.plan.with_budget(0.3), routers=wrong)
    assert open_flux(flux.path).plan == flux.plan
    assert not list(flux.path.rglob("*.next"))


def test_an_update_cut_off_before_it_counts_is_forgotten(flux, monkeypatch):
    def crash(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pending.Changes, "commit", crash)
        with pytest.raises(KeyboardInterrupt):
            update_plan(flux.path, flux.plan.with_budget(0.3))
    assert open_flux(flux.path).plan.budget == 0.4


def test_an_update_cut_off_after_it_counts_is_finished_by_the_next_reader(flux, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(pending, "finish", lambda root: None)
        with pending.changes(flux.path) as change:
            change.write("plan.json", flux.plan.with_budget(0.3).to_json())
            change.commit(flux.manifest, plan=flux.plan.with_budget(0.3).digest())
    assert (flux.path / "plan.json.next").exists()
    assert open_flux(flux.path).plan.budget == 0.3
    assert not list(flux.path.rglob("*.next"))


def test_tied_tensors_are_stored_once(tmp_path):
    captured = toy_program()
    captured.state_dict["head.weight"] = captured.state_dict["embed.weight"]
    flux = toy_flux(tmp_path / "model.flux", captured)
    assert flux.manifest.aliases == {"head.weight": "embed.weight"}
    assert "head.weight" not in load_file(flux.path / "weights" / "model-00001.safetensors")
    state = flux.load("captured").state_dict
    assert state["head.weight"].data_ptr() == state["embed.weight"].data_ptr()
    assert torch.equal(runnable(flux.load("captured"))(*toy_inputs()), runnable(captured)(*toy_inputs()))


def test_views_that_differ_are_no_aliases():
    base = torch.arange(6.0).reshape(2, 3)
    stored, aliases = split_aliases({"a": base, "b": base.T, "c": base[0], "d": base, "e": torch.empty(0)})
    assert list(stored) == ["a", "b", "c", "e"]
    assert aliases == {"d": "a"}


def test_shards_stay_below_the_limit(flux, programs, tmp_path):
    captured = programs[0]
    parts = write_flux(tmp_path / "shards.flux", *programs, META, shard_bytes=9_000)
    files = sorted((parts.path / "weights").iterdir())
    assert len(files) > 2
    assert all(file.stat().st_size < 9_000 + 2_000 for file in files)
    assert torch.equal(runnable(parts.load("captured"))(*toy_inputs()), runnable(captured)(*toy_inputs()))
    assert parts.plan.model.weights == flux.plan.model.weights


def test_a_tensor_larger_than_the_limit_has_its_own_shard(tmp_path):
    entries = write_shards({"a": torch.zeros(10), "b": torch.zeros(100), "c": torch.zeros(10)}, tmp_path, "w", 80)
    assert len({entry.file for entry in entries.values()}) == 3


def test_digest_depends_on_bytes_names_and_dtypes_only():
    state = {"a": torch.arange(4.0), "b": torch.ones(2, 3, dtype=torch.bfloat16), "c": torch.tensor(1)}
    digest = weights_digest(state)
    assert weights_digest(dict(reversed(state.items()))) == digest
    assert weights_digest({**state, "a": torch.arange(8.0)[::2] / 2}) == digest
    assert weights_digest({**state, "a": torch.arange(4.0) + 1}) != digest
    assert weights_digest({**state, "b": state["b"].half()}) != digest


_MEMORY = """
import sys
import torch
from fluxc.archive import load_program
from fluxc.artifact import open_flux
from fluxc.ir.graph import runnable
from fluxc.testing import toy_inputs, toy_routed_inputs

def resident():
    fields = dict(line.split(":") for line in open("/proc/self/status") if ":" in line)
    return int(fields["VmRSS"].split()[0]) * 1024

flux = open_flux(sys.argv[1])
load_program(flux.path / "graphs" / "captured.pt2")
before = resident()
dense, routed = runnable(flux.load("captured")), runnable(flux.load("routed"))
with torch.no_grad():
    dense(*toy_inputs())
    routed(*toy_routed_inputs(2, 0.0))
for tensor in flux.weights.values():
    tensor.sum()
print(resident() - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="resident memory is read from /proc")
def test_size_on_disk_and_in_memory_is_that_of_the_weights(tmp_path):
    captured = toy_program(ToyConfig(windows=(0, 0), hidden=768, heads=12, kv_heads=4, head_dim=64, vocab=32_000))
    flux = toy_flux(tmp_path / "model.flux", captured)
    weights = sum(tensor.numel() * 4 for tensor in captured.state_dict.values())
    assert sum(path.stat().st_size for path in flux.path.rglob("*") if path.is_file()) <= 1.15 * weights
    run = subprocess.run([sys.executable, "-P", "-c", _MEMORY, flux.path], capture_output=True, text=True, check=True)
    assert weights * 0.5 < int(run.stdout) <= 1.15 * weights
