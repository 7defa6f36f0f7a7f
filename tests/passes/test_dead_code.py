"""Pass dead-code: unused calls and weights go, everything else stays."""

from __future__ import annotations

import pytest
import torch

from fluxc.ir.graph import Draft, runnable, user_inputs
from fluxc.ir.printer import program_diff, program_text
from fluxc.passes.dead_code import DeadCode
from fluxc.testing import ToyConfig, toy_inputs


@pytest.fixture(scope="module")
def littered(toy):
    """The toy program with two dead calls, one of them the only user of a new weight."""
    draft = Draft(toy(ToyConfig(windows=(0,))))
    weight = draft.add_parameter("unused.weight", torch.ones(16))
    logits = draft.output.args[0][0]
    embedding = next(node for node in draft.graph.nodes if node.name == "embedding")
    with draft.inserting_before(logits):
        draft.call(torch.ops.aten.cos.default, (draft.call(torch.ops.aten.mul.Tensor, (embedding, weight)),))
    return draft.close()


def test_golden(littered, golden):
    golden.check("toy", program_diff(littered, DeadCode().apply(littered).program))


def test_calls_and_weights_are_counted(littered):
    result = DeadCode().apply(littered)
    assert (result.count, result.modified) == (3, True)
    assert "unused.weight" not in result.program.state_dict
    assert user_inputs(result.program) == user_inputs(littered)


def test_result_is_the_program_without_litter(toy, littered):
    clean = toy(ToyConfig(windows=(0,)))
    result = DeadCode().apply(littered).program
    assert program_text(result) == program_text(clean)
    assert torch.equal(runnable(result)(*toy_inputs()), runnable(clean)(*toy_inputs()))


def test_nothing_dead(toy):
    program = toy(ToyConfig(windows=(0,)))
    result = DeadCode().apply(program)
    assert (result.count, result.modified, result.program is program) == (0, False, True)


def test_input_program_is_unchanged(littered):
    before = program_text(littered)
    DeadCode().apply(littered)
    assert program_text(littered) == before
    assert "unused.weight" in littered.state_dict
