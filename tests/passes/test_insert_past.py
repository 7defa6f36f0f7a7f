"""Pass insert-past: a dense cache in and out, lengths computed from the tokens (results: test_onnx_hf.py)."""

from __future__ import annotations

import pytest
import torch

import fluxc
from fluxc.errors import UnsupportedAttentionError
from fluxc.ir.graph import argument, user_inputs
from fluxc.ir.layers import attention_nodes
from fluxc.ir.printer import program_diff
from fluxc.passes.insert_past import InsertPast, check_rope
from fluxc.testing import TINY_FAMILIES, ToyConfig
from fluxc.toy_flux import toy_routed as route

CONFIG = ToyConfig(windows=(0, 6, 0))


def test_golden(toy_routed, golden):
    program = toy_routed(ToyConfig(windows=(0,)))
    golden.check("toy", program_diff(program, InsertPast().apply(program).program))


def test_inputs_and_outputs(toy_routed):
    result = InsertPast().apply(toy_routed(CONFIG))
    past = [f"past_{name}_{layer}" for layer in range(3) for name in "kv"]
    assert result.count == 3
    assert user_inputs(result.program) == ("input_ids", "position_ids", "route_bias", *past)
    outputs = [node.name for node in result.program.graph.output_node().args[0]]
    assert outputs[1:] == [name.replace("past", "present") for name in past]
    for index, node in enumerate(attention_nodes(result.program.graph)):
        for name in "kv":
            read = argument(node, name)
            assert (read.name, read.target) == (f"present_{name}_{index}", torch.ops.aten.cat.default)
            assert next(part.name for part in read.args[0]) == f"past_{name}_{index}"


def test_the_given_program_is_not_changed(toy_routed):
    before = str(toy_routed(CONFIG).graph)
    InsertPast().apply(toy_routed(CONFIG))
    assert str(toy_routed(CONFIG).graph) == before


def test_rope_of_two_factors():
    check_rope(route(fluxc.capture(TINY_FAMILIES["llama"]()).program))
    with pytest.raises(UnsupportedAttentionError, match="change with the length"):
        check_rope(route(fluxc.capture(TINY_FAMILIES["phi3-longrope"]()).program))
