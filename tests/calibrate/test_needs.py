"""Needs against what leaving layers out really costs."""

from __future__ import annotations

import pytest
import torch

from fluxc.calibrate import needs as needs_module
from fluxc.calibrate.leave_one_out import leave_one_out, rank_correlation
from fluxc.calibrate.needs import Measurement, measure_needs, pool_queries
from fluxc.calibrate.runner import forced, run_prompt
from fluxc.calibrate.targets import FLOOR, balanced_weights, best_layers, completed, prompt_targets, task_targets
from fluxc.data import TokenizedPrompt
from fluxc.ir.graph import runnable
from fluxc.ir.sparse import SparseSettings
from fluxc.passes import route_pipeline
from fluxc.testing import ToyConfig, toy_program

LAYERS = 2
POINTS = tuple(step / 8 for step in range(9))


@pytest.fixture(scope="module")
def routed(toy_captured):
    sparse = SparseSettings("streaming", 1, 4)
    return route_pipeline(pool=4, sparse=sparse).run(toy_captured, "captured").program


@pytest.fixture(scope="module")
def toy_captured():
    return toy_program(ToyConfig())


@pytest.fixture
def prompt():
    ids = torch.randint(0, 32, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    return TokenizedPrompt(input_ids=ids, prompt_len=30, task="needle")


def test_needs_add_up_to_the_cost_of_going_all_sparse(routed, prompt):
    found = measure_needs(routed, [prompt], POINTS)[0]
    weights = torch.tensor([0.5, *[1.0] * 7, 0.5]) / 8  # the trapezoid rule along the path
    total = float((found.needs.sum(1) * weights).sum())
    cost = found.losses[-1] - found.losses[0]
    assert abs(cost) > 1e-3
    assert total == pytest.approx(cost, rel=0.05)


def test_losses_at_the_ends_are_dense_and_all_sparse(routed, prompt):
    found = measure_needs(routed, [prompt], (0.5,))[0]
    assert found.points == (0.0, 0.5, 1.0)
    assert found.needs.shape == (1, LAYERS)
    module = runnable(routed)
    dense, sparse = (run_prompt(module, prompt, forced([full] * LAYERS)).loss for full in (True, False))
    assert (found.losses[0], found.losses[-1]) == pytest.approx((dense, sparse), rel=1e-5)


def test_checkpointing_changes_nothing(routed, prompt, monkeypatch):
    plain = measure_needs(routed, [prompt], (0.0, 0.5))[0]
    monkeypatch.setattr(needs_module, "CHECKPOINT_TOKENS", 0)
    again = measure_needs(routed, [prompt], (0.0, 0.5))[0]
    torch.testing.assert_close(plain.needs, again.needs)
    assert torch.equal(plain.pooled, again.pooled)


def test_pooled_queries_are_those_of_the_dense_point(routed, prompt):
    measured = measure_needs(routed, [prompt], (0.0,))[0]
    assert torch.equal(measured.pooled[0], pool_queries(routed, [prompt])[0])


def test_leave_one_out_is_the_difference_of_two_runs(routed, prompt):
    module, base = runnable(routed), [True] * LAYERS
    dense = run_prompt(module, prompt, forced(base)).loss
    for layer, rise in enumerate(leave_one_out(routed, prompt, base)):
        routes = [index != layer for index in range(LAYERS)]
        assert float(rise) == pytest.approx(run_prompt(module, prompt, forced(routes)).loss - dense, abs=1e-6)


def test_layers_that_are_sparse_already_cost_nothing(routed, prompt):
    assert leave_one_out(routed, prompt, [False, True])[0] == 0


def test_measurements_are_kept_and_read_back(routed, prompt, tmp_path):
    first = measure_needs(routed, [prompt], (0.0,), cache=tmp_path, salt="a")[0]
    assert len(list(tmp_path.iterdir())) == 1
    second = measure_needs(routed, [prompt], (0.0,), cache=tmp_path, salt="a")[0]
    torch.testing.assert_close(first.needs, second.needs)
    measure_needs(routed, [prompt], (0.0,), cache=tmp_path, salt="b")
    assert len(list(tmp_path.iterdir())) == 2


def measurement(task, needs, cost):
    return Measurement(task, (0.0, 1.0), torch.tensor([needs, needs]), torch.zeros(2, len(needs), 4), (1.0, 1.0 + cost))


def test_positive_needs_are_scaled_to_the_real_cost():
    assert torch.equal(completed(measurement("a", [0.3, -0.2, 0.1], 0.2)), torch.tensor([0.15, 0.0, 0.05]))
    assert torch.equal(completed(measurement("a", [0.3, 0.1], 9.0)), torch.tensor([0.3, 0.1]))
    assert completed(measurement("a", [0.3, 0.1], -0.5)).sum() == 0


def test_targets_draw_tasks_to_their_group():
    needs = torch.tensor([[1.0], [0.0], [0.2]])
    targets = task_targets(needs, ["needle", "kv", "prose"])
    assert 0 < float(targets["kv"]) < float(targets["needle"]) < 1
    # needle 0.75 * 0.5 + 0.25 * 1 = 0.625 is the largest; 0.2 ** 0.7 * 0.625 ** 0.3 = 0.281.
    assert float(targets["needle"]) == pytest.approx(0.625, abs=2e-3)
    assert float(targets["prose"]) == pytest.approx(0.281, abs=2e-3)
    assert prompt_targets(needs, ["needle", "kv", "prose"]).shape == (3, 1)


def test_texts_are_raised_and_keep_their_profile():
    needs = torch.tensor([[3.0, 1.0], [0.0, 0.02], [0.0, 0.02]])
    targets = task_targets(needs, ["needle", "prose", "local"])
    largest, least = needs[0] + FLOOR, needs[1] + FLOOR
    assert float(targets["prose"].sum()) == pytest.approx(float(least.sum() ** 0.7 * largest.sum() ** 0.3))
    torch.testing.assert_close(targets["prose"] / targets["prose"].sum(), least / least.sum())
    assert torch.equal(targets["local"], least)


def test_user_prompts_keep_half_of_their_own_need():
    rows = prompt_targets(torch.tensor([[1.0], [0.0]]), ["user", "user"])
    assert rows[:, 0].tolist() == pytest.approx([0.75, 0.25], abs=2e-3)


def test_static_layers_count_every_task_once():
    needs = torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.0, 1.0], [4.0, 0.0]])
    assert best_layers(needs, ["needle"] * 3 + ["kv"], 1) == [True, False]
    assert balanced_weights(["a", "a", "b"]).tolist() == pytest.approx([0.75, 0.75, 1.5])


def test_rank_correlation_of_known_orders():
    a = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert rank_correlation(a, a * a) == pytest.approx(1.0)
    assert rank_correlation(a, -a) == pytest.approx(-1.0)
