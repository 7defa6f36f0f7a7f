"""Pass insert-slot-cache: the decode program's form, and each step against recomputing the whole text."""

from __future__ import annotations

import pytest
import torch

import fluxc
from fluxc.archive import load_program, save_program
from fluxc.errors import UnsupportedAttentionError
from fluxc.ir.graph import Draft, runnable, user_inputs
from fluxc.ir.kv import free_size
from fluxc.passes.drop_routers import DropRouters
from fluxc.passes.insert_slot_cache import InsertSlotCache
from fluxc.passes.rope_per_request import RopePerRequest
from fluxc.testing import TINY_FAMILIES, ToyConfig, toy_inputs

GROUPED = ToyConfig(windows=(0, 6, 0), heads=4, kv_heads=2, softcap=3.0, qk_norm=True)
CLOSE = {"rtol": 1e-5, "atol": 3e-6}  # sums of another order


def steps(program, whole, windows, heads, width, vocab=32, length=20):
    """Decode two requests token by token, the second three tokens behind, and compare each step."""
    run, ids = runnable(program), torch.randint(vocab, (2, length), generator=torch.Generator().manual_seed(1))
    at = torch.arange(length).repeat(2, 1)
    with torch.no_grad():
        expected = runnable(whole)(ids, at, torch.tensor([length, length]), at)
    sizes = [window or length for window in windows]
    caches = [torch.full((2, heads, size, width), 7.0) for size in sizes for _ in "kv"]
    for step in range(length):
        now = torch.tensor([step, max(step - 3, 0)])
        slots = torch.stack([now % size for size in sizes])
        lens = torch.stack([(now + 1).clamp(max=size) for size in sizes]).int()
        tokens = ids[torch.arange(2), now][:, None]
        with torch.no_grad():
            logits, *caches = run(tokens, now[:, None], slots, lens, *caches)
        for row, position in enumerate(now.tolist()):
            torch.testing.assert_close(logits[row], expected[row, position], **CLOSE)


def test_steps_equal_recomputation(toy):
    result = InsertSlotCache().apply(toy(GROUPED))
    assert (result.count, result.modified) == (3, True)
    steps(result.program, toy(GROUPED), GROUPED.windows, 2, 8)


def test_signature_and_ops(toy):
    program = InsertSlotCache().apply(toy(ToyConfig(windows=(0, 0)))).program
    caches = tuple(f"{name}_cache_{layer}" for layer in (0, 1) for name in "kv")
    assert user_inputs(program) == ("input_ids", "position_ids", "slots", "lens", *caches)
    outputs = [node.name for node in program.graph.output_node().args[0]]
    assert outputs == ["logits", *(f"{name}_out" for name in caches)]
    assert not any("fluxc" in str(node.target) for node in program.graph.nodes)


def test_the_given_program_is_not_changed(toy):
    before = str(toy(GROUPED).graph)
    InsertSlotCache().apply(toy(GROUPED))
    assert str(toy(GROUPED).graph) == before


def test_routed_programs_lose_their_routers_first(toy, toy_routed):
    program = RopePerRequest().apply(DropRouters().apply(toy_routed(GROUPED)).program).program
    steps(InsertSlotCache().apply(program).program, toy(GROUPED), GROUPED.windows, 2, 8)


def test_sink_logits():
    captured = fluxc.capture(TINY_FAMILIES["gpt-oss"]()).program
    window = [layer.window for layer in fluxc_layers(captured)]
    steps(InsertSlotCache().apply(captured).program, captured, window, 2, 8, vocab=97)


def fluxc_layers(program):
    from fluxc.engine.traced import layer_shapes

    return layer_shapes(program)


def test_a_request_without_slots_is_finite(toy):
    run = runnable(InsertSlotCache().apply(toy(ToyConfig(windows=(0,)))).program)
    ids = toy_inputs(2, 1)[0]
    lens = torch.tensor([[1, 0]], dtype=torch.int32)
    with torch.no_grad():
        logits, *_ = run(ids, ids * 0, torch.zeros(1, 2, dtype=torch.int64), lens, *torch.zeros(2, 2, 1, 4, 8))
    assert bool(logits.isfinite().all())


def test_layers_that_differ_are_refused(toy):
    draft = Draft(toy(ToyConfig(windows=(0, 0))))
    (first, _) = [node for node in draft.graph.nodes if node.name.startswith("attention")]
    with draft.inserting_before(first):
        k, v = (draft.call(torch.ops.aten.repeat.default, (node, [1, 2, 1, 1])) for node in first.args[1:3])
    first.args = (first.args[0], k, v)
    with pytest.raises(UnsupportedAttentionError, match="layer 0 caches 2 heads of 8, layer 1 1 heads of 8"):
        InsertSlotCache().apply(draft.close())


def test_sizes_of_a_loaded_program_stay_apart(toy, tmp_path):
    """torch names a size by a number below 100 and does not know those of a loaded program."""
    save_program(toy(ToyConfig(windows=(0,))), tmp_path / "toy.pt2")
    draft = Draft(load_program(tmp_path / "toy.pt2")[0])
    own = {str(size) for node in draft.placeholders() for size in node.meta["val"].shape}
    added = [str(free_size(draft)) for _ in range(100)]
    assert len(own | set(added)) == len(own) + 100
