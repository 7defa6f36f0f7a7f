"""Pass last-rows: the asked rows alone give what all rows give, and parts that mix rows are left as they are."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import fluxc
from fluxc.ir.graph import Draft
from fluxc.ir.pass_base import Note
from fluxc.ir.phases import PrefillRun
from fluxc.passes import prefill_pipeline
from fluxc.passes.chunk_rows import ChunkRows
from fluxc.passes.expose_kv import ExposeKV
from fluxc.passes.last_rows import AT, TAKEN, LastRows, SomeRows
from fluxc.passes.split_phases import SplitPhases
from fluxc.testing import TINY_FAMILIES, ToyConfig, toy_routed_inputs

CONFIG = ToyConfig(windows=(0, 6, 0))
aten = torch.ops.aten


@pytest.fixture(scope="module")
def program(toy_routed):
    return ExposeKV().apply(toy_routed(CONFIG)).program


def _split(program):
    return ChunkRows().apply(SplitPhases().apply(program))


def _run(phases, length, rows):
    inputs = dict(zip(phases.inputs, toy_routed_inputs(2, 0.0, batch=1, length=length), strict=True))
    run = PrefillRun(phases, inputs | {AT: torch.tensor([rows])})
    with torch.no_grad():
        for piece in list(phases.pieces())[:-1]:
            run.step(piece)
        return run.step(phases.epilogue, phases.outputs)


def test_golden(program, golden):
    notes: list[Note] = []
    phases = LastRows(rows=16).apply(_split(program), notes)
    pieces = {"after": phases.layers[-1].after, "epilogue": phases.epilogue}
    lines = [f"{name}: {', '.join(p.enters)} -> {', '.join(p.leaves)}" for name, p in pieces.items()]
    golden.check("toy", "\n".join([notes[0].reason, *lines]))


def test_only_the_last_layer_changes(program):
    notes: list[Note] = []
    given = _split(program)
    phases = LastRows().apply(given, notes)
    assert [note.matched for note in notes] == [True]
    assert isinstance(phases.layers[-1].after.module, SomeRows)
    assert phases.layers[:-1] == given.layers[:-1]
    assert phases.epilogue.module is given.epilogue.module
    assert TAKEN not in given.epilogue.enters, "the given phases changed"


@pytest.mark.parametrize("rows", [[15], [0], [3, 3, 9, 0]])
def test_short_prompts_bit_for_bit(program, rows):
    given = _split(program)
    mine, expected = _run(LastRows(rows=16).apply(given), 16, rows), _run(given, 16, rows)
    assert all(torch.equal(mine[name], expected[name]) for name in expected)


@pytest.mark.parametrize(("length", "rows"), [(17, [16]), (40, [39]), (40, [0, 39, 7, 7]), (17, [*range(17), 0, 3])])
def test_asked_rows_are_close_to_those_of_the_whole(program, length, rows):
    """GEMMs over fewer rows: a few units in the last place of fp32."""
    given = _split(program)
    mine, expected = _run(LastRows(rows=16).apply(given), length, rows), _run(given, length, rows)
    assert torch.equal(mine["routes"], expected["routes"])
    assert [x.shape for x in mine.values()] == [x.shape for x in expected.values()]
    torch.testing.assert_close(mine, expected, rtol=1e-5, atol=2e-6)


def test_the_mlp_sees_the_asked_rows_alone(program, monkeypatch):
    phases = LastRows(rows=16).apply(_split(program))
    part, seen = phases.layers[-1].after.module.part, []
    whole = part.part.forward
    monkeypatch.setattr(part.part, "forward", lambda *inputs: seen.append(inputs[0].shape[1]) or whole(*inputs))
    _run(phases, 40, [39, 4])
    assert seen == [2]


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "cohere2", "gpt2", "gpt-oss", "opt"])
def test_every_family_gives_its_logits_or_a_reason(family):
    captured = fluxc.capture(TINY_FAMILIES[family]()).program
    given = _split(prefill_pipeline(dense=True).run(captured, "captured").program)
    notes: list[Note] = []
    phases = LastRows(rows=16).apply(given, notes)
    assert [note.matched for note in notes] == [family not in ("gpt2", "gpt-oss", "opt")], notes
    values = {
        "input_ids": torch.arange(30)[None] % 90,
        "position_ids": torch.arange(30)[None],
        "seq_lens": torch.tensor([30]),
        AT: torch.tensor([[29, 4]]),
    }
    logits = []
    for each in (phases, given):
        run = PrefillRun(each, {name: values[name] for name in each.inputs})
        with torch.no_grad():
            steps = [run.step(piece) for piece in list(each.pieces())[:-1]]
            assert len(steps) == 3 * len(each.layers) + 1
            logits.append(run.step(each.epilogue, each.outputs)[each.outputs[0]])
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-5)


def _with_gather_of(program, change):
    draft = Draft(program)
    gather = next(node for node in draft.graph.nodes if node.target == aten.gather.default)
    with draft.inserting_before(gather):
        change(draft, gather)
    return _split(draft.close())


def _mean_first(draft, gather):
    x = gather.args[0]
    gather.args = (draft.call(aten.add.Tensor, (x, draft.call(aten.mean.dim, (x, [1], True)))), *gather.args[1:])


def test_a_head_that_mixes_rows_is_left(program):
    given, notes = _with_gather_of(program, _mean_first), []
    assert LastRows().apply(given, notes) is given
    assert "before the LM head stays whole" in notes[0].reason


def test_a_last_layer_that_mixes_rows_is_left(program):
    split = SplitPhases().apply(program)
    notes: list[Note] = []
    assert LastRows().apply(split, notes) is split
    assert "mixes rows" in notes[0].reason


def test_rows_that_others_read_too_are_left(program):
    given, notes = _split(program), []
    last = dataclasses.replace(given.layers[-1].after, leaves=())
    layers = (*given.layers[:-1], dataclasses.replace(given.layers[-1], after=last))
    assert "is not left by the last layer" in _reason(dataclasses.replace(given, layers=layers), notes)


def _reason(phases, notes):
    assert LastRows().apply(phases, notes) is phases
    return notes[0].reason
