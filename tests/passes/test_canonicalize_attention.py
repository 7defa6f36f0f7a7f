"""Pass canonicalize-attention: forms of attention and masks that are recognised, and those refused with the reason."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from fluxc.errors import UnsupportedAttentionError
from fluxc.ir.graph import argument, calls, runnable
from fluxc.ir.printer import program_diff
from fluxc.passes.canonicalize_attention import CanonicalizeAttention
from fluxc.passes.dead_code import DeadCode
from fluxc.passes.drop_asserts import DropAsserts
from fluxc.passes.drop_no_ops import DropNoOps
from fluxc.passes.inline_regions import InlineRegions
from fluxc.testing import causal_attend, foreign_module, foreign_program

WINDOW = 5


def prepared(module, **options):
    program = foreign_program(module, **options)
    for step in (InlineRegions(), DropAsserts(), DropNoOps(), DeadCode()):
        program = step.apply(program).program
    return program


def causal(S, device=None):
    return torch.ones(S, S, dtype=torch.bool).tril()


def distance(S):
    index = torch.arange(S)
    return index[:, None] - index[None, :]


def repeat(x):
    """As transformers does."""
    B, Hk, S, D = x.shape
    return x[:, :, None].expand(B, Hk, 2, S, D).reshape(B, 2 * Hk, S, D)


def join(out):
    return out.transpose(1, 2).flatten(2)


def explicit(layer, q, k, v, allowed, *, scale=8**-0.5, cap=0.0, mask="fill"):
    """softmax(scale * QK^T + mask)V in so many words."""
    scores = q @ repeat(k).transpose(-1, -2) * scale
    if cap:
        scores = cap * torch.tanh(scores / cap)
    if mask == "fill":
        scores = scores.masked_fill(~allowed, float("-inf"))
    elif mask == "where":
        scores = torch.where(allowed, scores, -1e9)
    else:
        scores = scores + torch.where(allowed, 0.0, torch.finfo(scores.dtype).min)
    return join(F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ repeat(v))


def by_mask(layer, q, k, v, padding):
    return join(F.scaled_dot_product_attention(q, repeat(k), repeat(v), attn_mask=causal(q.shape[2])))


def by_bias(layer, q, k, v, padding):
    bias = torch.zeros(q.shape[2], q.shape[2]).masked_fill(~causal(q.shape[2]), float("-inf"))
    return join(F.scaled_dot_product_attention(q, repeat(k), repeat(v), attn_mask=bias, scale=0.5))


def by_padding(layer, q, k, v, padding):
    allowed = causal(q.shape[2]) & padding.bool()[:, None, None, :]
    return join(F.scaled_dot_product_attention(q, repeat(k), repeat(v), attn_mask=allowed))


def by_interleave(layer, q, k, v, padding):
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    return join(F.scaled_dot_product_attention(q, k, v, is_causal=True))


def by_repeat_in_front(layer, q, k, v, padding):
    """Heads repeated while the axes stand [B,S,H,D], as in the first Llama code."""
    k, v = (x.transpose(1, 2)[:, :, :, None].expand(-1, -1, -1, 2, -1).flatten(2, 3) for x in (k, v))
    return join(F.scaled_dot_product_attention(q, k.transpose(1, 2), v.transpose(1, 2), is_causal=True))


def by_where(layer, q, k, v, padding):
    return explicit(layer, q, k, v, causal(q.shape[2]), mask="where")


def by_sum(layer, q, k, v, padding):
    return explicit(layer, q, k, v, causal(q.shape[2]), mask="add")


def by_capped_window(layer, q, k, v, padding):
    d = distance(q.shape[2])
    return explicit(layer, q, k, v, (d >= 0) & (d < WINDOW), cap=20.0)


def by_scaled_query(layer, q, k, v, padding):
    scores = (q * 0.25) @ repeat(k).mT / math.sqrt(2) + torch.full((q.shape[2],) * 2, -1e30).triu(1)
    return join(torch.dropout(torch.softmax(scores, -1), 0.1, False) @ repeat(v))


def by_table(layer, q, k, v, padding):
    """The mask is a slice of a buffer, as in nanoGPT."""
    S = q.shape[2]
    return explicit(layer, q, k, v, layer.table[:S, :S])


def by_einsum(layer, q, k, v, padding):
    q, k, v = q.transpose(1, 2), repeat(k).transpose(1, 2), repeat(v).transpose(1, 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * 8**-0.5
    scores = scores.masked_fill(distance(q.shape[1]) < 0, float("-inf"))
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2)


def by_one_key_head(layer, q, k, v, padding):
    """Multi-query attention through broadcasting."""
    scores = q @ k[:, :1].mT * 8**-0.5
    return join(scores.masked_fill(distance(q.shape[2]) < 0, float("-inf")).softmax(-1) @ v[:, :1])


def by_wide_window(layer, q, k, v, padding):
    """A window too long to try out on the whole square."""
    d = distance(q.shape[2])
    return explicit(layer, q, k, v, (d >= 0) & (d < 20_000))


def by_long_window(layer, q, k, v, padding):
    d = distance(q.shape[2])
    return explicit(layer, q, k, v, (d >= 0) & (d <= 40))


FORMS = [
    (causal_attend, {"scale": 8**-0.5}, 2),
    (by_mask, {"scale": 8**-0.5}, 2),
    (by_bias, {"scale": 0.5}, 2),
    (by_padding, {"scale": 8**-0.5}, 2),
    (by_interleave, {"scale": 8**-0.5}, 2),
    (by_repeat_in_front, {"scale": 8**-0.5}, 2),
    (by_where, {"scale": 8**-0.5}, 2),
    (by_sum, {"scale": 8**-0.5}, 2),
    (by_capped_window, {"scale": 8**-0.5, "softcap": 20.0, "window": WINDOW}, 2),
    (by_scaled_query, {"scale": 2**-0.5}, 2),
    (by_table, {"scale": 8**-0.5}, 2),
    (by_einsum, {"scale": 8**-0.5}, 2),
    (by_one_key_head, {"scale": 8**-0.5}, 1),
    (by_wide_window, {"scale": 8**-0.5, "window": 20_000}, 2),
    (by_long_window, {"scale": 8**-0.5, "window": 41}, 2),
]


@pytest.mark.parametrize(("attend", "wanted", "kv_heads"), FORMS, ids=lambda value: getattr(value, "__name__", None))
def test_recognised(attend, wanted, kv_heads):
    padding, longest = attend is by_padding, 60 if attend is by_table else None
    module = foreign_module(attend, buffers={"table": causal(64)})
    program = prepared(module, padding=padding, longest=longest, smallest=2 if longest else 1)
    result = CanonicalizeAttention().apply(program)
    assert (result.count, [note.matched for note in result.notes]) == (1, [True])
    (node,) = calls(result.program, torch.ops.fluxc.attention)
    found = {name: argument(node, name) for name in ("scale", "softcap", "window", "layer")}
    assert found == pytest.approx({"softcap": 0.0, "window": 0, "layer": 0, **wanted})
    assert [argument(node, name).meta["val"].shape[1] for name in "kv"] == [kv_heads] * 2
    assert not calls(result.program, torch.ops.aten.softmax)
    tokens = torch.randint(50, (2, 13), generator=torch.Generator().manual_seed(0))
    inputs = (tokens, torch.ones_like(tokens)) if padding else (tokens,)
    with torch.no_grad():
        torch.testing.assert_close(runnable(result.program)(*inputs), runnable(program)(*inputs), rtol=0, atol=1e-5)


def test_golden(golden):
    program = prepared(foreign_module(by_where))
    golden.check("explicit", program_diff(program, CanonicalizeAttention().apply(program).program))


def test_layers_are_counted_and_share_a_proof():
    program = prepared(foreign_module(by_capped_window, layers=3))
    result = CanonicalizeAttention().apply(program)
    assert [argument(node, "layer") for node in calls(result.program, torch.ops.fluxc.attention)] == [0, 1, 2]
    assert result.notes[0].reason == f"causal, window {WINDOW}, soft cap 20, 4 heads over 2"


def test_nothing_to_do_is_no_change():
    program = CanonicalizeAttention().apply(prepared(foreign_module(causal_attend))).program
    again = CanonicalizeAttention().apply(program)
    assert (again.count, again.program is program) == (0, True)


def to_encoder(layer, q, k, v, padding):
    return join(F.scaled_dot_product_attention(q, k, v, enable_gqa=True))


def to_padded_encoder(layer, q, k, v, padding):
    return join(F.scaled_dot_product_attention(q, repeat(k), repeat(v), attn_mask=padding.bool()[:, None, None, :]))


def to_alibi(layer, q, k, v, padding):
    bias = -distance(q.shape[2]).float() * torch.tensor([0.5, 0.25, 0.125, 0.0625])[:, None, None]
    return join(F.scaled_dot_product_attention(q, repeat(k), repeat(v), bias.masked_fill(~causal(q.shape[2]), -1e30)))


def to_prefix(layer, q, k, v, padding):
    return explicit(layer, q, k, v, causal(q.shape[2]) | (torch.arange(q.shape[2]) < 4))


def to_blocks(layer, q, k, v, padding):
    block = torch.arange(q.shape[2]) // 4
    return explicit(layer, q, k, v, causal(q.shape[2]) & (block[:, None] == block[None, :]))


def to_sinks(layer, q, k, v, padding):
    d = distance(q.shape[2])
    return explicit(layer, q, k, v, (d >= 0) & ((d < 6) | (torch.arange(q.shape[2]) < 2)))


def to_first_only_later(layer, q, k, v, padding):
    """Causal up to 40 tokens, and then not: only numbers past the one in the code show it."""
    index = torch.arange(q.shape[2])
    return explicit(layer, q, k, v, causal(q.shape[2]) | ((index[:, None] > 40) & (index[None, :] > 40)))


def to_cap_after_mask(layer, q, k, v, padding):
    scores = (q @ repeat(k).mT).masked_fill(~causal(q.shape[2]), -1e9)
    return join((20 * torch.tanh(scores / 20)).softmax(-1) @ repeat(v))


def to_token_bias(layer, q, k, v, padding):
    return explicit(layer, q, k, v, causal(q.shape[2]) & (k[:, :1, :, 0] > 0)[:, :, None, :])


def to_shown_probabilities(layer, q, k, v, padding):
    p = (q @ repeat(k).mT).masked_fill(~causal(q.shape[2]), -1e9).softmax(-1)
    return join(p @ repeat(v)) + p.sum() * 1e-9


def to_normalised_scores(layer, q, k, v, padding):
    scores = torch.relu(q @ repeat(k).mT).masked_fill(~causal(q.shape[2]), -1e9)
    return join(scores.softmax(-1) @ repeat(v))


def to_grouped_axes(layer, q, k, v, padding):
    B, _, S, D = q.shape
    scores = q.view(B, 2, 2, S, D) @ k[:, :, None].mT
    out = scores.masked_fill(~causal(S), -1e9).softmax(-1) @ v[:, :, None]
    return join(out.flatten(1, 2))


REFUSED = [
    (to_encoder, "no mask: every token sees every other"),
    (to_padded_encoder, "lets tokens see later ones"),
    (to_alibi, "adds a bias to the scores"),
    (to_prefix, "lets tokens see later ones"),
    (to_blocks, "not with one constant window"),
    (to_sinks, "not with one constant window"),
    (to_first_only_later, "lets tokens see later ones"),
    (to_cap_after_mask, "masks before the soft cap"),
    (to_token_bias, "depends on which tokens"),
    (to_shown_probabilities, "probabilities .* used 2 times"),
    (to_normalised_scores, r"scores go through relu \(aten.relu\)"),
    (to_grouped_axes, r"no product of \[B,H,S,D\]"),
]


@pytest.mark.parametrize(("attend", "reason"), REFUSED, ids=lambda value: getattr(value, "__name__", None))
def test_refused(attend, reason):
    program = prepared(foreign_module(attend), padding=attend is to_padded_encoder)
    with pytest.raises(UnsupportedAttentionError, match=rf"at node (softmax|scaled_dot\w+) .*{reason}") as caught:
        CanonicalizeAttention().apply(program)
    assert caught.value.exit_code == 2
    result = CanonicalizeAttention(strict=False).apply(program)
    assert (result.count, result.program is program, [note.matched for note in result.notes]) == (0, True, [False])


def test_a_refusal_leaves_the_others_rewritten():
    def mixed(layer, q, k, v, padding):
        return by_where(layer, q, k, v, padding) + to_encoder(layer, q, k, v, padding)

    result = CanonicalizeAttention(strict=False).apply(prepared(foreign_module(mixed)))
    assert result.count == 1
    assert sorted(note.matched for note in result.notes) == [False, True]
