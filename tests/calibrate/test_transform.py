"""A calibration of a tiny model from beginning to end."""

from __future__ import annotations

import json

import pytest
import torch

from fluxc.calibrate import options as options_module
from fluxc.calibrate.options import CalibrateOptions, Effort
from fluxc.calibrate.transform import default_output, transform
from fluxc.errors import DataError, OptionError, OutputExistsError
from fluxc.flux_dir import open_flux
from fluxc.ir.graph import argument, calls, runnable
from fluxc.tiny_folder import save_tiny_model

CONTEXT = 1024
TINY = Effort(9, (0.0, 0.5, 1.0), 9, 9, 4, 1, (16,), "everything")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"), layers=2, context=CONTEXT)


@pytest.fixture(scope="module", autouse=True)
def tiny_effort():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(options_module.EFFORTS, "quick", TINY)
        yield


@pytest.fixture(scope="module")
def options():
    return CalibrateOptions(budget=0.5, effort="quick", sparse_kind="auto", sink=4, window=200)


@pytest.fixture(scope="module")
def done(folder, options, tmp_path_factory):
    root = tmp_path_factory.mktemp("done")
    return transform(folder, root / "m.flux", options=options, dump_dir=root / "dumps")


def test_transform_writes_a_model_that_meets_its_budget(done):
    flux = open_flux(done.path)
    assert flux.plan == done.plan
    assert done.plan.budget == 0.5
    assert 0 < done.report["verified"]["routed"]["all"]["full_share"] < 1
    assert not done.path.with_name("m.flux.measuring").exists()
    stored = json.loads((done.path / "measurements" / "calibration.json").read_text())
    assert len(stored["needs"]) == TINY.measured
    assert torch.isfinite(torch.tensor(stored["needs"])).all()


def test_equal_seeds_give_equal_plans_and_routers(folder, options, done, tmp_path):
    again = transform(folder, tmp_path / "m.flux", options=options)
    assert done.plan == again.plan
    routers = [open_flux(made.path).load("routed").state_dict for made in (done, again)]
    assert all(torch.equal(value, routers[1][name]) for name, value in routers[0].items())


