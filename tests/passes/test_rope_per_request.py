"""Pass rope-per-request: each request of a batch is rotated as it would be alone."""

from __future__ import annotations

import functools

import pytest
import torch

import fluxc
from fluxc.errors import UnsupportedAttentionError
from fluxc.ir.graph import Draft, runnable
from fluxc.ir.printer import program_diff
from fluxc.ir.verifier import problems
from fluxc.passes.rope_per_request import RopePerRequest, rope_limit
from fluxc.testing import TINY_FAMILIES, ToyConfig, tiny_llama_rope

LIMIT = 16


@functools.cache
def captured(family):
    model = TINY_FAMILIES[family]() if family in TINY_FAMILIES else tiny_llama_rope(family)
    return fluxc.capture(model).program


def with_choice(program, *, own_axis):
    """The toy with angles chosen by the largest position; `own_axis`: the factors get a batch axis of 1 first."""
    draft = Draft(program)
    angles = next(node for node in draft.graph.nodes if node.name == "mul")
    with draft.inserting_before(angles):
        largest = draft.call(torch.ops.aten.max.default, (draft.user_input("position_ids"),))
        past = draft.call(torch.ops.aten.ge.Scalar, (largest, LIMIT))
        long = draft.call(torch.ops.aten.mul.Tensor, (angles.args[1], 0.5))
        chosen = draft.call(torch.ops.aten.where.self, (past, long, angles.args[1]))
        if own_axis:
            for axis in (0, 1):
                chosen = draft.call(torch.ops.aten.unsqueeze.default, (chosen, axis))
        angles.args = (angles.args[0], chosen)
    return draft.close()


@pytest.mark.parametrize("own_axis", [False, True], ids=["toy", "own-axis"])
def test_golden(toy, golden, own_axis):
    program = with_choice(toy(ToyConfig(windows=(0,))), own_axis=own_axis)
    changed = RopePerRequest().apply(program).program
    golden.check("own-axis" if own_axis else "toy", program_diff(program, changed))
    assert problems(changed, "captured") == []
    ids, lens, at = torch.tensor([[1, 2, 3]] * 2), torch.full((2,), 3), torch.arange(3).expand(2, 3)
    positions = torch.tensor([[0], [LIMIT]]) + torch.arange(3)
    together = runnable(changed)(ids, positions, lens, at)
    for row in (slice(0, 1), slice(1, 2)):
        alone = runnable(program)(ids[row], positions[row], lens[row], at[row])
        torch.testing.assert_close(together[row], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["longrope", "phi3-longrope"])
def test_rows_on_both_sides_are_what_they_are_alone(family):
    result = RopePerRequest().apply(captured(family))
    assert result.count == 1
    assert problems(result.program, "captured") == []
    ids = torch.randint(97, (3, 4), generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([[3], [LIMIT - 3], [LIMIT - 4]]) + torch.arange(4)
    lens, at = torch.full((3,), 4), torch.arange(4).expand(3, 4)
    with torch.no_grad():
        together = runnable(result.program)(ids, positions, lens, at)
        for row in range(3):
            own = [tensor[row : row + 1] for tensor in (ids, positions, lens, at)]
            torch.testing.assert_close(together[row], runnable(captured(family))(*own)[0], rtol=1e-5, atol=1e-5)
        whole = runnable(captured(family))(ids, positions, lens, at)
    assert (whole[0] - together[0]).abs().max() > 1e-3, "one request past the limit turned the others"


def test_limit():
    assert rope_limit(captured("longrope")) == LIMIT
    assert rope_limit(captured("llama3")) == 0


def test_other_kinds_are_left():
    result = RopePerRequest().apply(captured("llama3"))
    assert (result.count, result.program is captured("llama3")) == (0, True)


def test_lengths_that_reach_the_tokens_are_refused(toy):
    draft = Draft(toy(ToyConfig(windows=(0,))))
    embedding = next(node for node in draft.graph.nodes if node.name == "embedding")
    with draft.inserting_before(embedding.next):
        largest = draft.call(torch.ops.aten.max.default, (draft.user_input("position_ids"),))
        table = draft.call(torch.ops.aten.expand.default, (largest, [2, 8]))
    attention = next(node for node in draft.graph.nodes if node.name == "attention")
    with draft.inserting_before(attention):
        row = draft.call(torch.ops.aten.unsqueeze.default, (table, 1))
        attention.args = (draft.call(torch.ops.aten.add.Tensor, (attention.args[0], row)), *attention.args[1:])
    with pytest.raises(UnsupportedAttentionError, match="cannot be chosen for each request"):
        RopePerRequest().apply(draft.close())
