"""Slots against a simulation that writes one token at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxc.engine.geometry import Geometry, lens_of, pages_of, physical, slots_of
from fluxc.kernels.schemas import PAGE
from fluxc.toy_engine import shapes_of, toy_plan

RINGS = ((3, 5), 4, (0, 7), (6, 1))
ROUTES = st.lists(st.booleans(), min_size=3, max_size=3)


def geometry(routes, decode="sparse") -> Geometry:
    plan = toy_plan(RINGS, decode)
    return Geometry.of(shapes_of(plan), plan, routes)


def simulate(turns: list[int], sink: int, window: int) -> dict[int, int]:
    """The token in each slot after the turns: one after another, each to the slot the next free or oldest one has."""
    held: dict[int, int] = {}
    for token in range(sum(turns)):
        if window and token >= sink + window:
            slot = next(slot for slot, old in held.items() if old == token - window)
        else:
            slot = token
        held[slot] = token
    return held


def written(geometry: Geometry, layer: int, turns: list[int]) -> dict[int, int]:
    """The same, through the slots of whole turns."""
    held: dict[int, int] = {}
    start = 0
    for count in turns:
        slots = geometry.turn(start, count)[layer].tolist()
        kept = [slot for slot in slots if slot >= 0]
        assert len(set(kept)) == len(kept)
        held.update({slot: start + at for at, slot in enumerate(slots) if slot >= 0})
        start += count
    return held


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 25), min_size=1, max_size=6), ROUTES, st.sampled_from(["sparse", "full"]))
def test_turns_leave_what_single_tokens_leave(turns, routes, decode):
    found = geometry(routes, decode)
    for layer, (sink, window) in enumerate(zip(found.sinks.tolist(), found.windows.tolist(), strict=True)):
        held = written(found, layer, turns)
        assert held == simulate(turns, sink, window)
        assert held == written(found, layer, [1] * sum(turns))
        assert int(found.lens(sum(turns))[layer]) == len(held) == max(held) + 1


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.integers(1, 60), st.integers(0, 9), st.integers(1, 20))
def test_a_ring_holds_what_the_next_row_sees(tokens, sink, window):
    slots = slots_of(torch.arange(tokens), torch.tensor(sink), torch.tensor(window)).tolist()
    held = set(dict(zip(slots, range(tokens), strict=True)).values())
    seen = {j for j in range(tokens) if j < sink or tokens - j < window}
    assert held >= seen
    assert len(held) <= sink + window


def test_a_route_decides_the_ring():
    found = geometry([True, False, False])
    assert found.sinks.tolist() == [0, 0, 0, 6]
    assert found.windows.tolist() == [0, 4, 7, 1]
    assert geometry([False] * 3, "full").windows.tolist() == [0, 4, 0, 0]


def test_slots_and_lens_follow_the_plan():
    plan = toy_plan(RINGS)
    for routes in ([True] * 3, [False] * 3, [False, True, False]):
        found = Geometry.of(shapes_of(plan), plan, routes)
        for tokens in (1, 3, 8, 9, 100):
            assert found.lens(tokens).tolist() == list(plan.kv_slots(routes, tokens).values())


@pytest.mark.parametrize(("tokens", "pages"), [(1, 1), (PAGE, 1), (PAGE + 1, 2), (3 * PAGE, 3)])
def test_pages(tokens, pages):
    assert geometry([True] * 3).pages(tokens).tolist() == [pages, 1, pages, pages]
    assert pages_of(lens_of(torch.tensor(tokens), torch.tensor(2), torch.tensor(PAGE))).item() == min(pages, 2)


def test_physical_slots_follow_the_page_table():
    table = torch.tensor([[5, 2, 0], [7, 0, 0]], dtype=torch.int32)
    slots = torch.tensor([[0, PAGE, -1, 2 * PAGE - 1], [-1, 1, PAGE - 1, 0]])
    expected = [[5 * PAGE, 2 * PAGE, -1, 3 * PAGE - 1], [-1, 7 * PAGE + 1, 8 * PAGE - 1, 7 * PAGE]]
    assert physical(table, slots).tolist() == expected
