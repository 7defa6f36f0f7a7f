"""q before RoPE is found in every form of the rotation, and is the value the model computed."""

from __future__ import annotations

import pytest
import torch

from fluxc import kernels
from fluxc.ir.graph import calls
from fluxc.ir.rope import Dependence, query_before_rope
from fluxc.testing import TOY_ROPES, ToyConfig, toy_inputs, toy_module

kernels.register()


def _queries(program):
    dependence = Dependence(program.graph)
    return program, [query_before_rope(node, dependence) for node in calls(program, torch.ops.fluxc.attention)]


def _values(program, nodes, inputs):
    """What the given nodes of the program hold when it runs."""
    module = program.module(check_guards=False)
    names = {node.name for node in nodes}

    class Recorder(torch.fx.Interpreter):
        seen: dict[str, torch.Tensor] = {}  # noqa: RUF012

        def run_node(self, n):
            result = super().run_node(n)
            if n.name in names:
                self.seen[n.name] = result
            return result

    recorder = Recorder(module)
    with torch.no_grad():
        recorder.run(*inputs)
    return [recorder.seen[node.name] for node in nodes]


def _projected(config, inputs):
    """Queries before RoPE [B,H,S,D] of each layer, from hooks on the plain module."""
    module, queries = toy_module(config), []
    for layer in module.layers:
        source = layer.attn.q_norm if config.qk_norm else layer.attn.q
        source.register_forward_hook(lambda _module, _args, out: queries.append(out.detach()))
    with torch.no_grad():
        module(*inputs)
    return [q if q.dim() == 4 else q.unflatten(2, (config.heads, -1)).transpose(1, 2) for q in queries]


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("rope", [*TOY_ROPES, "none"])
def test_found_query_is_the_one_before_rope(toy, rope, qk_norm):
    config = ToyConfig(windows=(0,), rope=rope, qk_norm=qk_norm)
    program, queries = _queries(toy(config))
    inputs = toy_inputs()
    found = _values(program, [query.node for query in queries], inputs)
    assert [query.found for query in queries] == [True]
    for query, value, expected in zip(queries, found, _projected(config, inputs), strict=True):
        value = value.transpose(1, 2) if query.layout == "BSHD" else value
        assert torch.equal(value, expected)


def test_axis_order_is_told(toy):
    assert {query.layout for query in _queries(toy(ToyConfig(windows=(0,), rope="transposed")))[1]} == {"BSHD"}
    assert {query.layout for query in _queries(toy(ToyConfig(windows=(0,), rope="half")))[1]} == {"BHSD"}


def test_no_rotation_gives_q_itself(toy):
    program, queries = _queries(toy(ToyConfig(windows=(0,), rope="none")))
    attentions = calls(program, torch.ops.fluxc.attention)
    assert [query.node for query in queries] == [node.args[0] for node in attentions]
    assert {query.reason for query in queries} == {"no rotary embedding"}


def test_two_sources_are_reported(toy):
    program, queries = _queries(toy(ToyConfig(windows=(0,), rope="two-sources")))
    attentions = calls(program, torch.ops.fluxc.attention)
    assert [query.node for query in queries] == [node.args[0] for node in attentions]
    assert not any(query.found for query in queries)
    assert "more than one value" in queries[0].reason
