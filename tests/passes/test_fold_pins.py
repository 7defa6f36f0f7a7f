"""Pass fold-pins: pinned layers take their branch whatever the bias says, the others as before."""

from __future__ import annotations

import pytest
import torch

from fluxc.errors import OptionError, PlanError
from fluxc.ir.graph import runnable, user_inputs
from fluxc.ir.printer import program_diff
from fluxc.ir.verifier import problems
from fluxc.passes.fold_pins import FoldPins
from fluxc.signature import ROUTED_INPUTS
from fluxc.testing import ToyConfig

CONFIG = ToyConfig(windows=(0, 6, 0))


def run(program, bias):
    ids = torch.arange(60).remainder(30).reshape(2, 30)
    lens = torch.tensor([30, 30])
    args = (ids, torch.arange(30).repeat(2, 1), lens, lens, bias, torch.tensor([[29], [29]]))
    with torch.no_grad():
        return runnable(program)(*args)


def test_golden(toy_routed, golden):
    program = toy_routed(ToyConfig(windows=(0,)))
    golden.check("toy", program_diff(program, FoldPins({0: "sparse"}).apply(program).program))


@pytest.mark.parametrize(("pins", "routes"), [({0: "full"}, (1, 0)), ({2: "full"}, (0, 1)), ({0: "sparse"}, (0, 0))])
def test_a_pinned_layer_ignores_its_bias(toy_routed, pins, routes):
    whole = toy_routed(CONFIG)
    result = FoldPins(pins).apply(whole)
    assert (result.count, user_inputs(result.program)) == (1, ROUTED_INPUTS)
    assert problems(result.program, "routed") == []
    against = torch.where(torch.tensor(routes).bool(), -torch.inf, torch.inf)[:, None].repeat(1, 2)
    rows = [row for row, layer in enumerate((0, 2)) if layer not in pins]
    against[rows] = -torch.inf
    forced = torch.where(torch.tensor(routes).bool(), torch.inf, -torch.inf)[:, None].repeat(1, 2)
    for found, expected in zip(run(result.program, against), run(whole, forced), strict=True):
        assert torch.equal(found, expected)


def test_nothing_to_fold(toy_routed):
    assert not FoldPins({}).apply(toy_routed(CONFIG)).modified


def test_pins_that_cannot_be(toy_routed):
    with pytest.raises(PlanError, match="layer 1 is pinned and has no router"):
        FoldPins({1: "full"}).apply(toy_routed(CONFIG))
    with pytest.raises(OptionError, match="pinned to 'dense'"):
        FoldPins({0: "dense"}).apply(toy_routed(CONFIG))
