"""Pass soften-conditionals: exact at both ends, hard routing as tau falls, gradients in the routers alone."""

from __future__ import annotations

import pytest
import torch

from fluxc.errors import VerifierError
from fluxc.ir.graph import Draft, calls, is_call, runnable, user_inputs
from fluxc.ir.printer import program_diff, program_text
from fluxc.ir.sparse import SparseSettings
from fluxc.ir.verifier import verify
from fluxc.passes import soften_pipeline
from fluxc.passes.apply_plan import ApplyPlan
from fluxc.passes.insert_routers import InsertRouters
from fluxc.passes.outline_layers import OutlineLayers
from fluxc.passes.route_attention import RouteAttention
from fluxc.passes.set_dtype import SetDtype
from fluxc.passes.soften_conditionals import SoftenConditionals
from fluxc.signature import SOFTENED_INPUTS
from fluxc.testing import ToyConfig, toy_inputs, toy_routed_inputs

CONFIG = ToyConfig(windows=(0, 6, 0), qk_norm=True)


def soft_inputs(bias, noise=0.0, tau=1.0, batch=2, length=24):
    *first, last = toy_routed_inputs(2, bias, batch, length)
    return *first, torch.as_tensor(noise).expand(2, batch).contiguous(), torch.tensor(tau), last


def soften(program, **options):
    return SoftenConditionals(**options).apply(program).program


@pytest.fixture(scope="module")
def routed(toy_routed):
    return toy_routed(CONFIG)


@pytest.fixture(scope="module")
def soft(routed):
    return soften_pipeline().run(routed, "routed").program


def test_golden(toy_routed, golden):
    program = toy_routed(ToyConfig(windows=(0, 6)))
    golden.check("toy", program_diff(program, soften(program)))
    golden.check("straight_through", program_diff(soften(program), soften(program, straight_through=True)))


def test_count_and_signature(routed, toy):
    result = SoftenConditionals().apply(routed)
    assert (result.count, result.modified) == (2, True)
    assert user_inputs(result.program) == SOFTENED_INPUTS
    assert calls(result.program, torch.ops.fluxc.routed_attention) == []
    left = SoftenConditionals().apply(toy(CONFIG))
    assert (left.count, left.notes[0].reason) == (0, "the program has no routed attention")


@pytest.mark.parametrize("straight_through", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_weight_one_is_bit_equal_to_dense(toy, routed, straight_through, batch):
    soft = soften(routed, straight_through=straight_through)
    with torch.no_grad():
        logits, weights, _ = runnable(soft)(*soft_inputs(torch.inf, 3.0, 0.7, batch, 37))
        assert torch.equal(logits, runnable(toy(CONFIG))(*toy_inputs(batch, 37)))
    assert (weights == 1).all()


def test_weight_one_is_bit_equal_to_dense_in_bf16(toy):
    captured = SetDtype("bfloat16").apply(toy(CONFIG)).program
    program = RouteAttention(SparseSettings(sink=2, window=4)).apply(InsertRouters().apply(captured).program).program
    soft = soften(program)
    verify(soft, "softened")
    with torch.no_grad():
        logits, _, scores = runnable(soft)(*soft_inputs(torch.inf))
        assert logits.dtype == torch.bfloat16
        assert scores.dtype == torch.float32
        assert torch.equal(logits, runnable(captured)(*toy_inputs()))


@pytest.mark.parametrize(
    "settings",
    [
        SparseSettings(sink=2, window=4),
        SparseSettings("triangle", 2, 4, 3),
        SparseSettings(sink=2, window=4, decode_full=True),
    ],
)
def test_tau_to_zero_is_hard_routing(routed, settings):
    program = ApplyPlan({0: settings, 2: settings}).apply(routed).program
    with torch.no_grad():
        scores = runnable(program)(*toy_routed_inputs(2, torch.inf))[2]
        inputs = list(toy_routed_inputs(2, 0.0))
        inputs[4] = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]) - scores
        logits, routes, _ = runnable(program)(*inputs)
        mixed, weights, _ = runnable(soften(program))(*inputs[:5], torch.zeros(2, 2), torch.tensor(1e-6), inputs[5])
    assert routes.any()
    assert not routes.all()
    assert torch.equal(weights, routes.float())
    torch.testing.assert_close(mixed, logits, rtol=1e-6, atol=1e-6)


