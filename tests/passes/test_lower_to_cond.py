"""Pass lower-to-cond: the same results from `torch.cond`, one request only, and a file that can be loaded again."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fluxc.archive import load_program, save_program
from fluxc.errors import PlanError
from fluxc.ir.graph import Draft, argument, calls, runnable
from fluxc.ir.printer import program_text
from fluxc.ir.sparse import SparseSettings
from fluxc.passes.apply_plan import ApplyPlan
from fluxc.passes.lower_to_cond import LowerToCond
from fluxc.testing import ToyConfig, toy_routed_inputs

CONFIG = ToyConfig(windows=(0, 6, 0), softcap=30.0)
TRIANGLE = SparseSettings("triangle", sink=1, window=3, last=2)
STREAMING_THEN_ALL = SparseSettings(sink=1, window=3, decode_full=True)


@pytest.fixture(scope="module")
def routed(toy_routed):
    return ApplyPlan({2: TRIANGLE}).apply(toy_routed(CONFIG)).program


@pytest.fixture(scope="module")
def lowered(routed):
    return LowerToCond().apply(routed).program


def _run(program, *inputs):
    with torch.no_grad():
        return runnable(program)(*inputs)


def test_golden(lowered, golden):
    lines = program_text(lowered).splitlines()
    first, last = (next(i for i, line in enumerate(lines) if f"%{name} " in line) for name in ("route", "routed"))
    golden.check("streaming", "\n".join([lines[0], *lines[first : last + 1]]))
    first, last = (next(i for i, line in enumerate(lines) if f"%{name} " in line) for name in ("route_1", "routed_1"))
    golden.check("triangle", "\n".join(lines[first : last + 1]))


def test_each_routed_attention_becomes_a_cond(routed):
    result = LowerToCond().apply(routed)
    assert (result.count, result.modified) == (2, True)
    assert len(calls(result.program, torch.ops.higher_order.cond)) == 2
    assert not calls(result.program, torch.ops.fluxc.routed_attention)
    assert len(calls(result.program, torch.ops.fluxc.attention)) == 3


def test_program_without_routed_attention_is_left(toy):
    program = toy(CONFIG)
    result = LowerToCond().apply(program)
    assert (result.count, result.program is program) == (0, True)


def test_input_program_is_unchanged(routed):
    before, example = program_text(routed), toy_routed_inputs(2, 0.0, batch=2)
    expected = _run(routed, *example)[0]
    LowerToCond().apply(routed)
    assert program_text(routed) == before
    assert torch.equal(_run(routed, *example)[0], expected)


@pytest.mark.parametrize("length", [1, 7, 24])
@pytest.mark.parametrize("routes", [(True, True), (True, False), (False, True), (False, False)])
def test_results_are_those_of_the_routed_program(routed, lowered, routes, length):
    bias = torch.tensor([torch.inf if full else -torch.inf for full in routes])
    inputs = toy_routed_inputs(2, bias, batch=1, length=length)
    for mine, expected in zip(_run(lowered, *inputs), _run(routed, *inputs), strict=True):
        assert torch.equal(mine, expected)
        assert mine.stride() == expected.stride()


def test_dense_rows_after_the_prompt(toy_routed):
    routed = ApplyPlan({0: STREAMING_THEN_ALL}).apply(toy_routed(ToyConfig(windows=(0,)))).program
    lowered = LowerToCond().apply(routed).program
    assert len(calls(lowered, torch.ops.fluxc.triangle_attention)) == 1
    inputs = toy_routed_inputs(1, -torch.inf, batch=1)
    assert torch.equal(_run(lowered, *inputs)[0], _run(routed, *inputs)[0])


def test_batch_is_fixed_to_one(lowered):
    assert program_text(lowered).startswith("program(input_ids: i64[1,S], position_ids: i64[1,S], seq_lens: i64[1]")
    with pytest.raises(RuntimeError, match="equal to 1, but got 2"):
        _run(lowered, *toy_routed_inputs(2, 0.0, batch=2))


def test_batch_fails_even_without_input_checks(lowered):
    take_full = next(node for node in lowered.graph.nodes if node.name == "take_full")
    with pytest.raises(RuntimeError, match="invalid for input of size 2"):
        take_full.target(torch.tensor([True, True]), *take_full.args[1:])


def test_save_and_load(lowered, tmp_path):
    save_program(lowered, tmp_path / "lowered.pt", extra={})
    again, _ = load_program(tmp_path / "lowered.pt")
    assert program_text(again) == program_text(lowered)
    inputs = toy_routed_inputs(2, torch.tensor([torch.inf, -torch.inf]), batch=1, length=11)
    for mine, theirs in zip(_run(lowered, *inputs), _run(again, *inputs), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.slow
def test_aot_inductor_takes_the_program(lowered, tmp_path):
    program = Draft(lowered).close()
    program.example_inputs = (toy_routed_inputs(2, 0.0, batch=1), {})
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "engine.pt2"))
    compiled = torch._inductor.aoti_load_package(path)
    for length in (1, 2, 50):
        for bias in (torch.inf, -torch.inf):
            inputs = toy_routed_inputs(2, bias, batch=1, length=length)
            with torch.no_grad():
                mine, expected = compiled(*inputs), _run(lowered, *inputs)
            for got, want in zip(mine, expected, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_keys_that_are_values_are_passed_once(toy_routed):
    draft = Draft(toy_routed(ToyConfig(windows=(0,), rope="none")))
    node = next(n for n in draft.graph.nodes if n.name == "routed_attention")
    node.args = (node.args[0], node.args[1], node.args[1], *node.args[3:])
    routed = draft.close()
    lowered = LowerToCond().apply(routed).program
    cond = calls(lowered, torch.ops.higher_order.cond)[0]
    assert len(cond.args[3]) == 2
    inputs = toy_routed_inputs(1, -torch.inf, batch=1)
    assert torch.equal(_run(lowered, *inputs)[0], _run(routed, *inputs)[0])


@pytest.mark.parametrize("which", ["sparse", "full"])
def test_the_kind_block_is_refused_with_the_layer(toy_routed, which):
    blocks = SparseSettings("block", 2, 4, 0, True, 16, 4, 0.9)
    if which == "full":
        blocks = dataclasses.replace(blocks, kind="streaming", full_kind="block")
    routed = toy_routed()
    layer = argument(calls(routed, torch.ops.fluxc.routed_attention)[0], "layer")
    program = ApplyPlan({layer: blocks}).apply(routed).program
    with pytest.raises(PlanError, match=f"layer {layer} has the {which} kind block"):
        LowerToCond().apply(program)
