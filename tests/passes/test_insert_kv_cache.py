"""Pass insert-kv-cache: the decode program's form, and each step against recomputing the whole text."""

from __future__ import annotations

import pytest
import torch

from fluxc.archive import load_program, save_program
from fluxc.errors import UnsupportedAttentionError
from fluxc.ir.graph import Draft, argument, calls, runnable, user_inputs
from fluxc.ir.printer import program_diff
from fluxc.ir.sizes import fix_size
from fluxc.ir.verifier import problems
from fluxc.kernels.schemas import PAGE
from fluxc.passes.insert_kv_cache import InsertKVCache
from fluxc.signature import DECODE_INPUTS
from fluxc.testing import ToyConfig, toy_inputs

CONFIG = ToyConfig(windows=(0, 0), softcap=3.0)


@pytest.fixture(scope="module")
def result(toy):
    return InsertKVCache().apply(toy(CONFIG))


def test_golden(toy, golden):
    """Beside the program with length 1, so that it shows what else changed."""
    draft = Draft(toy(ToyConfig(windows=(0,))))
    for name in ("input_ids", "logits_at"):
        fix_size(draft, draft.user_input(name), 1, 1)
    program = InsertKVCache().apply(toy(ToyConfig(windows=(0,)))).program
    golden.check("toy", program_diff(draft.close(), program))


def test_every_attention_reads_the_cache(result):
    assert (result.count, user_inputs(result.program)) == (2, DECODE_INPUTS)
    assert problems(result.program, "decode") == []
    nodes = calls(result.program, torch.ops.fluxc.decode_attention)
    assert [argument(node, "softcap") for node in nodes] == [3.0, 3.0]
    (logits,) = result.program.graph.output_node().args[0]
    assert logits.meta["val"].dim() == 2


def _decode(program, length=70):
    """All tokens one by one, over pages in no order: logits [B,length,V]. Two requests, the second five behind."""
    ids = toy_inputs(2, length)[0]
    cache = torch.full((8, 2, 1, PAGE, 8), torch.nan)
    table = torch.tensor([[[5, 0], [2, 7]], [[1, 3], [6, 4]]], dtype=torch.int32)
    steps = []
    for step in range(length):
        at = torch.tensor([step, max(step - 5, 0)])
        pages = table[:, torch.arange(2), at // PAGE].long()
        tokens = ids[torch.arange(2), at][:, None]
        lens = (at + 1).int().expand(2, 2)
        steps.append(program(tokens, at[:, None], cache, pages * PAGE + at % PAGE, table, lens))
    return torch.stack(steps, 1), ids


@pytest.mark.parametrize("from_disk", [False, True])
def test_steps_equal_recomputation(toy, result, tmp_path, from_disk):
    program = result.program
    if from_disk:
        save_program(program, tmp_path / "decode.pt2")
        program, _ = load_program(tmp_path / "decode.pt2")
    with torch.no_grad():
        logits, ids = _decode(runnable(program))
        every = torch.arange(70).expand(2, 70)
        expected = runnable(toy(CONFIG))(ids, every, torch.tensor([70, 70]), every)
    torch.testing.assert_close(logits[0], expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits[1, 5:], expected[1, :-5], rtol=1e-5, atol=1e-6)


def test_programs_that_read_whole_lengths_are_refused(toy):
    draft = Draft(toy(CONFIG))
    (logits,) = draft.output.args[0]
    with draft.inserting_before(draft.output):
        total = draft.call(torch.ops.aten.sum.default, (draft.user_input("seq_lens"),))
        logits = draft.call(torch.ops.aten.add.Tensor, (logits, total))
    draft.set_outputs([logits])
    with pytest.raises(UnsupportedAttentionError, match="node sum_1 reads seq_lens"):
        InsertKVCache().apply(draft.close())


def _edit(program, change):
    draft = Draft(program)
    change(draft, {node.name: node for node in draft.graph.nodes})
    return problems(draft.close(), "decode")


def test_verifier_names_a_wrong_row(result):
    def change(draft, nodes):
        nodes["lens_1"].args = (nodes["lens"], 0, 0)

    assert _edit(result.program, change) == ["node decode_attention_1 does not take lens[1]"]


def test_verifier_names_a_write_that_comes_late(result):
    def change(draft, nodes):
        nodes["decode_attention"].append(nodes["kv_write"])

    assert _edit(result.program, change) == ["node kv_write stands on the wrong side of decode_attention"]


def test_verifier_names_a_missing_write(result):
    def change(draft, nodes):
        draft.graph.erase_node(nodes["kv_write"])

    assert _edit(result.program, change) == ["2 attentions, 1 writes, and inputs for 2 layers"]
