"""Pass split-phases: the pieces compute the program bit for bit and keep no value longer than it is needed."""

from __future__ import annotations

import weakref

import pytest
import torch

from fluxc.errors import InternalError
from fluxc.ir.graph import calls, runnable
from fluxc.ir.phases import PrefillRun
from fluxc.ir.printer import module_text
from fluxc.passes.expose_kv import ExposeKV
from fluxc.passes.merge_linears import MergeLinears
from fluxc.passes.split_phases import SplitPhases
from fluxc.testing import ToyConfig, toy_inputs, toy_routed_inputs

CONFIG = ToyConfig(windows=(0, 6, 0))


@pytest.fixture(scope="module")
def program(toy_routed):
    return ExposeKV().apply(toy_routed(CONFIG)).program


@pytest.fixture(scope="module")
def phases(program):
    return SplitPhases().apply(program)


def _run(phases, inputs):
    """Outputs in order, and (k, v) of each layer."""
    run = PrefillRun(phases, dict(zip(phases.inputs, inputs, strict=True)))
    kv = []
    with torch.no_grad():
        run.step(phases.prologue)
        for layer in phases.layers:
            run.step(layer.before)
            kept = run.step(layer.attend, (layer.k, layer.v))
            kv += [kept[layer.k], kept[layer.v]]
            run.step(layer.after)
        return [*run.step(phases.epilogue, phases.outputs).values(), *kv]


def test_golden(phases, program, golden):
    layer = phases.layers[0]
    named = {"prologue": phases.prologue, "before": layer.before, "attend": layer.attend, "after": layer.after}
    named["epilogue"] = phases.epilogue
    texts = [module_text(piece.module, name, program) for name, piece in named.items()]
    golden.check("toy", "\n".join(texts))


@pytest.mark.parametrize("bias", [torch.inf, -torch.inf, 0.0])
def test_routed_bit_for_bit(program, phases, bias):
    inputs = toy_routed_inputs(2, bias, batch=1, length=29)
    with torch.no_grad():
        expected = runnable(program)(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(_run(phases, inputs), expected, strict=True))


def test_dense_bit_for_bit(toy):
    program = ExposeKV().apply(toy(CONFIG)).program
    with torch.no_grad():
        expected = runnable(program)(*toy_inputs(batch=1))
    mine = _run(SplitPhases().apply(program), toy_inputs(batch=1))
    assert all(torch.equal(a, b) for a, b in zip(mine, expected, strict=True))


def test_attend_is_the_attention_alone(phases):
    for layer in phases.layers:
        (call,) = [node for node in layer.attend.module.graph.nodes if node.op == "call_function"]
        assert call.target._opname in ("attention", "routed_attention")
        assert {layer.k, layer.v} <= set(layer.attend.enters)
    assert [bool(layer.route) for layer in phases.layers] == [True, False, True]


def test_weights_are_the_programs_own(program, phases):
    own = {tensor.data_ptr() for tensor in program.state_dict.values()}
    held = [tensor for piece in phases.pieces() for tensor in piece.module.parameters()]
    assert {tensor.data_ptr() for tensor in held} == own


def test_keys_and_values_go_with_their_holder(phases):
    run = PrefillRun(phases, dict(zip(phases.inputs, toy_routed_inputs(2, 0.0, batch=1), strict=True)))
    layer = phases.layers[0]
    with torch.no_grad():
        run.step(phases.prologue)
        run.step(layer.before)
        kept = run.step(layer.attend, (layer.k, layer.v))
        watched = [weakref.ref(kept[layer.k]), weakref.ref(kept[layer.v])]
        del kept
        assert [ref() for ref in watched] == [None, None]
        run.step(layer.after)


def test_merged_program(toy_routed):
    program = ExposeKV().apply(MergeLinears().apply(toy_routed(CONFIG)).program).program
    inputs = toy_routed_inputs(2, 0.0, batch=1)
    with torch.no_grad():
        expected = runnable(program)(*inputs)
    phases = SplitPhases().apply(program)
    assert all(torch.equal(a, b) for a, b in zip(_run(phases, inputs), expected, strict=True))
    assert len(calls(phases.layers[0].before.module, torch.ops.aten.linear)) == 1 + 5


def test_program_without_attention_is_refused():
    program = torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),))
    with pytest.raises(InternalError, match="no attention"):
        SplitPhases().apply(program)
