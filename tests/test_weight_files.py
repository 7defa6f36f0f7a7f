"""Weights that are merged into one GEMM lie side by side in a model.flux directory, and on the device it is read to."""

from __future__ import annotations

import pytest
import torch

from fluxc.artifact import write_flux
from fluxc.ir.graph import runnable
from fluxc.model_info import ModelInfo
from fluxc.passes.merge_linears import MergeLinears, adjacent, groups_of
from fluxc.testing import toy_program, toy_routed_inputs
from fluxc.toy_flux import META, TOY, flat_plan, toy_routed
from fluxc.weight_files import in_groups, pack, weights_digest


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    captured = toy_program(TOY)
    plan = flat_plan(ModelInfo.of(captured, META, weights_digest(captured.state_dict)))
    return write_flux(tmp_path_factory.mktemp("made") / "model.flux", captured, toy_routed(captured), plan, META)


def test_a_directory_s_weights_are_merged_without_a_copy(flux):
    program = flux.load("routed")
    result = MergeLinears(copy=False).apply(program)
    assert result.count == 3 * 5
    mapped = {tensor.untyped_storage().data_ptr() for tensor in flux.weights.values()}
    merged = [tensor for name, tensor in result.program.state_dict.items() if "_and_" in name]
    assert len(merged) == 3 * 2
    assert {tensor.untyped_storage().data_ptr() for tensor in merged} <= mapped
    inputs = toy_routed_inputs(2, 0.0)
    with torch.no_grad():
        mine, expected = runnable(result.program)(*inputs), runnable(program)(*inputs)
    torch.testing.assert_close(mine[0], expected[0], rtol=1e-5, atol=2e-6)


def test_programs_find_the_groups_before_and_after_they_have_weights(flux):
    program = flux.load("routed")
    assert groups_of(program) == groups_of(toy_routed(toy_program(TOY)))
    assert groups_of(program)[0] == [f"layers.0.attn.{name}.weight" for name in "qkv"]


TENSORS = {name: torch.full((rows, 2), float(rows)) for rows, name in enumerate("abcdef", 1)}


def test_order():
    assert "".join(in_groups(TENSORS, [["b", "f", "c"], ["d", "x"]])) == "abfcde"
    assert "".join(in_groups(TENSORS, [])) == "abcdef"


def test_pack_puts_groups_in_one_allocation():
    packed = pack(TENSORS, [["b", "f", "c"], ["d", "x"]], "cpu")
    assert list(packed) == list(TENSORS)
    assert all(torch.equal(packed[name], tensor) for name, tensor in TENSORS.items())
    assert adjacent([packed[name] for name in "bfc"])
    assert packed["b"].untyped_storage().nbytes() == (2 + 6 + 3) * 2 * 4
    assert not adjacent([packed["d"], packed["e"]])
