"""Pass merge-linears: which linears become one, close results, and weights that are not there twice."""

from __future__ import annotations

import pytest
import torch

from fluxc.ir.graph import Draft, calls, runnable
from fluxc.ir.printer import program_diff, program_text
from fluxc.ir.verifier import problems
from fluxc.passes.merge_linears import MergeLinears, adjacent, groups_of, joined
from fluxc.testing import TOY_ROPES, ToyConfig, toy_inputs, toy_routed_inputs

CONFIG = ToyConfig(windows=(0, 6, 0), qk_norm=True)


def _with_tensors(program, change):
    """The program over other tensors: `change` edits the draft's state dict."""
    draft = Draft(program)
    change(draft.state_dict)
    return draft.close()


def _side_by_side(program):
    """The program with the weights of each group in one buffer."""

    def change(state):
        for names in groups_of(program):
            whole = torch.cat([state[name].detach() for name in names])
            rows = [state[name].shape[0] for name in names]
            state |= {name: torch.nn.Parameter(part) for name, part in zip(names, whole.split(rows), strict=True)}

    return _with_tensors(program, change)


@pytest.fixture(scope="module")
def result(toy_routed):
    return MergeLinears().apply(toy_routed(CONFIG))


def test_golden(toy, golden):
    program = toy(ToyConfig(windows=(0,)))
    golden.check("toy", program_diff(program, MergeLinears().apply(program).program))


def test_qkv_and_gate_up_become_one_each(toy_routed, result):
    assert result.count == 3 * (3 + 2)
    before = len(calls(toy_routed(CONFIG), torch.ops.aten.linear))
    assert len(calls(result.program, torch.ops.aten.linear)) == before - 3 * (2 + 1)
    assert all(note.matched for note in result.notes)
    assert problems(result.program, "routed") == []
    assert MergeLinears().apply(result.program).count == 0


@pytest.mark.parametrize("rope", TOY_ROPES)
def test_close_to_the_parts(toy, rope):
    """Rounding of one GEMM of another width: a few units in the last place of fp32."""
    program = toy(ToyConfig(rope=rope))
    merged = MergeLinears().apply(program)
    assert merged.count == 2 * 5
    with torch.no_grad():
        mine, expected = runnable(merged.program)(*toy_inputs()), runnable(program)(*toy_inputs())
    torch.testing.assert_close(mine, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("bias", [torch.inf, -torch.inf])
def test_routed_program(toy_routed, result, bias):
    inputs = toy_routed_inputs(2, bias)
    with torch.no_grad():
        mine, expected = runnable(result.program)(*inputs), runnable(toy_routed(CONFIG))(*inputs)
    assert torch.equal(mine[1], expected[1])
    torch.testing.assert_close((mine[0], mine[2]), (expected[0], expected[2]), rtol=1e-5, atol=2e-6)


def test_weights_are_there_once(toy_routed, result):
    own, before = result.program.state_dict, toy_routed(CONFIG).state_dict
    assert sum(t.numel() for t in own.values()) == sum(t.numel() for t in before.values())
    assert own["layers.0.attn.q_and_k_and_v.weight"].shape == (16 + 8 + 8, 16)
    assert not any(name.startswith("layers.0.attn.q.") for name in own)
    assert own["layers.0.down.weight"] is before["layers.0.down.weight"]


def test_neighbours_are_merged_by_a_view(toy):
    program = _side_by_side(toy(CONFIG))
    merged = MergeLinears(copy=False).apply(program).program
    whole = merged.state_dict["layers.1.gate_and_up.weight"]
    first = program.state_dict["layers.1.gate.weight"]
    assert whole.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
    assert torch.equal(whole[:32], first)
    with torch.no_grad():
        expected = runnable(MergeLinears().apply(toy(CONFIG)).program)(*toy_inputs())
        assert torch.equal(runnable(merged)(*toy_inputs()), expected)


def test_weights_that_lie_apart_can_be_left(toy):
    result = MergeLinears(copy=False).apply(toy(CONFIG))
    assert (result.count, result.program is toy(CONFIG)) == (0, True)
    assert {note.reason for note in result.notes} == {"the weights lie apart"}


def test_tied_weights_are_left(toy):
    def tie(state):
        state["layers.0.gate.weight"] = state["layers.2.gate.weight"]

    result = MergeLinears().apply(_with_tensors(toy(CONFIG), tie))
    assert result.count == 3 * 5 - 2 * 2
    assert [note.reason for note in result.notes if not note.matched] == ["a weight is used elsewhere too"] * 2


def test_ops_that_need_whole_rows_keep_their_linears_apart(toy):
    draft = Draft(toy(ToyConfig(windows=(0,))))
    silu = next(node for node in draft.graph.nodes if node.name == "silu")
    with draft.inserting_before(silu):
        flat = draft.call(torch.ops.aten.view.default, (silu.args[0], [-1]))
        back = draft.call(torch.ops.aten.view_as.default, (flat, silu.args[0]))
    silu.args = (back,)
    program = draft.close()
    result = MergeLinears().apply(program)
    assert result.count == 3
    (note,) = [note for note in result.notes if not note.matched]
    assert "a later op cannot take a part of the result" in note.reason
    values = {node.name: str(node.meta["val"]) for node in program.graph.nodes if "val" in node.meta}
    kept = [node for node in result.program.graph.nodes if node.name in ("view_3", "silu", "mul_5", "linear_6")]
    assert all(str(node.meta["val"]) == values[node.name] for node in kept)


def test_given_program_is_unchanged(toy_routed):
    before = program_text(toy_routed(CONFIG))
    MergeLinears().apply(toy_routed(CONFIG))
    assert program_text(toy_routed(CONFIG)) == before


def test_neighbours():
    whole = torch.arange(12.0).view(6, 2)
    parts = list(whole.split([1, 3, 2]))
    assert adjacent(parts)
    assert joined(parts).data_ptr() == whole.data_ptr()
    assert not adjacent(parts[::-1])
    assert torch.equal(joined(parts[::-1]), torch.cat(parts[::-1]))
    assert not adjacent([whole[:3, :1], whole[3:, :1]])
    assert not adjacent([torch.ones(1, 2), torch.ones(1, 2)])
