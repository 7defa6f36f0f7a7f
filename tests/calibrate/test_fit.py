"""Routers in closed form."""

from __future__ import annotations

import torch

from fluxc.calibrate.fit import FitOptions, fit_routers, linear_router, scores_of
from fluxc.router import LayerRouter, RouterSpec

SPEC = RouterSpec(8, 100)


def as_module(state):
    router = LayerRouter(SPEC)
    router.load_state_dict(state)
    return router


def test_a_linear_score_passes_the_router_exactly():
    generator = torch.Generator().manual_seed(0)
    slope = torch.randn(8, generator=generator, dtype=torch.float64) * 3
    x = torch.randn(50, 8, generator=generator) * 4
    score = as_module(linear_router(slope, -2.5, SPEC, 0)).score(x)
    torch.testing.assert_close(score, (x.double() @ slope - 2.5).float(), rtol=1e-5, atol=2e-5)


def test_spare_units_can_learn():
    router = as_module(linear_router(torch.ones(8, dtype=torch.float64), 0.0, SPEC, 0))
    router.score(torch.randn(16, 8)).sum().backward()
    assert router.head[4].weight.grad[:, 2:].abs().sum() > 0
    assert router.head[0].weight[2:].abs().sum() > 0


def test_scores_are_log_needs_where_the_model_holds():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4000, 2, 8, generator=generator)
    slopes = torch.randn(2, 8, generator=generator) * 0.3
    wanted = torch.einsum("nld,ld->nl", x, slopes) - 3
    noise = torch.empty(4000, 2).exponential_(generator=generator)  # mean 1
    routers = fit_routers(x, wanted.exp() * noise, torch.ones(4000), SPEC, FitOptions(ridge=1.0))
    error = (scores_of(routers, x) - wanted).abs()
    assert error.mean() < 0.08


def test_scores_of_agree_with_the_router_module():
    x = torch.randn(6, 1, 8)
    routers = fit_routers(x, torch.rand(6, 1) + 0.1, torch.ones(6), SPEC, FitOptions())
    torch.testing.assert_close(scores_of(routers, x)[:, 0], as_module(routers[0]).score(x[:, 0]))


def test_weights_count_samples_as_copies_would():
    x, y = torch.randn(5, 1, 8), torch.rand(5, 1) + 0.1
    weights = torch.tensor([2.0, 1.0, 1.0, 1.0, 1.0])
    weighted = fit_routers(x, y, weights, SPEC, FitOptions(ridge=5.0))
    copied = fit_routers(torch.cat([x[:1], x]), torch.cat([y[:1], y]), torch.ones(6), SPEC, FitOptions(ridge=6.0))
    torch.testing.assert_close(scores_of(weighted, x), scores_of(copied, x), rtol=1e-3, atol=1e-3)
