"""The passes on every tested family: queries before RoPE, routing, outlining and lowering are exact.

A rotation by position 0 leaves the queries as they are, up to the factor of yarn and longrope; so with all positions 0
the router's q is proportional to the attention's q, and with positions it is not.
"""

from __future__ import annotations

import pytest
import torch

from fluxc.capture.huggingface import capture_model
from fluxc.ir.graph import argument, calls, runnable
from fluxc.ir.sparse import SparseSettings
from fluxc.passes import lower_pipeline, route_pipeline
from fluxc.passes.outline_layers import OutlineLayers
from fluxc.passes.set_dtype import SetDtype
from fluxc.testing import TINY_FAMILIES

# GPT-NeoX: partial rotation, fused QKV. GPT-OSS: split halves, sink logits, experts. The others take minutes.
QUICK = ("gpt-neox", "gpt-oss")
WITHOUT_ROPE = ("opt", "gpt2", "cohere2")
FAMILIES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in TINY_FAMILIES]
B, S = 2, 40


@pytest.fixture(scope="module", params=FAMILIES)
def captured(request):
    """(family, captured program)."""
    return request.param, capture_model(TINY_FAMILIES[request.param]())[0]


@pytest.fixture(scope="module")
def routed(captured):
    sparse = SparseSettings(sink=2, window=6)
    return route_pipeline(pool=4, sparse=sparse).run(captured[1], "captured").program


def _inputs(layers, bias, batch=B):
    generator = torch.Generator().manual_seed(0)
    lens = torch.tensor([S, S - 9])[:batch]
    return (
        torch.randint(3, 97, (batch, S), generator=generator),
        torch.arange(S).repeat(batch, 1),
        lens,
        lens - 3,
        torch.full((layers, batch), bias),
        torch.stack([lens - 1, lens // 2], dim=1),
    )


def _run(module, inputs):
    with torch.no_grad():
        return module(*inputs)


def _layers(program):
    return len(calls(program, torch.ops.fluxc.routed_attention))


class _Reader(torch.fx.Interpreter):
    """Keeps (what the router pools, what the attention gets) for each layer, [B,H,S,D] both."""

    def __init__(self, program):
        super().__init__(runnable(program))
        self.pooled, self.attended = [], []

    def call_function(self, target, args, kwargs):
        if target is torch.ops.fluxc.router_pool.default:
            self.pooled.append(args[0])
        if target is torch.ops.fluxc.routed_attention.default:
            self.attended.append(args[0])
        return super().call_function(target, args, kwargs)


def _read(program, inputs):
    reader = _Reader(program)
    with torch.no_grad():
        reader.run(*inputs)
    return list(zip(reader.pooled, reader.attended, strict=True))


def test_router_reads_queries_before_rope(captured, routed):
    inputs = list(_inputs(_layers(routed), torch.inf))
    turned = _read(routed, inputs)
    inputs[1] = inputs[1] * 0
    for before, after in _read(routed, inputs):
        factor = (after * before).sum() / before.square().sum()
        torch.testing.assert_close(after, before * factor, rtol=1e-4, atol=1e-5)
    has_rope = [not torch.equal(before, after) for before, after in turned]
    assert any(has_rope) == (captured[0] not in WITHOUT_ROPE)


def test_all_full_is_bit_equal_to_captured(captured, routed):
    inputs = _inputs(_layers(routed), torch.inf)
    logits, routes, scores = _run(runnable(routed), inputs)
    assert torch.equal(logits, _run(runnable(captured[1]), [*inputs[:3], inputs[5]]))
    assert routes.all()
    assert scores.isfinite().all()


def test_sparse_differs(captured, routed):
    layers = _layers(routed)
    full, sparse = (_run(runnable(routed), _inputs(layers, bias))[0] for bias in (torch.inf, -torch.inf))
    assert not torch.allclose(full, sparse)


def test_outlined_and_lowered_are_bit_equal(routed):
    layers = _layers(routed)
    lowered = lower_pipeline().run(routed, "routed").program
    for bias in (torch.inf, -torch.inf):
        batch, single = _inputs(layers, bias), _inputs(layers, bias, batch=1)
        pairs = [(OutlineLayers().apply(routed), batch), (runnable(lowered), single)]
        for module, inputs in pairs:
            for mine, expected in zip(_run(module, inputs), _run(runnable(routed), inputs), strict=True):
                assert torch.equal(mine, expected)


def test_bfloat16(captured):
    program = SetDtype("bfloat16").apply(captured[1]).program
    routed = route_pipeline(pool=4).run(program, "captured").program
    inputs = _inputs(_layers(routed), torch.inf)
    logits, _, scores = _run(runnable(routed), inputs)
    assert torch.equal(logits, _run(runnable(program), [*inputs[:3], inputs[5]]))
    assert (logits.dtype, scores.dtype) == (torch.bfloat16, torch.float32)
    assert {argument(node, "q").meta["val"].dtype for node in calls(routed, torch.ops.fluxc.routed_attention)} == {
        torch.bfloat16
    }
