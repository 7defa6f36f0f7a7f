"""Pass expose-kv: keys after RoPE and values among the outputs, everything else bit for bit."""

from __future__ import annotations

import pytest
import torch

from fluxc.errors import UnsupportedAttentionError, VerifierError
from fluxc.ir.graph import Draft, runnable
from fluxc.ir.layers import attention_nodes
from fluxc.ir.printer import program_diff
from fluxc.ir.sizes import fix_size
from fluxc.ir.verifier import problems, verify
from fluxc.passes.expose_kv import ExposeKV, kv_nodes
from fluxc.testing import ToyConfig, toy_inputs, toy_routed_inputs

CONFIG = ToyConfig(windows=(0, 6, 0))


def _run(program, inputs):
    with torch.no_grad():
        return runnable(program)(*inputs)


def test_golden(toy_routed, golden):
    """Beside the program with batch 1, so that it shows what else changed."""
    draft = Draft(toy_routed(ToyConfig(windows=(0,))))
    fix_size(draft, draft.user_input("input_ids"), 0, 1)
    program = ExposeKV().apply(toy_routed(ToyConfig(windows=(0,)))).program
    golden.check("toy", program_diff(draft.close(), program))


@pytest.mark.parametrize("bias", [torch.inf, -torch.inf])
def test_routed_outputs_bit_for_bit(toy_routed, bias):
    inputs = toy_routed_inputs(2, bias, batch=1)
    result = ExposeKV().apply(toy_routed(CONFIG))
    outputs = _run(result.program, inputs)
    assert (result.count, len(outputs)) == (3, 3 + 6)
    for mine, expected in zip(outputs, _run(toy_routed(CONFIG), inputs), strict=False):
        assert torch.equal(mine, expected)
    assert problems(result.program, "prefill") == []


def test_dense_prefill(toy):
    program = ExposeKV().apply(toy(CONFIG)).program
    logits, *kv = _run(program, toy_inputs(batch=1))
    assert torch.equal(logits, _run(toy(CONFIG), toy_inputs(batch=1)))
    assert len(kv) == 6
    assert problems(program, "prefill") == []


def test_keys_and_values_are_what_the_attentions_read(toy_routed):
    program = ExposeKV().apply(toy_routed(CONFIG)).program
    seen = {}

    class Watch(torch.fx.Interpreter):
        def call_function(self, target, args, kwargs):
            if getattr(target, "_opname", "") in ("attention", "routed_attention"):
                seen[kwargs["layer"]] = args[1:3]
            return super().call_function(target, args, kwargs)

    with torch.no_grad():
        outputs = Watch(runnable(program)).run(*toy_routed_inputs(2, 0.0, batch=1))
    assert sorted(seen) == [0, 1, 2]
    for layer, (k, v) in seen.items():
        assert k.shape == (1, 1, 24, 8)
        assert torch.equal(outputs[3 + 2 * layer], k)
        assert torch.equal(outputs[4 + 2 * layer], v)


def _program(narrow_values=False, heads=(1, 1)):
    """Two attentions with values half as wide as keys, or with different numbers of key heads."""

    class Attends(torch.nn.Module):
        def forward(self, input_ids, position_ids, seq_lens, logits_at):
            x = (input_ids + position_ids)[:, None, :, None].float().expand(-1, 2, -1, 8).contiguous()
            for layer in (0, 1):
                k = x[:, : heads[layer]]
                out = torch.ops.fluxc.attention(x, k, k[..., :4] if narrow_values else k, scale=1.0, layer=layer)
                x = x + out.sum(-1, keepdim=True).transpose(1, 2)
            return x[:, 0].gather(1, logits_at.unsqueeze(-1).expand(-1, -1, 8))

    batch, length, rows = (torch.export.Dim(name, min=1) for name in "BSN")
    dims = ({0: batch, 1: length}, {0: batch, 1: length}, {0: batch}, {0: batch, 1: rows})
    return torch.export.export(Attends(), toy_inputs(), dynamic_shapes=dims)


def test_layers_that_one_cache_cannot_hold_are_refused():
    with pytest.raises(UnsupportedAttentionError, match="layer 0 has keys of width 8 and values of width 4"):
        ExposeKV().apply(_program(narrow_values=True))
    with pytest.raises(UnsupportedAttentionError, match="layer 0 caches 1 heads of 8, layer 1 2 heads of 8"):
        ExposeKV().apply(_program(heads=(1, 2)))


def test_verifier_names_other_outputs(toy_routed):
    draft = Draft(ExposeKV().apply(toy_routed(CONFIG)).program)
    outputs = list(draft.output.args[0])
    draft.set_outputs([*outputs[:3], *outputs[:2:-1]])
    with pytest.raises(VerifierError, match="the last outputs are not key and value of each attention"):
        verify(draft.close(), "prefill")


def test_verifier_asks_for_one_request(toy_routed):
    draft = Draft(toy_routed(CONFIG))
    draft.set_outputs([*draft.output.args[0], *kv_nodes(attention_nodes(draft.graph))])
    (problem,) = problems(draft.close(), "prefill")
    assert "routes are decided for one request" in problem
