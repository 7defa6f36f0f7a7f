"""Pass fuse-swiglu: which products become the op, from merged projections too, and which are left."""

from __future__ import annotations

import pytest
import torch

from fluxc import passes
from fluxc.ir.graph import Draft, calls, runnable
from fluxc.ir.printer import program_diff, program_text
from fluxc.ir.verifier import problems
from fluxc.passes.fuse_swiglu import FuseSwiglu
from fluxc.passes.merge_linears import MergeLinears
from fluxc.testing import ToyConfig, toy_inputs

CONFIG = ToyConfig(windows=(0,))
silu = torch.ops.aten.silu


def _edited(program, edit):
    """The program after `edit` was given its draft, its silu and the product that reads it."""
    draft = Draft(program)
    node = calls(draft.module, silu)[0]
    edit(draft, node, next(iter(node.users)))
    return draft.close()


def _run(program):
    with torch.no_grad():
        return runnable(program)(*toy_inputs())


@pytest.mark.parametrize("merged", [False, True])
def test_golden(toy, golden, merged):
    program = MergeLinears().apply(toy(CONFIG)).program if merged else toy(CONFIG)
    golden.check("merged" if merged else "toy", program_diff(program, FuseSwiglu().apply(program).program))


def test_every_layer_and_the_same_values(toy):
    program = MergeLinears().apply(toy()).program
    before = program_text(program)
    result = FuseSwiglu().apply(program)
    layers = len(calls(program, torch.ops.fluxc.attention))
    assert result.count == layers == len(calls(result.program, torch.ops.fluxc.swiglu))
    assert calls(result.program, silu) == []
    assert FuseSwiglu().apply(result.program).count == 0
    assert program_text(program) == before
    torch.testing.assert_close(_run(result.program), _run(program), rtol=1e-5, atol=2e-6)


def test_either_order(toy):
    def swap(draft, node, product):
        product.args = product.args[::-1]

    assert FuseSwiglu().apply(_edited(toy(CONFIG), swap)).count == 1


def test_silu_that_something_else_reads_is_left(toy):
    def read_again(draft, node, product):
        with draft.inserting_before(product):
            product.args = (node, draft.call(torch.ops.aten.add.Tensor, (product.args[1], node)))

    result = FuseSwiglu().apply(_edited(toy(CONFIG), read_again))
    assert (result.count, [note.reason for note in result.notes]) == (0, ["silu is read elsewhere too"])


def test_factors_of_unlike_shapes_are_left(toy):
    def narrow(draft, node, product):
        with draft.inserting_before(product):
            product.args = (node, draft.call(torch.ops.aten.mean.dim, (product.args[1], [-1], True)))

    result = FuseSwiglu().apply(_edited(toy(CONFIG), narrow))
    assert result.count == 0
    assert "differ in shape or dtype" in result.notes[0].reason


def test_gelu_is_left(toy):
    def swap(draft, node, product):
        with draft.inserting_before(product):
            product.args = (draft.call(torch.ops.aten.gelu.default, node.args[:1]), product.args[1])
        draft.graph.erase_node(node)

    program = _edited(toy(CONFIG), swap)
    result = FuseSwiglu().apply(program)
    assert (result.count, result.program is program) == (0, True)


def test_only_programs_of_the_engine_hold_it(toy, toy_routed):
    captured = FuseSwiglu().apply(toy(CONFIG)).program
    assert "calls fluxc::swiglu, which no captured program has" in problems(captured, "captured")[0]
    for pipeline in (passes.prefill_pipeline, passes.decode_pipeline, passes.append_pipeline):
        made = pipeline(fuse=True).run(toy_routed(CONFIG), "routed").program
        assert len(calls(made, torch.ops.fluxc.swiglu)) == 1
        plain = pipeline().run(toy_routed(CONFIG), "routed").program
        assert calls(plain, torch.ops.fluxc.swiglu) == []
