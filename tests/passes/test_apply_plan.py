"""Pass apply-plan: settings of the named layers change, nothing else."""

from __future__ import annotations

import pytest
import torch

from fluxc.errors import OptionError, PlanError
from fluxc.ir.graph import calls, runnable
from fluxc.ir.printer import program_diff, program_text
from fluxc.ir.sparse import SparseSettings
from fluxc.passes.apply_plan import ApplyPlan, settings_of
from fluxc.testing import ToyConfig, toy_routed_inputs

TRIANGLE = SparseSettings("triangle", sink=1, window=3, last=2, decode_full=True)


@pytest.fixture(scope="module")
def program(toy_routed):
    return toy_routed(ToyConfig(windows=(0, 6, 0)))


def _settings(program):
    return [settings_of(node) for node in calls(program, torch.ops.fluxc.routed_attention)]


def test_golden(program, golden):
    golden.check("toy", program_diff(program, ApplyPlan({2: TRIANGLE}).apply(program).program))


def test_named_layers_change(program):
    result = ApplyPlan({2: TRIANGLE}).apply(program)
    assert (result.count, result.modified) == (1, True)
    assert _settings(result.program) == [SparseSettings(sink=2, window=4), TRIANGLE]


def test_settings_in_place_do_not_count(program):
    result = ApplyPlan({0: SparseSettings(sink=2, window=4)}).apply(program)
    assert (result.count, result.program is program) == (0, True)
    assert ApplyPlan().apply(program).count == 0


def test_sparse_branch_follows_the_settings(program):
    inputs = toy_routed_inputs(2, -torch.inf)
    wide = SparseSettings(sink=0, window=10_000)
    with torch.no_grad():
        result = runnable(ApplyPlan({0: wide, 2: wide}).apply(program).program)(*inputs)
        sparse, full = runnable(program)(*inputs), runnable(program)(*toy_routed_inputs(2, torch.inf))
    torch.testing.assert_close(result[0], full[0], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(result[0], sparse[0], rtol=1e-5, atol=1e-5)
    assert not result[1].any()


def test_a_full_kind_comes_and_goes(program):
    blocks = SparseSettings(sink=2, window=4, block=16, stride=4, threshold=0.5, full_kind="block")
    changed = ApplyPlan({0: blocks}).apply(program).program
    assert _settings(changed) == [blocks, SparseSettings(sink=2, window=4)]
    back = ApplyPlan({0: SparseSettings(sink=2, window=4)}).apply(changed)
    assert (back.count, program_text(back.program)) == (1, program_text(program))
    with torch.no_grad():
        dense, by_blocks = (runnable(x)(*toy_routed_inputs(2, torch.inf, length=70)) for x in (program, changed))
    assert by_blocks[1].all()
    assert not torch.allclose(dense[0], by_blocks[0], rtol=1e-5, atol=1e-5)


def test_input_program_is_unchanged(program):
    before = program_text(program)
    ApplyPlan({0: TRIANGLE, 2: TRIANGLE}).apply(program)
    assert program_text(program) == before


def test_layer_that_is_not_routed_is_refused(program):
    with pytest.raises(PlanError, match=r"layer 1, which is not routed.*Routed layers are 0, 2"):
        ApplyPlan({1: TRIANGLE}).apply(program)


@pytest.mark.parametrize(
    ("values", "message"),
    [({"kind": "dense"}, "'dense' is unknown"), ({"window": 0}, "window 0"), ({"last": 4}, "streaming has no dense")],
)
def test_settings_are_checked(values, message):
    with pytest.raises(OptionError, match=message):
        SparseSettings(**values)
