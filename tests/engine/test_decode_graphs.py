"""Steps filled up to the sizes of graphs: the logits of the plain program, nothing else read or written."""

from __future__ import annotations

import pytest
import torch

from fluxc.engine.decode_graphs import LEAST_PAGES, DecodeGraphs, power_of_two
from fluxc.engine.traced import TracedPrograms
from fluxc.testing import ToyConfig
from fluxc.toy_cache import ToyCache

REQUESTS = (9, 23, 3)
LONG = 70


class Filled:
    """Programs whose decode goes through `DecodeGraphs`."""

    def __init__(self, programs, cache, *, record):
        self._programs, self.layers = programs, programs.layers
        self.steps = DecodeGraphs(programs, cache, record=record)

    def decode(self, cache, *inputs):
        ids, positions, slots, table, lens = (tensor.cpu().numpy() for tensor in inputs)
        return self.steps(ids, positions, slots, table, lens)


@pytest.fixture
def caches(toy_routed):
    """Two equal caches of three requests with routes of their own."""
    programs = TracedPrograms(toy_routed(ToyConfig(windows=(0, 6, 0), heads=4, kv_heads=2)))
    made = []
    for _ in range(2):
        cache = ToyCache(programs, sink=2, window=4, room=150, requests=3)
        for length, bias in zip(REQUESTS, ([1.0, 1.0], [-1.0, -1.0], [1.0, -1.0]), strict=True):
            cache.prefill(range(5, 5 + length), torch.tensor(bias) * torch.inf)
        made.append(cache)
    return made


def test_steps_equal_the_plain_program(caches):
    plain, filled = caches
    filled.programs = Filled(plain.programs, filled.cache, record=False)
    for step in range(LONG):
        tokens = [step % 29, 7, 28 - step % 20]
        torch.testing.assert_close(filled.decode(tokens), plain.decode(tokens), rtol=1e-5, atol=3e-6)
    torch.testing.assert_close(filled.cache, plain.cache, equal_nan=True, rtol=1e-5, atol=3e-6)
    assert len(filled.programs.steps) == 1


def test_a_row_that_leaves_is_not_read_again(caches):
    plain, filled = caches
    filled.programs = Filled(plain.programs, filled.cache, record=False)
    for cache in (plain, filled):
        cache.decode([1, 2, 3])
        cache.cache[cache.requests.pop(1).pages[0]] = torch.nan
    for tokens in ([4, 5], [6, 7]):
        torch.testing.assert_close(filled.decode(tokens), plain.decode(tokens), rtol=1e-5, atol=3e-6)
    assert len(filled.programs.steps) == 2


def test_one_size_for_short_requests():
    assert [power_of_two(count) for count in (1, 2, 3, 4, 5, 9)] == [1, 2, 4, 4, 8, 16]
    assert power_of_two(LEAST_PAGES) == LEAST_PAGES
