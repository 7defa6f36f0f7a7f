"""Pass outline-layers: parts that compute the program bit for bit, shared weights, running from a layer on."""

from __future__ import annotations

import pytest
import torch

from fluxc.errors import InternalError
from fluxc.ir.graph import Draft, is_call, runnable
from fluxc.ir.layers import layer_stages
from fluxc.ir.printer import module_text, program_text
from fluxc.passes.lower_to_cond import LowerToCond
from fluxc.passes.outline_layers import OutlineLayers
from fluxc.testing import ToyConfig, toy_inputs, toy_routed_inputs

CONFIG = ToyConfig(windows=(0, 6, 0))


def _without_paths(program):
    draft = Draft(program)
    for node in draft.graph.nodes:
        node.meta.pop("nn_module_stack", None)
    return draft.close()


@pytest.fixture(scope="module")
def program(toy_routed):
    return toy_routed(CONFIG)


@pytest.fixture(scope="module")
def outlined(program):
    return OutlineLayers().apply(program)


def test_golden(program, outlined, golden):
    layer = module_text(outlined.layers[0], "layer_0", program).splitlines()
    whole = [module_text(outlined.prologue, "prologue", program)]
    whole.append("\n".join([*layer[:4], "  ...", *layer[-2:], ""]))
    whole.append(module_text(outlined.epilogue, "epilogue", program))
    golden.check("toy", "\n".join(whole))


@pytest.mark.parametrize("has_paths", [True, False])
@pytest.mark.parametrize("bias", [torch.inf, -torch.inf])
def test_routed_program_bit_for_bit(program, has_paths, bias):
    outlined = OutlineLayers().apply(program if has_paths else _without_paths(program))
    inputs = toy_routed_inputs(2, bias, batch=3, length=29)
    with torch.no_grad():
        for mine, expected in zip(outlined(*inputs), runnable(program)(*inputs), strict=True):
            assert torch.equal(mine, expected)


def test_captured_program_bit_for_bit(toy):
    program = toy(CONFIG)
    with torch.no_grad():
        assert torch.equal(OutlineLayers().apply(program)(*toy_inputs()), runnable(program)(*toy_inputs()))


def test_lowered_program_bit_for_bit(program):
    lowered = LowerToCond().apply(program).program
    inputs = toy_routed_inputs(2, torch.tensor([torch.inf, -torch.inf]), batch=1)
    with torch.no_grad():
        mine, expected = OutlineLayers().apply(lowered)(*inputs), runnable(lowered)(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(mine, expected, strict=True))


@pytest.mark.parametrize("config", [CONFIG, ToyConfig(windows=(0,))])
def test_layers_are_the_same_without_module_paths(toy_routed, config):
    program, bare = toy_routed(config), _without_paths(toy_routed(config))
    by_path = {node.name: stage for node, stage in layer_stages(program.graph).items() if "sym_size" not in node.name}
    by_flow = {node.name: stage for node, stage in layer_stages(bare.graph).items() if "sym_size" not in node.name}
    assert by_flow == by_path


def test_one_attention_a_layer(outlined):
    for layer in outlined.layers:
        ops = (torch.ops.fluxc.attention, torch.ops.fluxc.routed_attention)
        assert sum(is_call(node, op) for node in layer.graph.nodes for op in ops) == 1
    assert [interface.layer for interface in outlined.interfaces] == [0, 1, 2]


def test_interface_names_the_streams(outlined):
    first, windowed, last = outlined.interfaces
    assert first.enters == ("embedding", "unsqueeze_1", "unsqueeze_2", "prompt_lens", "route_bias")
    assert (first.route, first.score) == ("route", "score")
    assert set(first.leaves) == {*first.hidden, "route", "score"}
    assert (windowed.route, windowed.score) == ("", "")
    assert first.hidden[0] in windowed.enters
    assert windowed.hidden[0] in last.enters
    assert len(first.hidden) == len(last.hidden) == 1


def test_weights_are_the_programs_own(program, outlined):
    own = dict(outlined.named_parameters(remove_duplicate=False)) | dict(outlined.named_buffers())
    held = {**program.constants, **program.state_dict}
    names = outlined.parameter_names()
    assert set(names) == set(own)
    assert all(own[mine] is held[theirs] for mine, theirs in names.items())
    assert set(names.values()) == set(held)
    assert names["layers.2.attn.q.weight"] == "layers.2.attn.q.weight"
    assert names["layers.2.router.head.0.bias"] == "routers.2.head.0.bias"


def test_input_program_is_unchanged(program):
    before = program_text(program)
    OutlineLayers().apply(program)
    assert program_text(program) == before


def test_running_again_from_a_layer(outlined, program):
    first = list(toy_routed_inputs(2, torch.inf))
    second = toy_routed_inputs(2, torch.tensor([torch.inf, -torch.inf]))
    with torch.no_grad():
        state = outlined.advance(outlined.start(*first), 2)
        kept = outlined.finish(state)
        changed = outlined.finish(outlined.with_inputs(state, route_bias=second[4]))
        for mine, expected in zip(changed, runnable(program)(*second), strict=True):
            assert torch.equal(mine, expected)
        assert torch.equal(kept[0], runnable(program)(*first)[0])
        assert not torch.equal(kept[0], changed[0])


def test_inputs_that_were_read_cannot_change(outlined):
    inputs = toy_routed_inputs(2, torch.inf)
    with torch.no_grad():
        state = outlined.advance(outlined.start(*inputs), 1)
        assert outlined.with_inputs(state, logits_at=inputs[5][:, :1])["logits_at"].shape == (2, 1)
        with pytest.raises(InternalError, match="'prompt_lens' cannot change before layer 1"):
            outlined.with_inputs(state, prompt_lens=inputs[3])
        with pytest.raises(InternalError, match="from layer 1 to layer 0"):
            outlined.advance(state, 0)


def test_values_nobody_needs_are_dropped(outlined):
    with torch.no_grad():
        states = [outlined.start(*toy_routed_inputs(2, 0.0))]
        for layer in (1, 2, 3):
            states.append(outlined.advance(states[-1], layer))
    assert "embedding" in states[0].values
    assert "embedding" not in states[1].values
    assert set(states[3].values) <= {*outlined.interfaces[2].leaves, "route", "score"}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_weights(program, checkpointing):
    outlined = OutlineLayers().apply(program)
    outlined.checkpointing = checkpointing
    calls = []
    outlined.layers[1].register_forward_pre_hook(lambda *_: calls.append(1))
    weight = outlined.layers[0].attn.q.weight
    loss = outlined(*toy_routed_inputs(2, torch.inf))[0].square().sum()
    (mine,) = torch.autograd.grad(loss, weight)
    (expected,) = torch.autograd.grad(
        runnable(program)(*toy_routed_inputs(2, torch.inf))[0].square().sum(),
        program.state_dict["layers.0.attn.q.weight"],
    )
    torch.testing.assert_close(mine, expected)
    assert len(calls) == 1 + checkpointing


def test_program_without_attention_is_refused():
    program = torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),))
    with pytest.raises(InternalError, match="no attention"):
        OutlineLayers().apply(program)
