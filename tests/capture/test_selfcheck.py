"""The cases the self-check tries, and the masks it relies on the proof of."""

from __future__ import annotations

import pytest
import torch

from fluxc.capture.masks import _pairs
from fluxc.capture.selfcheck import Case, cases


def test_three_lengths_two_batches_and_a_start() -> None:
    found = cases(8192, [])
    assert [case.length for case in found if case == Case(1, case.length)] == [1, 7, 33]
    assert Case(2, 7) in found
    assert Case(1, 7, start=3) in found


def test_small_windows_are_crossed_and_large_ones_are_not() -> None:
    assert {case.length for case in cases(8192, [128, 128, 4096, 0])} == {1, 7, 33, 131}


@pytest.mark.parametrize("context", [1, 4, 20, 33])
def test_nothing_goes_past_the_context(context: int) -> None:
    found = cases(context, [16])
    assert max(case.start + case.length for case in found) <= context
    assert min(case.length for case in found) == 1


def test_unknown_context() -> None:
    assert {case.length for case in cases(0, [])} == {1, 7, 33}


@pytest.mark.parametrize(("window", "context"), [(0, 64), (8, 128), (4096, 131072), (1023, 32768)])
def test_mask_pairs_hold_the_edges(window: int, context: int) -> None:
    rows, columns = _pairs(window, context, torch.device("cpu"))
    pairs = set(zip(rows.tolist(), columns.tolist(), strict=True))
    assert {(0, 0), (0, 1), (63, 0), (context - 1, context - 1)} <= pairs
    if window:
        assert {(2 * window, 2 * window - window), (2 * window, 2 * window - window + 1)} <= pairs
    assert max(max(pair) for pair in pairs) < context