def test_weight_is_the_papers(soft):
    """softmax over both logits with two Gumbel variables, as METHOD section 1 writes it."""
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(2, 2, 2, generator=generator)
    gumbel = -(-uniform.log()).log()
    with torch.no_grad():
        _, weights, scores = runnable(soft)(*soft_inputs(0.0, gumbel[0] - gumbel[1], 0.7))
    logits = torch.stack([scores, torch.zeros_like(scores)])
    torch.testing.assert_close(weights, torch.softmax((logits + gumbel) / 0.7, 0)[0])


def test_straight_through_has_hard_values_and_soft_gradients(routed, soft):
    hard = soften(routed, straight_through=True)
    # Where the soft weight stands at the hard one's value, gradients of both are those of the sigmoid alone.
    inputs = soft_inputs(-4.0, 1.0, 2.0)
    weights = {name: runnable(program)(*inputs)[1] for name, program in (("soft", soft), ("hard", hard))}
    assert set(weights["hard"].flatten().tolist()) <= {0.0, 1.0}
    grads = []
    for name, program in (("soft", soft), ("hard", hard)):
        parameter = program.state_dict["routers.0.head.4.bias"]
        grads.append(torch.autograd.grad(weights[name][0].sum(), parameter)[0])
    torch.testing.assert_close(*grads)
    assert grads[0].abs().sum() > 0


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_routers_alone(soft, checkpointing):
    outlined = OutlineLayers().apply(soft)
    outlined.checkpointing = checkpointing
    outlined(*soft_inputs(-4.0, 0.5, 1.0))[0].square().sum().backward()
    names = outlined.parameter_names()
    trained = {names[name] for name, p in outlined.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained
    assert all(name.startswith("routers.") for name in trained)
    assert {name.split(".")[1] for name in trained} == {"0", "2"}
    for parameter in outlined.parameters():
        parameter.grad = None


def test_checkpointing_gives_the_same_gradients(soft):
    found = []
    for checkpointing in (False, True):
        outlined = OutlineLayers().apply(soft)
        outlined.checkpointing = checkpointing
        live = [p for p in outlined.parameters() if p.requires_grad]
        found.append(torch.autograd.grad(outlined(*soft_inputs(-4.0, 0.5))[0].square().sum(), live))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("has_paths", [True, False])
def test_outlined_bit_for_bit(soft, has_paths):
    program = soft
    if not has_paths:
        draft = Draft(soft)
        for node in draft.graph.nodes:
            node.meta.pop("nn_module_stack", None)
        program = draft.close()
    outlined = OutlineLayers().apply(program)
    assert len(outlined.layers) == 3
    inputs = soft_inputs(-4.0, 0.5, batch=3, length=29)
    with torch.no_grad():
        for mine, expected in zip(outlined(*inputs), runnable(soft)(*inputs), strict=True):
            assert torch.equal(mine, expected)


def test_routers_are_copies_and_the_rest_is_shared(routed, soft):
    for name, tensor in routed.state_dict.items():
        mine = soft.state_dict[name]
        assert (mine.data_ptr() == tensor.data_ptr()) != name.startswith("routers.")
        assert mine.requires_grad == name.startswith("routers.")


def test_input_program_is_unchanged(routed):
    before, grads = program_text(routed), {n: t.requires_grad for n, t in routed.state_dict.items()}
    soften(routed)
    assert program_text(routed) == before
    assert {n: t.requires_grad for n, t in routed.state_dict.items()} == grads


def test_verifier_finds_a_wrong_mix(soft):
    first, second = [node for node in soft.graph.nodes if is_call(node, torch.ops.aten.rsub)]
    first_args, second_args = first.args, second.args
    try:
        first.args = (second_args[0], 1)
        with pytest.raises(VerifierError, match="are not mixed by weight"):
            verify(soft, "softened")
    finally:
        first.args, second.args = first_args, second_args
    verify(soft, "softened")
