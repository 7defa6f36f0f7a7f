"""Pages are handed out once, come back once, and are counted right, whatever the order of calls."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from fluxc.engine.demand import expected_pages, page_bytes, pages, worst_pages
from fluxc.engine.pool import PagePool
from fluxc.errors import InternalError
from fluxc.kernels.schemas import PAGE
from fluxc.toy_engine import shapes_of, toy_plan

LAYERS = 3
TOTAL = 40


class Requests(RuleBasedStateMachine):
    """Requests that open, grow, are preempted and end in any order."""

    holdings = Bundle("holdings")

    def __init__(self):
        super().__init__()
        self.pool = PagePool(TOTAL)
        self.model = {}

    @rule(target=holdings, reserved=st.integers(0, 30))
    def opened(self, reserved):
        holding = self.pool.open(LAYERS, reserved)
        self.model[holding] = [0] * LAYERS
        return holding

    @rule(holding=holdings, lens=st.lists(st.integers(0, 9 * PAGE), min_size=LAYERS, max_size=LAYERS))
    def grows(self, holding, lens):
        wanted = [max(have, math.ceil(n / PAGE)) for have, n in zip(self.model[holding], lens, strict=True)]
        fits = sum(wanted) - sum(self.model[holding]) <= self.pool.free
        before = holding.numbers()
        assert self.pool.grow(holding, torch.tensor(lens)) == fits
        if fits:
            self.model[holding] = wanted
            assert set(before) <= set(holding.numbers())
        else:
            assert holding.numbers() == before

    @rule(holding=holdings)
    def preempted(self, holding):
        self.pool.clear(holding)
        self.model[holding] = [0] * LAYERS

    @rule(holding=consumes(holdings))
    def ended(self, holding):
        self.pool.close(holding)
        del self.model[holding]

    @invariant()
    def every_page_is_somewhere_once(self):
        held = [page for holding in self.model for page in holding.numbers()]
        assert len(held) == len(set(held)) == self.pool.used == sum(map(sum, self.model.values()))
        assert set(held) <= set(range(TOTAL))
        assert [h.counts.tolist() for h in self.model] == list(self.model.values())
        claims = sum(max(holding.reserved, sum(counts)) for holding, counts in self.model.items())
        assert self.pool.unclaimed == TOTAL - claims

    def teardown(self):
        for holding in self.model:
            self.pool.close(holding)
        assert (self.pool.free, self.pool.unclaimed) == (TOTAL, TOTAL)


TestRequests = Requests.TestCase
TestRequests.settings = settings(max_examples=60, deadline=None, derandomize=True, stateful_step_count=30)


def test_a_closed_holding_is_refused():
    pool = PagePool(4)
    holding = pool.open(1)
    pool.close(holding)
    with pytest.raises(InternalError, match="given back"):
        pool.close(holding)
    with pytest.raises(InternalError, match="given back"):
        pool.grow(holding, torch.tensor([1]))


@pytest.mark.parametrize("tokens", [1, PAGE, 5 * PAGE + 1, 300])
def test_measured_bytes_are_the_planned_ones_within_a_page_a_layer(tokens):
    plan = toy_plan([(4, 70), 100, (2, 9)])
    shapes = shapes_of(plan)
    size = page_bytes(shapes, torch.float32)
    assert size == PAGE * 2 * 1 * 4 * 4
    for routes in ([True, True], [True, False], [False, False]):
        measured, planned = pages(shapes, plan, routes, tokens) * size, plan.kv_bytes(routes, tokens)
        assert planned <= measured < planned + len(shapes) * size


def test_what_a_request_may_need():
    plan = toy_plan([(4, 60), 64, (4, 60)])
    shapes = shapes_of(plan)
    tokens = 10 * PAGE
    assert worst_pages(shapes, plan, [0.0, 0.0], tokens) == 10 + 1 + 10
    assert worst_pages(shapes, plan, [0.0, -math.inf], tokens) == 10 + 1 + 1
    assert expected_pages(shapes, plan, [0.0, 0.0], tokens, 0.5) == 3 + 9
    assert expected_pages(shapes, plan, [math.inf, 0.0], tokens, 0.5) == 12 + 5
    assert expected_pages(shapes, plan, [math.inf, math.inf], tokens, 0.0) == 21
