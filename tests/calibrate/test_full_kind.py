"""Block attention in full layers: what it loses is measured, and it is kept only where that is next to nothing."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from fluxc.calibrate import full_kind
from fluxc.calibrate.full_kind import ALLOWED, FullKind, compare_full, with_dense_full
from fluxc.calibrate.options import CalibrateOptions
from fluxc.calibrate.verify import Summary, verify
from fluxc.data import TokenizedPrompt
from fluxc.errors import OptionError
from fluxc.ir.graph import calls, runnable
from fluxc.ir.printer import program_text
from fluxc.ir.sparse import SparseSettings
from fluxc.passes.apply_plan import ApplyPlan, settings_of
from fluxc.testing import ToyConfig

BLOCKS = SparseSettings(sink=2, window=4, block=16, stride=4, threshold=0.5, full_kind="block")


@pytest.fixture(scope="module")
def program(toy_routed):
    return toy_routed(ToyConfig(windows=(0, 0)))


@pytest.fixture(scope="module")
def prompts():
    ids = [(3 * n) % 19 + 1 for n in range(90)]
    return [TokenizedPrompt(ids[:n], n - 2, "copy") for n in (70, 90)]


def summary(loss: float, exact: float | None = None) -> Summary:
    return Summary(4, loss, exact, 1.0)


@pytest.mark.parametrize(
    ("dense", "block", "kept"),
    [
        (summary(1.0), summary(1.0), True),
        (summary(1.0), summary(0.5), True),
        (summary(1.0), summary(1.0 + math.log1p(0.9 * ALLOWED)), True),
        (summary(1.0), summary(1.0 + math.log1p(1.1 * ALLOWED)), False),
        (summary(1.0), summary(math.nan), False),
        (summary(1.0, 1.0), summary(1.0, 0.99), False),
        (summary(1.0, 0.5), summary(1.0, 0.5), True),
        (summary(1.0, 0.0), summary(1.0, 0.0), True),
    ],
)
def test_it_is_kept_only_where_neither_perplexity_nor_exact_answers_lose(dense, block, kept):
    assert FullKind(dense, block).kept is kept


def test_both_ways_are_measured_with_all_routes_full(program, prompts):
    found = compare_full(program, BLOCKS, prompts, "cpu")
    bias = torch.full((2,), torch.inf)
    dense = verify(runnable(program), prompts, bias).dense["all"]
    assert found.dense == dense
    assert found.block.full_share == 1.0
    assert found.block.loss != found.dense.loss
    everything = compare_full(program, dataclasses.replace(BLOCKS, threshold=1.0), prompts, "cpu")
    assert everything.block.loss == pytest.approx(everything.dense.loss, abs=1e-4)


def test_dense_is_measured_without_blocks_and_leaves_the_rest(program, prompts):
    by_blocks = ApplyPlan({0: BLOCKS, 1: BLOCKS}).apply(program).program
    assert program_text(with_dense_full(by_blocks)) == program_text(program)
    assert with_dense_full(program) is program
    sparse = SparseSettings("block", 2, 4, 0, True, 16, 4, 0.5)
    sparse_blocks = ApplyPlan({0: sparse, 1: BLOCKS}).apply(program).program
    kept = [settings_of(node) for node in calls(with_dense_full(sparse_blocks), torch.ops.fluxc.routed_attention)]
    assert kept == [sparse, SparseSettings(sink=2, window=4)]
    found = verify(runnable(by_blocks), prompts, torch.full((2,), torch.inf), dense_module=runnable(program))
    assert found.dense["all"].loss != found.routed["all"].loss


def test_options_that_cannot_be():
    with pytest.raises(OptionError, match="both block"):
        CalibrateOptions(sparse_kind="block", decode="full", full_kind="block")
    with pytest.raises(OptionError, match="unknown full kind 'half'"):
        CalibrateOptions(full_kind="half")
    settings = CalibrateOptions(full_kind="block", threshold=0.8).with_full_blocks(SparseSettings(window=2048))
    assert (settings.full_kind, settings.block, settings.stride, settings.threshold) == ("block", 128, 16, 0.8)
    assert full_kind.ALLOWED == 0.005
