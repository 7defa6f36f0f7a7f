"""Measurements: formulas, stopwatch, interleaving, report, crossover. What the times are is not tested."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from fluxc.errors import ArchiveError, DataError, OptionError, PlanError
from fluxc.ir.graph import runnable
from fluxc.plan import LayerPlan
from fluxc.runtime import crossover, measure_crossover
from fluxc.runtime.clock import Timing, interleaved, with_stopwatches
from fluxc.runtime.crossover import Lengths
from fluxc.runtime.measure import bound, ideal, mean_density, measure_prefill, spread_routes
from fluxc.runtime.measure_crossover import grid
from fluxc.runtime.model import load_flux
from fluxc.toy_flux import toy_flux


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return load_flux(toy_flux(tmp_path_factory.mktemp("model") / "model.flux").path)


@pytest.fixture
def model(made):
    """The toy model on a machine where nothing was measured yet."""
    yield made
    made.flux.device_file.unlink(missing_ok=True)


def test_bound_and_ideal_are_the_formulas_of_the_design():
    # A 10 s run, 6 s of it attention, three quarters of the layers sparse.
    assert bound(10, 6, 0.75) == pytest.approx(10 / 5.5)
    assert ideal(10, 6, 0.75, 0.5) == pytest.approx(10 / 7.75)
    assert ideal(10, 6, 0.75, 1.0) == bound(10, 6, 0.0) == 1.0
    assert ideal(10, 6, 0.75, 0.0) == bound(10, 6, 0.75)


def test_mean_density_is_over_the_layers_of_the_plan(model):
    layers = model.plan.layers
    mixed = dataclasses.replace(model.plan, layers=(layers[0], LayerPlan(2, "triangle", 2, 4, 3)))
    i, j = torch.arange(40)[:, None], torch.arange(40)[None]
    seen = [(j < x.sink) | (i - j < x.window) | (i >= 40 - x.last) for x in mixed.layers]
    want = sum(float(((j <= i) & keys).sum()) for keys in seen) / 2 / (40 * 41 / 2)
    assert mean_density(mixed, 40) == pytest.approx(want)


def test_spread_routes_have_the_share_asked_for():
    assert spread_routes(4, 0.5) == [True, False, True, False]
    assert spread_routes(3, 0.0) == [True] * 3
    assert spread_routes(3, 1.0) == [False] * 3
    for layers in (1, 7, 30):
        for sparse in range(layers + 1):
            assert spread_routes(layers, sparse / layers).count(False) == sparse


def test_timing_is_a_median_with_its_spread():
    assert Timing.of([3.0, 1.0, 8.0]) == Timing(3.0, 1.0, 8.0, 3)


def test_interleaved_runs_take_turns_after_a_warm_up():
    order = []

    def run(name):
        order.append(name)
        return float(len(order))

    taken = interleaved({"a": lambda: run("a"), "b": lambda: run("b")}, 3)
    assert "".join(order) == "ab" + "ab" + "ba" + "ab"
    assert taken == {"a": [3.0, 6.0, 7.0], "b": [4.0, 5.0, 8.0]}


def test_stopwatches_time_the_routable_attentions_and_change_nothing(model):
    module, watches = with_stopwatches(model.captured_program)
    batch = model.batch(list(range(30)))
    logits = module(*batch.captured())
    assert torch.equal(logits, runnable(model.captured_program)(*batch.captured()))
    assert len(watches) == 2  # the toy's third attention has a window of its own
    assert all(watch.seconds > 0 for watch in watches)


def test_report_has_both_routed_runs_and_adds_up(model):
    report = measure_prefill(model, 60, sparse_ratio=0.5, budget=0.01, repeats=3)
    forced, chosen = report.routed
    assert (forced.name, forced.sparse_ratio) == ("forced", 0.5)
    assert (chosen.name, chosen.sparse_ratio) == ("chosen", 1.0)
    assert report.length == 60
    assert report.dense.runs == report.attention.runs == forced.seconds.runs == 3
    assert 0 < report.attention.median < report.dense.median
    assert report.density == pytest.approx((16 * 17 / 2 + 44 * 16) / (60 * 61 / 2))
    for run in report.routed:
        assert run.speedup == report.dense.median / run.seconds.median
        assert run.bound == bound(report.dense.median, report.attention.median, run.sparse_ratio)
        assert run.ideal == ideal(report.dense.median, report.attention.median, run.sparse_ratio, report.density)
        assert 1 <= run.ideal <= run.bound
    assert json.loads(json.dumps(report.to_dict()))["routed"][0]["of_ideal"] == forced.of_ideal


def test_given_routes_and_ids_are_measured(model):
    report = measure_prefill(model, list(range(30)), routes=[False, False], repeats=1)
    assert report.length == 30
    assert report.routed[0].sparse_ratio == 1.0


def test_the_guard_measures_what_prefill_does(model):
    report = measure_prefill(model, 20, sparse_ratio=1.0, budget=0.0, guard=True, repeats=1)
    assert [run.sparse_ratio for run in report.routed] == [1.0, 0.0]
    report = measure_prefill(model, 20, sparse_ratio=1.0, budget=0.0, repeats=1)
    assert [run.sparse_ratio for run in report.routed] == [1.0, 1.0]


def test_bad_measurements_are_refused(model):
    with pytest.raises(OptionError, match="repeats"):
        measure_prefill(model, 10, repeats=0)
    with pytest.raises(DataError, match="0 tokens"):
        measure_prefill(model, 0)
    with pytest.raises(DataError, match="256"):
        measure_prefill(model, 300)
    with pytest.raises(DataError, match="2 prompts"):
        measure_prefill(model, [[1], [2]])
    with pytest.raises(PlanError, match="routes"):
        measure_prefill(model, 10, routes=[True])


LENGTHS = Lengths((10, 20, 40, 80), dense=(1.0, 2.0, 4.0, 9.0), full=(1.2, 2.2, 4.2, 9.2), sparse=(1.1, 1.9, 3.0, 4.0))


@pytest.mark.parametrize(("ratio", "want"), [(1.0, 20), (0.7, 20), (0.5, 40), (0.1, 80), (0.0, 81)])
def test_crossover_follows_the_ratio(ratio, want):
    assert LENGTHS.crossover(ratio) == want


def test_a_length_that_pays_by_chance_does_not_count():
    assert dataclasses.replace(LENGTHS, sparse=(0.5, 3.0, 3.0, 4.0)).crossover(1.0) == 40


def test_grid_ends_at_the_context():
    assert grid(16, 50) == [16, 22, 31, 43, 50]
    assert grid(16, 16) == [16]
    assert grid(16, 10) == [10]


def test_the_crossover_is_measured_stored_and_used(model, monkeypatch):
    times = {16: (1.0, 1.1, 1.2), 22: (2.0, 2.1, 1.5), 31: (3.0, 3.1, 2.0), 43: (5.0, 5.1, 2.0)}
    monkeypatch.setattr(measure_crossover, "_times", lambda model, length, repeats, seed: times[length])
    assert model.crossover() == 32
    found = measure_crossover.measure_crossover(model)
    assert found.lengths == (16, 22, 31)  # it paid at 22 and 31
    assert model.crossover() == 22
    assert model.crossover(0.0) == 22
    assert model.crossover(0.9) == 31
    assert model.crossover(1.0) == 32
    assert model.prefill(list(range(22)), budget=0.0).program == "routed"
    assert model.prefill(list(range(21)), budget=0.0).program == "captured"


def test_times_of_a_length_are_positive(model):
    dense, full, sparse = measure_crossover._times(model, 20, 1, 0)
    assert min(dense, full, sparse) > 0


def test_device_file_round_trip_and_damage(model, tmp_path):
    path = tmp_path / "device.json"
    crossover.write(path, "a/eager/float32/streaming", LENGTHS)
    crossover.write(path, "b/eager/float32/streaming", LENGTHS)
    assert crossover.read(path) == dict.fromkeys(("a/eager/float32/streaming", "b/eager/float32/streaming"), LENGTHS)
    good = json.loads(path.read_text())
    uneven = {"x": {"lengths": [1], "dense": [1.0, 2.0], "full": [1.0], "sparse": [1.0]}}
    for bad in ({"format": 2}, {"entries": []}, {"entries": {"x": {}}}, {"entries": uneven}):
        path.write_text(json.dumps(good | bad))
        with pytest.raises(ArchiveError, match="device"):
            crossover.read(path)


def test_the_key_names_device_target_dtype_and_kind(model):
    device, target, dtype, kind = crossover.key(model.plan, "cpu").rsplit("/", 3)
    assert device == crossover.device_name("cpu")
    assert (target, dtype, kind) == ("eager", "float32", "streaming-4+12")


def test_the_key_names_a_full_kind(model):
    blocks = {"full_kind": "block", "block": 16, "stride": 4, "threshold": 0.9}
    layers = tuple(dataclasses.replace(layer, **blocks) for layer in model.plan.layers)
    plan = dataclasses.replace(model.plan, layers=layers)
    assert crossover.key(plan, "cpu").endswith("/streaming-4+12-full-block-16-0.9")


def test_a_crossover_of_another_machine_is_not_used(model):
    crossover.write(model.flux.device_file, "another/eager/float32/streaming-4+12", LENGTHS)
    assert model.crossover() == 32
