"""Pass insert-routers: what it adds, what it leaves, and that the routers compute what LayerRouter computes."""

from __future__ import annotations

import pytest
import torch

from fluxc import kernels
from fluxc.ir.graph import calls, runnable, user_inputs
from fluxc.ir.printer import program_diff, program_text
from fluxc.passes.insert_routers import InsertRouters
from fluxc.passes.place import Place
from fluxc.router import LayerRouter, RouterSpec, layer_state, router_state
from fluxc.testing import ToyConfig, toy_inputs

kernels.register()
NAMES = ("input_ids", "position_ids", "seq_lens", "prompt_lens", "logits_at")


@pytest.fixture(scope="module")
def program(toy):
    return toy(ToyConfig(windows=(0, 6, 0)))


def test_golden(toy, golden):
    program = toy(ToyConfig(windows=(0, 6)))
    golden.check("toy", program_diff(program, InsertRouters().apply(program).program))


def test_one_router_for_each_attention_without_a_window(program):
    result = InsertRouters().apply(program)
    assert (result.count, result.modified) == (2, True)
    assert len(calls(result.program, torch.ops.fluxc.router_pool)) == 2
    assert user_inputs(result.program) == NAMES
    assert {name.split(".")[1] for name in router_state(result.program)} == {"0", "2"}
    assert [note.reason for note in result.notes if not note.matched] == ["has a window of its own, 6 tokens"]


def test_routers_lie_on_the_device_of_the_program(program):
    placed = Place("meta").apply(program).program
    result = InsertRouters().apply(placed).program
    assert {tensor.device.type for tensor in result.state_dict.values()} == {"meta"}


def test_input_program_is_unchanged(program):
    before = program_text(program)
    InsertRouters().apply(program)
    assert program_text(program) == before
    assert not router_state(program)


def test_weights_are_shared(program):
    result = InsertRouters().apply(program).program
    assert all(result.state_dict[name] is tensor for name, tensor in program.state_dict.items())


def test_nothing_routable(toy):
    program = toy(ToyConfig(windows=(6,)))
    result = InsertRouters().apply(program)
    assert (result.count, result.modified, result.program is program) == (0, False, True)


def test_second_run_changes_nothing(program):
    once = InsertRouters().apply(program).program
    again = InsertRouters().apply(once)
    assert (again.count, again.notes[0].reason) == (0, "the program already has routers")


@pytest.mark.parametrize("rope", ["half", "transposed"])
def test_scores_are_those_of_the_plain_module(toy, rope):
    program = InsertRouters(pool=5).apply(toy(ToyConfig(windows=(0,), rope=rope))).program
    input_ids, position_ids, seq_lens, logits_at = toy_inputs()
    prompt_lens = seq_lens - 2
    with torch.no_grad():
        _, scores = runnable(program)(input_ids, position_ids, seq_lens, prompt_lens, logits_at)
        hidden = torch.nn.functional.embedding(input_ids, program.state_dict["embed.weight"])
        normed = torch.nn.functional.rms_norm(hidden, (16,), program.state_dict["layers.0.norm_1.weight"], 1e-6)
        q = (normed @ program.state_dict["layers.0.attn.q.weight"].T).unflatten(2, (2, 8))
        router = LayerRouter(RouterSpec(8, 5))
        router.load_state_dict(layer_state(router_state(program), 0))
        ends = [(q[b, :5].mean(0) + q[b, n - 5 : n].mean(0)) / 2 for b, n in enumerate(prompt_lens)]
        expected = router.score(torch.stack(ends).mean(1))
    torch.testing.assert_close(scores, expected[None], rtol=1e-5, atol=1e-5)


def test_q_after_rope_is_used_and_reported(toy):
    result = InsertRouters().apply(toy(ToyConfig(windows=(0,), rope="two-sources")))
    pool = calls(result.program, torch.ops.fluxc.router_pool)[0]
    attention = calls(result.program, torch.ops.fluxc.attention)[0]
    assert pool.args[0] is attention.args[0]
    assert result.notes[0].reason.startswith("the router reads q after RoPE")
