"""Intervals and summaries of the quality benchmark."""

from __future__ import annotations

import math

import pytest

from fluxc.bench.intervals import mean_interval, paired_interval
from fluxc.bench.summary import input_dependent, summaries


def row(system, prompt, loss, exact, routes):
    return {"system": system, "prompt": prompt, "task": "needle", "loss": loss, "exact": exact, "routes": routes}


ROWS = [
    row("dense", 0, 1.0, True, "1111"),
    row("dense", 1, 2.0, True, "1111"),
    row("fluxc", 0, 1.5, True, "1100"),
    row("fluxc", 1, 2.5, False, "1010"),
]


def test_summaries_pair_every_system_with_dense():
    dense, routed = summaries(ROWS)
    assert dense["perplexity_over_dense"] == [1.0, 1.0, 1.0]
    assert routed["perplexity_over_dense"] == pytest.approx([math.exp(0.5)] * 3)
    assert routed["sparse_ratio"] == 0.5
    assert routed["exact"][0] == 0.5


def test_a_layer_depends_on_the_input_when_it_is_neither_always_nor_never_full():
    assert input_dependent([r for r in ROWS if r["system"] == "fluxc"]) == 0.5


def test_intervals_hold_the_mean_and_shrink_with_agreement():
    mean, low, high = mean_interval([0.0, 1.0] * 50)
    assert low < mean == 0.5 < high
    assert paired_interval([3.0, 5.0], [1.0, 3.0]) == (2.0, 2.0, 2.0)
    assert all(math.isnan(value) for value in mean_interval([]))