def test_all_full_is_bit_equal_to_captured(done):
    flux = open_flux(done.path)
    ids = torch.randint(0, 400, (2, 300), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(300).expand(2, 300).contiguous()
    lens, rows = torch.tensor([300, 300]), torch.tensor([[0, 150, 299]]).expand(2, 3).contiguous()
    bias = torch.full((2, 2), torch.inf)
    dense = runnable(flux.load("captured"))(ids, positions, lens, rows)
    routed, routes, _ = runnable(flux.load("routed"))(ids, positions, lens, lens, bias, rows)
    assert routes.all()
    assert torch.equal(dense, routed)


def test_the_kind_block(folder, tmp_path):
    options = CalibrateOptions(budget=0.5, effort="quick", sparse_kind="block", decode="full", sink=4, window=200)
    made = transform(folder, tmp_path / "m.flux", options=options)
    assert {(layer.kind, layer.block, layer.stride, layer.threshold) for layer in made.plan.layers} == {
        ("block", 16, 2, 0.9)
    }
    flux = open_flux(made.path)
    assert flux.plan == made.plan
    attributes = {node.kwargs["kind"] for node in calls(flux.load("routed"), torch.ops.fluxc.routed_attention)}
    assert attributes == {"block"}
    assert made.plan.kv_slots([False, False], 300) == made.plan.kv_slots([True, True], 300)
    assert made.report["needs"] != [[0.0] * 2] * TINY.measured


@pytest.mark.parametrize("allowed", [10.0, -1.0])
def test_full_layers_by_blocks(folder, tmp_path, monkeypatch, allowed):
    """Kept where they lose at most what is allowed; else the plan is dense, and the report says so."""
    monkeypatch.setattr("fluxc.calibrate.full_kind.ALLOWED", allowed)
    options = CalibrateOptions(
        budget=0.5, effort="quick", sparse_kind="streaming", full_kind="block", sink=4, window=200
    )
    made = transform(folder, tmp_path / "m.flux", options=options)
    found = made.report["full_kind"]
    wanted = ("block", 16, 2, 0.9) if allowed > 0 else ("dense", 0, 0, 0.0)
    assert {(x.full_kind, x.block, x.stride, x.threshold) for x in made.plan.layers} == {wanted}
    assert (found["kept"], found["allowed"]) == (allowed > 0, allowed)
    assert found["dense_loss"] == made.report["verified"]["dense"]["all"]["loss"]
    flux = open_flux(made.path)
    assert flux.plan == made.plan
    nodes = calls(flux.load("routed"), torch.ops.fluxc.routed_attention)
    assert {argument(node, "full_kind") for node in nodes} == {wanted[0]}


def test_interrupted_measurements_are_taken_up(folder, options, tmp_path, monkeypatch):
    from fluxc.calibrate import needs

    real, done = needs._measure, []

    def interrupted(watchers, prompt):
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append(prompt)
        return real(watchers, prompt)

    monkeypatch.setattr(needs, "_measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        transform(folder, tmp_path / "m.flux", options=options)
    assert not (tmp_path / "m.flux").exists()
    assert len(list((tmp_path / "m.flux.measuring").iterdir())) == 4
    resumed = []
    monkeypatch.setattr(needs, "_measure", lambda watchers, prompt: resumed.append(prompt) or real(watchers, prompt))
    transform(folder, tmp_path / "m.flux", options=options)
    assert len(resumed) == TINY.measured - 4
    assert not (tmp_path / "m.flux.measuring").exists()


def test_an_output_that_exists_is_refused_before_long_work(folder, options, tmp_path, monkeypatch):
    (tmp_path / "m.flux").mkdir()
    (tmp_path / "m.flux" / "mine.txt").write_text("mine")
    with pytest.raises(OutputExistsError):
        transform(folder, tmp_path / "m.flux", options=options)
    assert (tmp_path / "m.flux" / "mine.txt").read_text() == "mine"


def test_prompts_of_the_user(folder, tmp_path):
    lines = [{"prompt": f"Number {n}. " + "word " * (150 + n), "answer": f" {n}"} for n in range(12)]
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines))
    options = CalibrateOptions(budget=0.5, effort="quick", sparse_kind="streaming", sink=2, window=16)
    done = transform(folder, tmp_path / "m.flux", options=options, prompts=path)
    assert done.plan.calibration["origin"] == "mine.jsonl"
    assert done.plan.calibration["prompts"] == {"measured": 8, "pooled": 0, "heldout": 4}


def test_too_few_prompts_of_the_user(folder, tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "one"}\n')
    with pytest.raises(DataError, match="at least 4"):
        transform(folder, tmp_path / "m.flux", prompts=path)


def test_a_window_too_large_for_the_context_is_refused(folder, tmp_path):
    with pytest.raises(OptionError, match="window"):
        transform(folder, tmp_path / "m.flux", options=CalibrateOptions(window=900))


@pytest.mark.parametrize(
    ("model", "name"),
    [("smollm2", "smollm2.flux"), ("a/model.pt", "model.flux"), ("org/name-1.5B", "name-1.5B.flux")],
)
def test_the_default_output_is_named_after_the_model(model, name):
    assert str(default_output(model)) == name


def test_dumps_show_the_program_after_each_pass(done):
    dumps = done.path.with_name("dumps")
    names = sorted(path.name for path in dumps.iterdir())
    assert [name.split(".", 1)[1] for name in names][:3] == [
        "input.txt",
        "insert-routers.after.txt",
        "route-attention.after.txt",
    ]
    assert "apply-plan" in names[-1]
    assert "routed_attention" in (dumps / names[-1]).read_text()
