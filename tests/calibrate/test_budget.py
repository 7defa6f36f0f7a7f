"""Thresholds: budgets are met, and smaller budgets nest in larger ones."""

from __future__ import annotations

import itertools

import pytest
import torch

from fluxc.calibrate.budget import GRID, monotone, scores_at, threshold


@pytest.mark.parametrize("budget", GRID)
def test_the_full_share_is_the_largest_within_the_budget(budget):
    scores = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    share = float((scores > threshold(scores, torch.ones(40), budget)).float().mean())
    assert budget - 1 / 1200 - 1e-6 <= share <= budget + 1e-6


def test_weights_decide_whose_share_counts():
    scores = torch.cat([torch.full((1, 4), 5.0) + torch.arange(4.0), torch.arange(4.0)[None]])
    heavy = threshold(scores, torch.tensor([3.0, 1.0]), 0.5)
    assert int((scores > heavy).sum()) == 2  # each layer of the first prompt costs 3/16 of the budget


def test_the_ends_of_the_budget():
    scores = torch.randn(5, 3)
    assert not (scores > threshold(scores, torch.ones(5), 0.0)).any()
    assert (scores > threshold(scores, torch.ones(5), 1.0)).all()


def test_routes_of_a_smaller_budget_are_a_subset():
    scores = torch.randn(20, 10, generator=torch.Generator().manual_seed(3))
    cuts = monotone([threshold(scores, torch.ones(20), budget) for budget in GRID])
    sets = [scores > cut for cut in cuts]
    assert all(not (small & ~large).any() for small, large in itertools.pairwise(sets))


def test_monotone_thresholds_never_rise():
    assert monotone([3.0, 4.0, 2.0, 2.5]) == [3.0, 3.0, 2.0, 2.0]


def test_scores_follow_the_share_of_sparse_layers():
    scores = torch.stack([torch.zeros(1, 1), torch.ones(1, 1), torch.full((1, 1), 3.0)])
    points = (0.0, 0.5, 1.0)
    assert float(scores_at(scores, points, 1.0)) == 0.0
    assert float(scores_at(scores, points, 0.75)) == 0.5
    assert float(scores_at(scores, points, 0.25)) == 2.0
    assert float(scores_at(scores, points, 0.0)) == 3.0
