"""Prefill: exactness against the captured program, batches, budgets, forced routes, the length guard."""

from __future__ import annotations

import pytest
import torch

from fluxc.errors import ArchiveError, DataError, OptionError, PlanError
from fluxc.ir.graph import runnable
from fluxc.runtime.model import forced_bias, load_flux
from fluxc.toy_flux import TOY, toy_flux

LONG = 40  # tokens; the toy's crossover is 2 x (4 + 12)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_flux(toy_flux(tmp_path_factory.mktemp("model") / "model.flux").path)


def ids(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, TOY.vocab, (length,), generator=generator).tolist()


def test_loading_refuses_what_is_no_artifact(tmp_path):
    with pytest.raises(ArchiveError):
        load_flux(tmp_path / "none.flux")


def test_all_full_equals_the_captured_program_bit_for_bit(model):
    for length in (1, 2, 5, LONG):
        full = model.prefill(ids(length), routes=[True, True], program="routed")
        dense = model.prefill(ids(length), program="captured")
        assert full.program == "routed"
        assert torch.equal(full.logits, dense.logits)
        assert bool(full.routes.all())
        assert full.sparse_ratio == dense.sparse_ratio == 0.0


def test_sparse_routes_change_the_logits_and_are_reported(model):
    dense = model.prefill(ids(LONG), program="captured")
    half = model.prefill(ids(LONG), routes=[True, False])
    assert half.routes.tolist() == [[True], [False]]
    assert half.sparse_ratio == 0.5
    assert not torch.equal(half.logits, dense.logits)


def test_a_batch_gives_each_request_what_it_gets_alone(model):
    prompts = [ids(LONG, 1), ids(LONG - 7, 2)]
    # Between the scores of the two prompts, so that their routes differ.
    scores = torch.cat([model.prefill([p], program="routed").scores for p in prompts], dim=1)
    bias = -scores.mean(1, keepdim=True).expand(-1, 2).contiguous()
    batch = model.batch(prompts)
    together = model.run_routed(batch, bias)
    assert together.routes[0, 0] != together.routes[0, 1]
    for row, prompt in enumerate(prompts):
        alone = model.run_routed(model.batch([prompt]), bias[:, :1])
        assert torch.equal(alone.routes[:, 0], together.routes[:, row])
        torch.testing.assert_close(alone.scores[:, 0], together.scores[:, row])
        torch.testing.assert_close(alone.logits[0], together.logits[row], rtol=1e-5, atol=1e-5)


def test_routes_grow_with_the_budget(model):
    before = torch.zeros(2, 1, dtype=torch.bool)
    shares = []
    for budget in (0.0, 0.01, 0.2, 0.35, 0.38, 0.39, 0.5, 0.99, 1.0):
        routes = model.prefill(ids(LONG), budget=budget, program="routed").routes
        assert not bool((before & ~routes).any())
        shares.append(float(routes.float().mean()))
        before = routes
    assert shares[0] == 0.0
    assert shares[-1] == 1.0
    assert model.prefill(ids(LONG), program="routed").routes.equal(
        model.prefill(ids(LONG), budget=model.plan.budget, program="routed").routes
    )


def test_short_prompts_run_dense_without_routers(model):
    assert model.crossover() == 32
    assert model.prefill(ids(31), budget=0.0).program == "captured"
    at = model.prefill(ids(32), budget=0.0)
    assert at.program == "routed"
    assert not bool(at.routes.any())
    assert model.prefill(ids(31), budget=0.0).scores is None
    assert model.prefill(ids(31), budget=0.0, program="routed").sparse_ratio == 1.0


def test_a_short_prompt_in_a_batch_runs_full(model):
    prefill = model.prefill([ids(LONG), ids(20)], budget=0.0)
    assert prefill.routes.tolist() == [[False, True], [False, True]]
    dense = model.prefill([ids(20)], program="captured")
    torch.testing.assert_close(prefill.logits[1], dense.logits[0], rtol=1e-5, atol=1e-5)


def test_a_dense_budget_runs_the_dense_program(model):
    assert model.prefill(ids(LONG), budget=1.0).program == "captured"


def test_logits_are_those_of_the_rows_asked_for(model):
    tokens = ids(LONG)
    rows = model.prefill(tokens, logits_at=[[0, 11, LONG - 1]], program="captured").logits
    last = model.prefill(tokens[:12], program="captured").logits
    torch.testing.assert_close(rows[:, 1:2], last, rtol=1e-5, atol=1e-5)
    assert rows.shape == (1, 3, TOY.vocab)


def test_prompt_lens_end_the_routers_view(model):
    whole = model.prefill(ids(LONG), program="routed").scores
    part = model.prefill(ids(LONG), prompt_lens=[LONG - 10], program="routed").scores
    assert not torch.equal(whole[0], part[0])
    torch.testing.assert_close(part[0], model.prefill(ids(LONG)[: LONG - 10], program="routed").scores[0])


@pytest.mark.parametrize("budget", [-0.1, 1.01, float("nan"), 0.005])
def test_bad_budgets_are_refused(model, budget):
    with pytest.raises(PlanError, match="budget"):
        model.prefill(ids(LONG), budget=budget)


@pytest.mark.parametrize(
    ("prompt", "options", "word"),
    [
        ([], {}, "no tokens"),
        ([[1, 2], []], {}, "no tokens"),
        ([1] * 257, {}, "256"),
        ([1, 2], {"prompt_lens": [3]}, "contradict"),
        ([1, 2], {"seq_lens": [3]}, "contradict"),
        ([1, 2], {"prompt_lens": [0]}, "contradict"),
        ([1, 2], {"seq_lens": [2, 2]}, "1 prompts"),
    ],
)
def test_bad_prompts_are_refused(model, prompt, options, word):
    with pytest.raises(DataError, match=word):
        model.prefill(prompt, **options)


def test_bad_routes_are_refused(model):
    with pytest.raises(PlanError, match="routes"):
        model.prefill(ids(LONG), routes=[True])
    with pytest.raises(PlanError, match="routes"):
        forced_bias(torch.ones(2, 3), 2, 1)
    with pytest.raises(OptionError):
        model.prefill(ids(LONG), routes=[True, False], program="captured")


def test_both_programs_share_their_weights(model):
    dense, routed = model.captured_program.state_dict, model.routed_program.state_dict
    assert all(routed[name].data_ptr() == tensor.data_ptr() for name, tensor in dense.items())
    assert runnable(model.captured_program) is not model.captured


def test_vocabulary_is_read_from_the_program(model):
    assert model.vocabulary == TOY.vocab
