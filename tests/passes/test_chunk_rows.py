"""Pass chunk-rows: chunks give what the whole gives, and parts that mix rows are left whole with the reason."""

from __future__ import annotations

import pytest
import torch

import fluxc
from fluxc.ir.graph import Draft
from fluxc.ir.pass_base import Note
from fluxc.ir.phases import PrefillRun
from fluxc.ir.printer import module_text
from fluxc.passes import prefill_pipeline
from fluxc.passes.chunk_rows import Chunked, ChunkRows
from fluxc.passes.expose_kv import ExposeKV
from fluxc.passes.split_phases import SplitPhases
from fluxc.testing import TINY_FAMILIES, LargestAllocation, ToyConfig, toy_routed_inputs

CONFIG = ToyConfig(windows=(0, 6, 0))
aten = torch.ops.aten


@pytest.fixture(scope="module")
def program(toy_routed):
    return ExposeKV().apply(toy_routed(CONFIG)).program


@pytest.fixture(scope="module")
def phases(program):
    return SplitPhases().apply(program)


def _run(phases, length, bias=0.0):
    inputs = toy_routed_inputs(2, bias, batch=1, length=length)
    run = PrefillRun(phases, dict(zip(phases.inputs, inputs, strict=True)))
    with torch.no_grad():
        for piece in list(phases.pieces())[:-1]:
            run.step(piece)
        return list(run.step(phases.epilogue, phases.outputs).values())


def test_golden(program, phases, golden):
    notes: list[Note] = []
    chunked = ChunkRows(rows=128).apply(phases, notes).layers[0].after
    pairs = zip(chunked.enters, chunked.module.has_rows, strict=True)
    lines = [f"%{name}: {'some rows' if cut else 'whole'}" for name, cut in pairs]
    text = module_text(chunked.module.part, "after", program)
    golden.check("toy", "\n".join([notes[0].reason, *lines, "", text]))


def test_every_layer_is_chunked(phases):
    notes: list[Note] = []
    chunked = ChunkRows(rows=128).apply(phases, notes)
    assert [note.matched for note in notes] == [True, True, True]
    assert all(isinstance(layer.after.module, Chunked) for layer in chunked.layers)
    assert not any(isinstance(layer.after.module, Chunked) for layer in phases.layers), "the given phases changed"
    assert chunked.layers[0].before is phases.layers[0].before


@pytest.mark.parametrize("length", [1, 127, 128])
def test_short_prompts_bit_for_bit(phases, length):
    mine, expected = _run(ChunkRows(rows=128).apply(phases), length), _run(phases, length)
    assert all(torch.equal(a, b) for a, b in zip(mine, expected, strict=True))


@pytest.mark.parametrize("length", [129, 256, 300, 383])
def test_chunks_are_close_to_the_whole(phases, length):
    """GEMMs over fewer rows: a few units in the last place of fp32."""
    mine, expected = _run(ChunkRows(rows=128).apply(phases), length), _run(phases, length)
    assert torch.equal(mine[1], expected[1])
    torch.testing.assert_close((mine[0], mine[2]), (expected[0], expected[2]), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(("length", "sizes"), [(129, [128, 1]), (300, [128, 128, 44]), (512, [128] * 4)])
def test_sizes_of_chunks(phases, monkeypatch, length, sizes):
    part = ChunkRows(rows=128).apply(phases).layers[0].after.module
    seen = []
    monkeypatch.setattr(part.part, "forward", _spy(part.part.forward, seen))
    x = torch.zeros(1, length, 16)
    part(*(x.view(1, length, 2, 8) if "attention" in name else x for name in phases.layers[0].after.enters))
    assert seen == sizes


def _spy(forward, seen):
    def run(*inputs):
        seen.append(inputs[0].shape[1])
        return forward(*inputs)

    return run


def test_largest_value_is_that_of_a_chunk(toy_routed):
    phases = SplitPhases().apply(ExposeKV().apply(toy_routed(ToyConfig(windows=(0, 0), hidden=16))).program)
    layer = phases.layers[0]
    x = torch.zeros(1, 2048, 16)
    inputs = [x.view(1, 2048, 2, 8) if "attention" in name else x for name in layer.after.enters]
    with torch.no_grad():
        with LargestAllocation() as whole:
            layer.after.module(*inputs)
        with LargestAllocation() as some:
            ChunkRows(rows=256).apply(phases).layers[0].after.module(*inputs)
    assert whole.bytes == 4 * 2048 * 32, "the MLP's inner value"
    assert some.bytes == 4 * 2048 * 16, "the hidden state"


@pytest.mark.parametrize("family", ["gpt-oss", "opt"])
def test_parts_that_mix_rows_stay_whole(family):
    """Experts sort the tokens of all rows; OPT flattens batch and rows."""
    captured = fluxc.capture(TINY_FAMILIES[family]()).program
    phases = SplitPhases().apply(prefill_pipeline(dense=True).run(captured, "captured").program)
    notes: list[Note] = []
    assert ChunkRows().apply(phases, notes).layers == phases.layers
    assert [note.matched for note in notes] == [False, False]
    assert all("has its rows on another axis" in note.reason for note in notes)


def _cumulate(draft, node):
    return draft.call(aten.cumsum.default, (node, 1))


def _mean(draft, node):
    return draft.call(aten.add.Tensor, (node, draft.call(aten.mean.dim, (node, [1], True))))


def _flip(draft, node):
    return draft.call(aten.flip.default, (node, [-2]))


def _norm(draft, node):
    return draft.call(aten.softmax.int, (node, -2))


@pytest.mark.parametrize("mix", [_cumulate, _mean, _flip, _norm])
def test_ops_along_the_rows_are_found(program, mix):
    draft = Draft(program)
    silu = next(node for node in draft.graph.nodes if node.name == "silu")
    with draft.inserting_before(silu):
        silu.args = (mix(draft, silu.args[0]),)
    notes: list[Note] = []
    ChunkRows().apply(SplitPhases().apply(draft.close()), notes)
    assert [note.matched for note in notes] == [False, True, True]
    assert "mixes rows" in notes[0].reason or "on another axis" in notes[0].reason
