"""Pass drop-routers: the captured program comes back, node for node and over the same weights."""

from __future__ import annotations

import pytest
import torch

from fluxc.ir.graph import runnable, user_inputs
from fluxc.ir.printer import program_diff, program_text
from fluxc.ir.verifier import problems
from fluxc.passes.drop_routers import DropRouters
from fluxc.signature import CAPTURED_INPUTS
from fluxc.testing import ToyConfig, toy_inputs

CONFIG = ToyConfig(windows=(0, 6, 0), softcap=3.0)


@pytest.fixture(scope="module")
def result(toy_routed):
    return DropRouters().apply(toy_routed(CONFIG))


def test_golden(toy_routed, golden):
    program = toy_routed(ToyConfig(windows=(0,)))
    golden.check("toy", program_diff(program, DropRouters().apply(program).program))


def test_captured_program_comes_back(toy, result):
    captured = toy(CONFIG)
    assert (result.count, user_inputs(result.program)) == (2, CAPTURED_INPUTS)
    assert program_text(result.program) == program_text(captured)
    assert problems(result.program, "captured") == []
    assert set(result.program.state_dict) == set(captured.state_dict)
    assert all(result.program.state_dict[name] is tensor for name, tensor in captured.state_dict.items())


def test_bit_for_bit(toy, result):
    with torch.no_grad():
        assert torch.equal(runnable(result.program)(*toy_inputs()), runnable(toy(CONFIG))(*toy_inputs()))


def test_given_program_is_unchanged(toy_routed):
    program = toy_routed(CONFIG)
    before = program_text(program)
    DropRouters().apply(program)
    assert program_text(program) == before
    assert problems(program, "routed") == []


def test_program_without_routers_is_left(toy):
    result = DropRouters().apply(toy(CONFIG))
    assert (result.count, result.program is toy(CONFIG)) == (0, True)
