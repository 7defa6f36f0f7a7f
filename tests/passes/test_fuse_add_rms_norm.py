"""Pass fuse-add-rms-norm: which norms are fused with their sums, written out or as an op, and which are left."""

from __future__ import annotations

import functools

import pytest
import torch

from fluxc import passes
from fluxc.capture.api import capture
from fluxc.engine.traced import TracedPrograms
from fluxc.ir.graph import Draft, calls, runnable
from fluxc.ir.layers import layer_stages
from fluxc.ir.norms import rms_norm_of
from fluxc.ir.printer import program_diff, program_text
from fluxc.ir.verifier import problems
from fluxc.passes.chunk_rows import ChunkRows
from fluxc.passes.fuse_add_rms_norm import FuseAddRmsNorm
from fluxc.passes.set_dtype import SetDtype
from fluxc.passes.split_phases import SplitPhases
from fluxc.testing import TINY_FAMILIES, ToyConfig, toy_inputs

CONFIG = ToyConfig(windows=(0, 0))
# Norms with a sum before them, in two layers: three within and between them, and the last one where no rows are
# gathered before it. OLMo-2 multiplies by its weight in fp32, Gemma by a computed 1 + w.
COUNTS = {
    "llama": {"float32": 4, "bfloat16": 4},
    "olmo2": {"float32": 1, "bfloat16": 0},
    "gemma2": {"bfloat16": 0},
}
CASES = [(name, dtype, count) for name, counts in COUNTS.items() for dtype, count in counts.items()]


@functools.cache
def family(name, dtype):
    program = capture(TINY_FAMILIES[name]()).program
    return program if dtype == "float32" else SetDtype(dtype).apply(program).program


def _run(program):
    with torch.no_grad():
        return runnable(program)(*toy_inputs())


def test_golden(toy, golden):
    golden.check("toy", program_diff(toy(CONFIG), FuseAddRmsNorm().apply(toy(CONFIG)).program))


def test_golden_written_out(golden):
    program = family("llama", "bfloat16")
    golden.check("llama", program_diff(program, FuseAddRmsNorm().apply(program).program))


@pytest.mark.parametrize(("name", "dtype", "count"), CASES)
def test_families(name, dtype, count):
    program = family(name, dtype)
    before = program_text(program)
    result = FuseAddRmsNorm().apply(program)
    assert result.count == count == len(calls(result.program, torch.ops.fluxc.add_rms_norm))
    assert FuseAddRmsNorm().apply(result.program).count == 0
    assert program_text(program) == before
    assert torch.isfinite(_run(program)).all()
    rounding = {"float32": 1e-5, "bfloat16": 2e-2}[dtype]
    torch.testing.assert_close(_run(result.program), _run(program), rtol=rounding, atol=rounding)


def test_reasons():
    (plain,) = [note for note in FuseAddRmsNorm().apply(family("llama", "float32")).notes if not note.matched]
    assert plain.reason == "embedding is no plain sum of two values"
    reasons = {note.reason for note in FuseAddRmsNorm().apply(family("gemma2", "bfloat16")).notes}
    assert all(reason.startswith("the norm's weight is computed, by add") for reason in reasons)
    assert reasons


def _altered(toy, alter):
    """The toy after `alter` was given its draft and the first sum; the notes that say why sums were left."""
    draft = Draft(toy(CONFIG))
    add = next(
        n for n in draft.graph.nodes if (found := rms_norm_of(n)) and found.x.target is torch.ops.aten.add.Tensor
    )
    alter(draft, rms_norm_of(add).x)
    result = FuseAddRmsNorm().apply(draft.close())
    return result.count, [note.reason for note in result.notes if not note.matched]


def test_a_scaled_sum_is_left(toy):
    def scale(draft, add):
        add.kwargs = {"alpha": 2}

    count, reasons = _altered(toy, scale)
    assert count == 2
    assert any("is no plain sum" in reason for reason in reasons)


def test_a_sum_that_broadcasts_is_left(toy):
    def broadcast(draft, add):
        with draft.inserting_before(add):
            add.args = (add.args[0], draft.call(torch.ops.aten.mean.dim, (add.args[1], [-1], True)))

    count, reasons = _altered(toy, broadcast)
    assert count == 2
    assert any("differ in shape or dtype" in reason for reason in reasons)


def test_phases(toy_routed):
    for pipeline, norms in ((passes.prefill_pipeline, 3), (passes.decode_pipeline, 4), (passes.append_pipeline, 3)):
        made = pipeline(fuse=True).run(toy_routed(CONFIG), "routed").program
        assert len(calls(made, torch.ops.fluxc.add_rms_norm)) == norms


@pytest.mark.parametrize("has_paths", [True, False])
def test_layers_are_cut_and_chunked_behind_it(toy_routed, has_paths):
    """The first norm of a layer moves into the layer before; where there are no module paths as well."""
    program = passes.prefill_pipeline(fuse=True).run(toy_routed(CONFIG), "routed").program
    wanted = layer_stages(program.graph)
    if not has_paths:
        for node in program.graph.nodes:
            node.meta.pop("nn_module_stack", None)
    stages = layer_stages(program.graph)
    norms = calls(program, torch.ops.fluxc.add_rms_norm)
    assert [stages[norm] for norm in norms] == [1, 1, 2] == [wanted[norm] for norm in norms]
    assert all(stages[user] == stages[norm] for norm in norms for user in norm.users)
    notes = []
    ChunkRows(rows=128).apply(SplitPhases().apply(program), notes)
    assert [note.matched for note in notes] == [True, True], notes


def test_chunks_give_what_the_whole_gives(toy_routed):
    program, length = toy_routed(CONFIG), 300
    ids = torch.arange(length)[None] % 31
    args = (ids, torch.tensor([length]), torch.zeros(2, 1), torch.tensor([[length - 1]]))
    *_, whole = TracedPrograms(program, fuse=True).prefill(*args)
    *_, parts = TracedPrograms(program, fuse=True, chunk_rows=128).prefill(*args)
    torch.testing.assert_close(parts.logits, whole.logits, rtol=1e-5, atol=2e-6)


def test_no_captured_program_has_it(toy):
    assert "no captured program" in problems(FuseAddRmsNorm().apply(toy(CONFIG)).program, "captured")[0]
