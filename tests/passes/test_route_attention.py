"""Pass route-attention: signature, exactness with all routes full, routes that follow score + bias."""

from __future__ import annotations

import pytest
import torch

from fluxc import kernels
from fluxc.archive import load_program, save_program
from fluxc.ir.graph import argument, calls, runnable, user_inputs
from fluxc.ir.printer import program_diff, program_text
from fluxc.ir.sparse import SparseSettings
from fluxc.passes.insert_routers import InsertRouters
from fluxc.passes.route_attention import RouteAttention
from fluxc.signature import ROUTED_INPUTS
from fluxc.testing import ToyConfig, toy_inputs, toy_routed_inputs

kernels.register()
SETTINGS = SparseSettings(sink=2, window=4)


def _route(program, settings=SETTINGS):
    return RouteAttention(settings).apply(InsertRouters().apply(program).program)


def _run(program, *inputs):
    with torch.no_grad():
        return runnable(program)(*inputs)


@pytest.fixture(scope="module")
def captured(toy):
    return toy(ToyConfig(windows=(0, 6, 0), qk_norm=True))


@pytest.fixture(scope="module")
def routed(captured):
    return _route(captured).program


def test_golden(toy, golden):
    scored = InsertRouters().apply(toy(ToyConfig(windows=(0, 6)))).program
    golden.check("toy", program_diff(scored, RouteAttention(SETTINGS).apply(scored).program))


def test_every_scored_attention_is_routed(captured):
    result = _route(captured)
    assert (result.count, result.modified) == (2, True)
    assert user_inputs(result.program) == ROUTED_INPUTS
    nodes = calls(result.program, torch.ops.fluxc.routed_attention)
    assert [argument(node, "layer") for node in nodes] == [0, 2]
    assert [argument(node, "layer") for node in calls(result.program, torch.ops.fluxc.attention)] == [1]
    assert {(argument(node, "sink"), argument(node, "window")) for node in nodes} == {(2, 4)}


def test_program_without_routers_is_left(captured):
    result = RouteAttention().apply(captured)
    assert (result.count, result.program is captured) == (0, True)
    assert result.notes[0].reason == "the program has no routers"


def test_input_program_is_unchanged(captured):
    scored = InsertRouters().apply(captured).program
    before = program_text(scored)
    RouteAttention().apply(scored)
    assert program_text(scored) == before


@pytest.mark.parametrize("rope", ["half", "interleaved", "partial", "split", "transposed", "none"])
def test_all_full_is_bit_equal_to_captured(toy, rope):
    captured = toy(ToyConfig(windows=(0,), rope=rope, softcap=20.0))
    routed = _route(captured).program
    for batch, length in ((1, 1), (3, 37)):
        logits, routes, scores = _run(routed, *toy_routed_inputs(1, torch.inf, batch, length))
        assert torch.equal(logits, _run(captured, *toy_inputs(batch, length)))
        assert routes.all()
        assert scores.isfinite().all()


def test_sparse_routes_change_the_logits(captured, routed):
    logits, routes, _ = _run(routed, *toy_routed_inputs(2, -torch.inf))
    assert not routes.any()
    assert not torch.equal(logits, _run(captured, *toy_inputs()))


def test_untrained_routers_choose_full(routed):
    assert _run(routed, *toy_routed_inputs(2, 0.0))[1].all()


def test_routes_are_score_plus_bias(routed):
    inputs = list(toy_routed_inputs(2, 0.0, batch=3))
    scores = _run(routed, *inputs)[2]
    inputs[4] = torch.tensor([[1.0, -1.0, 0.0], [-1.0, 0.0, 1.0]]) - scores
    _, routes, again = _run(routed, *inputs)
    assert torch.equal(routes, again + inputs[4] > 0)
    assert routes[0].tolist()[:2] == [True, False]


def test_rows_of_a_batch_are_independent(routed):
    inputs = list(toy_routed_inputs(2, 0.0, batch=2))
    inputs[4] = torch.tensor([[torch.inf, -torch.inf], [-torch.inf, torch.inf]])
    both = _run(routed, *inputs)[0]
    for row in range(2):
        sliced = [t[:, row : row + 1] if i == 4 else t[row : row + 1] for i, t in enumerate(inputs)]
        torch.testing.assert_close(both[row : row + 1], _run(routed, *sliced)[0], rtol=1e-5, atol=1e-5)


def test_tokens_after_the_prompt_do_not_change_scores(routed):
    inputs = list(toy_routed_inputs(2, 0.0, batch=1))
    first = _run(routed, *inputs)[2]
    inputs[0] = inputs[0].clone()
    inputs[0][:, int(inputs[3]) :] = 0
    assert torch.equal(_run(routed, *inputs)[2], first)


def test_save_and_load(routed, tmp_path):
    save_program(routed, tmp_path / "routed.pt", extra={})
    again, _ = load_program(tmp_path / "routed.pt")
    assert program_text(again) == program_text(routed)
    inputs = toy_routed_inputs(2, 0.5, batch=3, length=11)
    for mine, theirs in zip(_run(routed, *inputs), _run(again, *inputs), strict=True):
        assert torch.equal(mine, theirs)
