"""Pass append-turn: the form of the program of a further turn, and turns against recomputing the whole text."""

from __future__ import annotations

import pytest
import torch

from fluxc.ir.graph import Draft, runnable, user_inputs
from fluxc.ir.printer import program_diff
from fluxc.ir.verifier import problems
from fluxc.kernels.schemas import PAGE
from fluxc.passes.append_turn import AppendTurn
from fluxc.signature import APPEND_INPUTS
from fluxc.testing import ToyConfig, toy_inputs

CONFIG = ToyConfig(windows=(0, 0))


@pytest.fixture(scope="module")
def result(toy):
    return AppendTurn().apply(toy(CONFIG))


def test_golden(toy, golden):
    program = toy(ToyConfig(windows=(0,)))
    golden.check("toy", program_diff(program, AppendTurn().apply(program).program))


def test_every_attention_reads_the_cache(result):
    assert (result.count, user_inputs(result.program)) == (2, APPEND_INPUTS)
    assert problems(result.program, "append") == []


def test_turns_equal_recomputation(toy, result):
    """Turns of 1, 40 and 29 tokens, the first on an empty cache."""
    ids, every = toy_inputs(1, 70)[0], torch.arange(70)[None]
    cache = torch.full((4, 2, 1, PAGE, 8), torch.nan)
    table = torch.tensor([[[2, 1]], [[0, 3]]], dtype=torch.int32)
    zeros = torch.zeros(2, 1, dtype=torch.int64)
    parts = []
    for start, end in ((0, 1), (1, 41), (41, 70)):
        at = torch.arange(start, end)
        slots = table[:, 0][:, at // PAGE].long() * PAGE + at % PAGE
        lens = torch.full((2, 1), start, dtype=torch.int32)
        turn = ids[:, start:end], every[:, start:end], every[:, : end - start]
        with torch.no_grad():
            begun = torch.tensor([start])
            parts.append(runnable(result.program)(*turn, cache, slots[:, None], table, lens, begun, zeros, zeros))
    with torch.no_grad():
        expected = runnable(toy(CONFIG))(ids, every, torch.tensor([70]), every)
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-5, atol=1e-6)


def test_verifier_names_a_write_that_comes_early(result):
    draft = Draft(result.program)
    nodes = {node.name: node for node in draft.graph.nodes}
    nodes["append_attention"].prepend(nodes["slots_0"])
    nodes["append_attention"].prepend(nodes["kv_write"])
    assert problems(draft.close(), "append") == ["node kv_write stands on the wrong side of append_attention"]
