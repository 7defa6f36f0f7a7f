"""Capturing programs exported by others: Hugging Face exports, hand-written models, and what is refused by name."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.export import Dim

from fluxc.archive import load_program
from fluxc.capture.foreign_check import Original, check_program
from fluxc.capture.program import attention_notes, capture_file, capture_module, capture_program
from fluxc.capture.result import load_capture
from fluxc.errors import CaptureError, SelfCheckError, UnsupportedAttentionError
from fluxc.ir.graph import argument, calls, runnable, user_inputs
from fluxc.signature import CAPTURED_INPUTS
from fluxc.testing import TINY_FAMILIES, causal_attend, export_from, foreign_module, foreign_program, free

VOCAB = 97


def hugging_face(family, attention, inputs, *, dynamic=None, **fields):
    """A tiny model and its export, as a user of transformers would make it."""
    model = TINY_FAMILIES[family](**fields)
    exported = copy.deepcopy(model)
    exported.config._attn_implementation = attention
    tokens = torch.zeros(2, 12, dtype=torch.long)
    makers = {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "position_ids": torch.arange(12).repeat(2, 1),
    }
    kwargs = {name: makers[name] for name in inputs}

    def export(smallest):
        sizes = dynamic or {0: free("batch", smallest), 1: free("sequence", smallest)}
        shapes = {**dict.fromkeys(inputs, sizes), "use_cache": None}
        given = {**kwargs, "use_cache": False}
        with torch.no_grad():
            return torch.export.export(exported, (), given, dynamic_shapes=shapes, strict=False)

    return model, export_from(1, export)


def logits(capture, tokens, positions=None, lens=None, rows=None):
    B, S = tokens.shape
    positions = torch.arange(S).expand(B, -1) if positions is None else positions
    lens = torch.full((B,), S) if lens is None else lens
    rows = torch.arange(S).expand(B, -1) if rows is None else rows
    with torch.no_grad():
        return runnable(capture.program)(tokens, positions, lens, rows)


def expected(model, tokens, **inputs):
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False, **inputs).logits


def close(got, want):
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()


CASES = [
    ("llama", "sdpa", ("input_ids",), {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}, [0]),
    ("llama", "sdpa", ("input_ids", "attention_mask"), None, [0]),
    ("qwen3", "sdpa", ("input_ids", "position_ids"), None, [0]),
    pytest.param(
        *("qwen3", "sdpa", ("input_ids", "attention_mask"), {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}, [0]),
        marks=pytest.mark.slow,
    ),
    ("gemma2", "eager", ("input_ids",), None, [8, 0]),
    ("gemma2", "eager", ("input_ids", "attention_mask"), None, [8, 0]),
]


@pytest.mark.parametrize(("family", "attention", "inputs", "dynamic", "windows"), CASES)
def test_hugging_face_exports(tmp_path, family, attention, inputs, dynamic, windows):
    model, program = hugging_face(family, attention, inputs, dynamic=dynamic, num_hidden_layers=len(windows))
    torch.export.save(program, tmp_path / "model.pt2")
    capture = capture_file(tmp_path / "model.pt2")
    assert user_inputs(capture.program) == CAPTURED_INPUTS
    nodes = calls(capture.program, torch.ops.fluxc.attention)
    assert [argument(node, "window") for node in nodes] == windows
    assert [argument(node, "softcap") for node in nodes] == [50.0 if family == "gemma2" else 0.0] * len(windows)
    assert {node.args[1].meta["val"].shape[1] for node in nodes} == {2}  # heads of k, not repeated
    assert not calls(capture.program, torch.ops.aten.scaled_dot_product_attention)
    assert capture.meta["vocab"] == VOCAB
    assert capture.meta["self_check"]["max_error"] <= 1e-4
    model.config._attn_implementation = "eager"
    generator = torch.Generator().manual_seed(1)
    for batch, length in ((1, 1), (1, 7), (3, 33)):
        tokens = torch.randint(VOCAB, (batch, length), generator=generator)
        close(logits(capture, tokens), expected(model, tokens))
    tokens, positions = tokens[:2, :6], torch.tensor([[0, 1, 2, 3, 4, 5], [9, 10, 11, 12, 13, 14]])
    close(logits(capture, tokens, positions), expected(model, tokens, position_ids=positions))
    mask = torch.tensor([[1] * 6, [1, 1, 1, 1, 0, 0]])
    padded = expected(model, tokens, attention_mask=mask)
    got = logits(capture, tokens, lens=mask.sum(1))
    close(got[mask.bool()], padded[mask.bool()])


@pytest.fixture(scope="module")
def captured():
    return capture_program(foreign_program(foreign_module(causal_attend, layers=2), smallest=2))


def test_only_asked_rows_reach_the_head(captured):
    tokens = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(0))
    rows = torch.tensor([[8], [3]])
    close(logits(captured, tokens, rows=rows), logits(captured, tokens).gather(1, rows[..., None].expand(-1, -1, 50)))
    head = calls(captured.program, torch.ops.aten.linear)[-1]
    assert str(head.args[0].meta["val"].shape[1]) == str(rows_symbol(captured))


def rows_symbol(capture):
    return next(n for n in capture.program.graph.nodes if n.name == "logits_at").meta["val"].shape[1]


def test_lengths_start_at_one(captured):
    """The program was exported for lengths from 2."""
    assert logits(captured, torch.tensor([[3]])).shape == (1, 1, 50)
    assert {str(bounds.lower) for bounds in captured.program.range_constraints.values()} == {"1"}


def test_meta_says_what_was_found(captured):
    assert captured.meta["layers"] == 2
    assert captured.meta["dtype"] == "float32"
    assert captured.meta["attentions"][0]["found"] == "causal, 4 heads over 2"


def test_a_capture_survives_saving_and_is_taken_as_it_is(captured, tmp_path):
    captured.save(tmp_path / "model.pt")
    again = load_capture(tmp_path / "model.pt")
    tokens = torch.randint(50, (2, 5))
    assert torch.equal(logits(again, tokens), logits(captured, tokens))
    program, _ = load_program(tmp_path / "model.pt")
    assert capture_program(program).program is program


def test_the_given_program_is_not_changed():
    program = foreign_program(foreign_module(causal_attend))
    before, names = str(program.graph), set(program.state_dict)
    capture = capture_program(program)
    assert (str(program.graph), set(program.state_dict)) == (before, names)
    weight = "layers.0.q.weight"
    assert capture.program.state_dict[weight].data_ptr() == program.state_dict[weight].data_ptr()


def by_hand(layer, q, k, v, padding):
    """Everything written out: GQA, scale, mask, softmax."""
    S = q.shape[2]
    k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
    scores = q @ k.transpose(2, 3) / 8**0.5 + torch.full((S, S), float("-inf")).triu(1)
    return (scores.softmax(-1) @ v).transpose(1, 2).reshape(q.shape[0], S, -1)


def learned(model, hidden, input_ids, padding):
    return hidden + model.learned(torch.arange(hidden.shape[1]))


def test_a_hand_written_module():
    module = foreign_module(by_hand, layers=2, place=learned)
    capture = capture_module(module, (torch.zeros(2, 6, dtype=torch.long),))
    assert capture.meta["context"] == 64  # rows of the table of learned positions
    assert len(calls(capture.program, torch.ops.fluxc.attention)) == 2
    tokens = torch.randint(50, (3, 11))
    with torch.no_grad():
        close(logits(capture, tokens), module(tokens))


def test_work_after_the_head_that_is_not_row_by_row():
    class Centred(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = foreign_module(causal_attend)

        def forward(self, input_ids):
            return self.inner(input_ids).log_softmax(-1)

    module = Centred()
    capture = capture_program(foreign_program(module))
    tokens = torch.randint(50, (2, 7))
    with torch.no_grad():
        close(logits(capture, tokens), module(tokens))


def export(module, *inputs, shapes):
    with torch.no_grad():
        return torch.export.export(module, inputs, dynamic_shapes=shapes, strict=False)


TOKENS = torch.zeros(2, 12, dtype=torch.long)
BOTH = {0: Dim("B"), 1: Dim("S")}


class Around(torch.nn.Module):
    """The hand-written decoder with other inputs or outputs."""

    def __init__(self, call):
        super().__init__()
        self.inner, self.call = foreign_module(causal_attend), call
        self.register_buffer("cache", torch.zeros(4, 32))

    def forward(self, *inputs):
        return self.call(self.inner, self.cache, *inputs)


def with_cache(inner, cache, input_ids):
    cache.index_copy_(0, torch.tensor([1]), inner.embed(input_ids)[:1, 0])
    return inner(input_ids) + cache.sum()


class Embedded(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = foreign_module(causal_attend)

    def forward(self, inputs_embeds):
        return self.inner.head(inputs_embeds + self.inner.layers[0](self.inner, inputs_embeds, None))


def around(call, *inputs, shapes):
    return export(Around(call), *inputs, shapes=(shapes,))


def plain(**sizes):
    return export(
        foreign_module(causal_attend), TOKENS, shapes=({"BS".index(axis): dim for axis, dim in sizes.items()},)
    )


REFUSED = {
    "length": (lambda: plain(B=Dim("B")), "length is fixed at 12"),
    "batch": (lambda: plain(S=Dim("S")), "batch is fixed at 2"),
    "multiple": (lambda: plain(B=Dim("B"), S=4 * Dim("s")), "length must be 4"),
    "cache": (lambda: around(with_cache, TOKENS, shapes=(BOTH,)), "writes to cache .*use_cache=False"),
    "embeddings": (
        lambda: export(Embedded(), torch.zeros(2, 12, 32), shapes=(BOTH,)),
        r"takes embeddings \(inputs_emb",
    ),
    "last row": (lambda: around(lambda m, _, i: m(i)[:, -1:], TOKENS, shapes=(BOTH,)), "no logits of every token"),
    "states": (lambda: around(lambda m, _, i: m.norm(m.embed(i)), TOKENS, shapes=(BOTH,)), "no logits of every token"),
    "bag": (lambda: around(lambda m, _, i: m.head(m.embed(i)), TOKENS, shapes=(BOTH,)), "no attention that fluxc"),
    "two tokens": (
        lambda: around(lambda m, _, i, j: m(i) + j.unsqueeze(-1), TOKENS, TOKENS, shapes=(BOTH, BOTH)),
        "two inputs of tokens",
    ),
    "image": (
        lambda: around(lambda m, _, i, x: m(i) + x.mean(), TOKENS, torch.zeros(3, 8, 8), shapes=(BOTH, None)),
        "takes the input inputs_1",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name):
    make, reason = REFUSED[name]
    program = make()
    with pytest.raises(CaptureError, match=reason) as caught:
        capture_program(program)
    assert (caught.value.exit_code, "\n" in str(caught.value)) == (2, False)


def to_encoder(layer, q, k, v, padding):
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    return out.transpose(1, 2).flatten(2)


def test_an_encoder_is_refused_and_the_notes_say_why():
    program = foreign_program(foreign_module(to_encoder, layers=2))
    with pytest.raises(UnsupportedAttentionError, match="every token sees every other, as in an encoder"):
        capture_program(program)
    notes = attention_notes(program)
    assert [(note.node, note.matched) for note in notes] == [
        ("scaled_dot_product_attention", False),
        ("scaled_dot_product_attention_1", False),
    ]


def test_a_module_that_torch_exports_from_two_tokens_only(monkeypatch):
    """As torch 2.11 does with SDPA."""
    module, export = foreign_module(causal_attend), torch.export.export

    def from_two(model, *args, dynamic_shapes, **options):
        if model is module and dynamic_shapes[0][1].min < 2:
            raise ValueError("Constraints violated (S)!")
        return export(model, *args, dynamic_shapes=dynamic_shapes, **options)

    monkeypatch.setattr(torch.export, "export", from_two)
    capture = capture_module(module, (torch.zeros(2, 6, dtype=torch.long),))
    for tokens in (torch.randint(50, (3, 11)), torch.tensor([[7]])):
        with torch.no_grad():
            close(logits(capture, tokens), module(tokens))


def test_a_module_that_cannot_be_exported():
    class Counting(torch.nn.Module):
        def forward(self, input_ids):
            return torch.zeros(int(input_ids.sum()), 1)

    with pytest.raises(CaptureError, match="Counting cannot be exported with a free batch and length"):
        capture_module(Counting(), (TOKENS,))


def test_the_self_check_fails_on_another_models_logits(captured):
    other = foreign_module(causal_attend, layers=2)
    with torch.no_grad():
        other.layers[1].out.weight.mul_(1.01)
    with pytest.raises(SelfCheckError, match=r"differs from the given one by .* at length 2"):
        check_program(captured.program, Original(foreign_program(other)), torch.float32, [])
