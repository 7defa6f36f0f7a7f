"""TracedPrograms: prefill bit for bit, decode and further turns against recomputing the whole text, each family."""

from __future__ import annotations

import functools
import gc
import weakref

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fluxc
from fluxc.engine.programs import LayerKV, Prefilled
from fluxc.engine.shapes import LayerShape
from fluxc.engine.traced import TracedPrograms
from fluxc.errors import UnsupportedAttentionError
from fluxc.ir.graph import Draft, runnable, user_inputs
from fluxc.ir.sparse import SparseSettings
from fluxc.passes import route_pipeline
from fluxc.passes.apply_plan import ApplyPlan
from fluxc.testing import TINY_FAMILIES, ToyConfig, toy_routed_inputs
from fluxc.tiny_models import WINDOW, build
from fluxc.toy_cache import ToyCache

SINK, SPARSE = 2, 4  # what `toy_routed` gives every routable layer
TOYS = {
    "plain": ToyConfig(windows=(0, 0)),
    "own-window": ToyConfig(windows=(0, 6, 0), softcap=3.0, qk_norm=True),
    "grouped": ToyConfig(windows=(0, 0, 0), heads=4, kv_heads=2, rope="interleaved"),
}
# Sinks, experts and windows; learned positions. The rest runs with the slow tests.
FAMILIES = ("gpt-oss", "opt")
# Sums of another order; a few units in the last place of logits around 3.
CLOSE = {"rtol": 1e-5, "atol": 3e-6}


@functools.cache
def family(name):
    """The tiny model `name`, routed."""
    captured = fluxc.capture(TINY_FAMILIES[name]()).program
    return route_pipeline(pool=4, sparse=SparseSettings(sink=SINK, window=SPARSE)).run(captured, "captured").program


class Texts:
    """Three requests with routes of their own on one cache, and the program that recomputes them."""

    LENGTHS = (9, 23, 3)

    def __init__(self, program, *, merge="copy", lengths=LENGTHS, sink=SINK, window=SPARSE):
        self.programs = TracedPrograms(program, merge=merge)
        self._whole = runnable(program)
        self._is_routed = "route_bias" in user_inputs(program)
        layers = sum(layer.routable for layer in self.programs.layers)
        mixed = torch.tensor([torch.inf if row % 2 else -torch.inf for row in range(layers)])
        self.biases = [torch.full((layers,), torch.inf), torch.full((layers,), -torch.inf), mixed]
        self._generator = torch.Generator().manual_seed(len(lengths) + layers)
        self.cache = ToyCache(self.programs, sink, window, room=150, requests=3)
        self.prompts = lengths
        self.first = [
            self.cache.prefill(self.tokens(length), bias) for length, bias in zip(lengths, self.biases, strict=True)
        ]

    def tokens(self, count):
        return torch.randint(self.programs.vocabulary, (count,), generator=self._generator).tolist()

    def recompute(self, row, at):
        """Logits [N,V] of rows `at` of the whole text of request `row`, under the routes its prompt was given."""
        ids = torch.tensor([self.cache.requests[row].tokens])
        lens, at = torch.tensor([ids.shape[1]]), torch.tensor([at])
        inputs = (ids, torch.arange(ids.shape[1])[None], lens)
        if self._is_routed:
            inputs += (torch.tensor([self.prompts[row]]), self.biases[row][:, None])
        with torch.no_grad():
            result = self._whole(*inputs, at)
        return (result[0] if self._is_routed else result)[0]

    def check_decode(self, steps):
        for _ in range(steps):
            logits = self.cache.decode(self.tokens(3))
            for row, request in enumerate(self.cache.requests):
                want = self.recompute(row, [len(request.tokens) - 1])[0]
                torch.testing.assert_close(logits[row], want, **CLOSE)

    def check_turn(self, *counts):
        starts = [len(request.tokens) for request in self.cache.requests]
        at = [sorted({0, count // 2, count - 1}) for count in counts]
        rows = torch.tensor([(row * 3)[:3] for row in at])
        logits = self.cache.append([self.tokens(count) for count in counts], rows)
        for row, start in enumerate(starts):
            want = self.recompute(row, [start + turn_row for turn_row in rows[row].tolist()])
            torch.testing.assert_close(logits[row], want, **CLOSE)


def _prompt():
    """Arguments of a prefill of 24 tokens, its routes left to the routers of two layers."""
    ids, _, _, prompts, bias, at = toy_routed_inputs(2, 0.0, batch=1)
    return ids, prompts, bias, at


@pytest.fixture(params=TOYS)
def toy_program(request, toy_routed):
    return toy_routed(TOYS[request.param])


@pytest.mark.parametrize("bias", [torch.inf, -torch.inf, 0.0])
def test_prefill_is_the_routed_program_bit_for_bit(toy_program, bias):
    programs = TracedPrograms(toy_program, merge="no")
    layers = sum(layer.routable for layer in programs.layers)
    inputs = toy_routed_inputs(layers, bias, batch=1, length=29)
    *kv, end = programs.prefill(inputs[0], inputs[3], inputs[4], inputs[5])
    with torch.no_grad():
        logits, routes, scores = runnable(toy_program)(*inputs)
    assert torch.equal(end.logits, logits)
    assert torch.equal(end.routes, routes[:, 0])
    assert torch.equal(end.scores, scores[:, 0])
    assert [item.index for item in kv] == list(range(len(programs.layers)))
    by_row = iter(routes[:, 0].tolist())
    assert [item.route for item in kv] == [next(by_row) if layer.routable else None for layer in programs.layers]


def test_dense_prefill_is_the_captured_program_bit_for_bit(toy, toy_routed):
    programs = TracedPrograms(toy_routed(TOYS["own-window"]), merge="no")
    ids, positions, lens, prompts, bias, at = toy_routed_inputs(2, -torch.inf, batch=1)
    *kv, end = programs.prefill(ids, prompts, bias, at, dense=True)
    with torch.no_grad():
        assert torch.equal(end.logits, runnable(toy(TOYS["own-window"]))(ids, positions, lens, at))
    assert (end.routes.tolist(), end.scores) == ([True, True], None)
    assert [item.route for item in kv] == [True, None, True]


@pytest.mark.parametrize("merge", ["no", "copy"])
def test_steps_and_turns_equal_recomputation(toy_program, merge):
    """Rings of 4 and 6 slots wrap several times, the longest text passes a page."""
    texts = Texts(toy_program, merge=merge)
    for row, first in enumerate(texts.first):
        want = texts.recompute(row, [texts.prompts[row] - 1])
        torch.testing.assert_close(first.logits[0], want, **(CLOSE if merge == "copy" else {"rtol": 0, "atol": 0}))
    texts.check_decode(9)
    texts.check_turn(13, 1, 6)
    texts.check_decode(2)
    texts.check_turn(40, 45, 2)
    texts.check_decode(1)


@settings(max_examples=5, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    sink=st.integers(0, 5),
    window=st.integers(1, 9),
    lengths=st.tuples(*[st.integers(1, 70)] * 3),
    turns=st.lists(st.tuples(*[st.integers(1, 20)] * 3), min_size=1, max_size=3),
)
def test_any_sizes(toy_routed, sink, window, lengths, turns):
    """Prompts, rings and turns of any length, in any relation to each other and to the pages."""
    sizes = SparseSettings(sink=sink, window=window)
    program = ApplyPlan({0: sizes, 2: sizes}).apply(toy_routed(TOYS["own-window"])).program
    texts = Texts(program, lengths=lengths, sink=sink, window=window)
    for counts in turns:
        texts.check_decode(2)
        texts.check_turn(*counts)
    texts.check_decode(1)


@pytest.mark.parametrize("kind", [{"kind": "triangle", "last": 3}, {"decode_full": True}])
def test_what_the_prompt_saw_does_not_change_what_is_kept(toy_routed, kind):
    kinds = SparseSettings(**{"sink": SINK, "window": SPARSE, **kind})
    program = ApplyPlan({0: kinds, 1: kinds}).apply(toy_routed(TOYS["plain"])).program
    texts = _all_kept(program) if "decode_full" in kind else Texts(program)
    texts.check_decode(7)
    texts.check_turn(5, 1, 11)


def _all_kept(program):
    """What the engine keeps with `decode: full`: every token, whatever the prompt's routes were."""
    texts = Texts(program)
    kept = ToyCache(texts.programs, 0, 150, room=150, requests=3)
    for request, bias in zip(texts.cache.requests, texts.biases, strict=True):
        kept.prefill(request.tokens, bias)
    for request in kept.requests:
        request.rings = [None] * len(request.rings)
    texts.cache = kept
    return texts


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name):
    _check_family(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(TINY_FAMILIES) - set(FAMILIES)))
def test_other_families(name):
    _check_family(name)


def _check_family(name):
    limited = TracedPrograms(family(name)).rope_limit
    lengths = (3, limited + 5, 2) if limited else Texts.LENGTHS
    texts = Texts(family(name), lengths=lengths)
    texts.check_decode(6)
    texts.check_turn(5, 1, 7)


def test_requests_past_the_rope_limit_do_not_turn_the_others():
    texts = Texts(family("phi3-longrope"), lengths=(3, 30, 2))
    assert texts.programs.rope_limit == 16
    texts.check_decode(2)
    texts.check_turn(2, 9, 1)


def test_model_without_routable_layers():
    model = build("mistral", **{**_mistral(), "sliding_window": WINDOW})
    program = fluxc.capture(model).program
    texts = Texts(program)
    assert [layer.window for layer in texts.programs.layers] == [WINDOW, WINDOW]
    assert (texts.first[0].routes.shape, texts.first[0].scores) == ((0,), None)
    texts.check_decode(12)
    texts.check_turn(11, 3, 1)


def _mistral():
    config = TINY_FAMILIES["mistral"]().config.to_dict()
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")
    return {name: config[name] for name in (*kept, "num_key_value_heads", "max_position_embeddings")}


def test_layers_are_described(toy_routed):
    programs = TracedPrograms(toy_routed(TOYS["own-window"]), context=77)
    assert programs.layers == (
        LayerShape(layer=0, routable=True, row=0, kv_heads=1, head_dim=8, window=0),
        LayerShape(layer=1, routable=False, row=None, kv_heads=1, head_dim=8, window=6),
        LayerShape(layer=2, routable=True, row=1, kv_heads=1, head_dim=8, window=0),
    )
    assert (programs.vocabulary, programs.context, programs.rope_limit) == (32, 77, 0)
    assert (programs.dtype, programs.device) == (torch.float32, torch.device("cpu"))


def test_phases_share_one_set_of_weights(toy_routed):
    program = toy_routed(TOYS["own-window"])
    programs = TracedPrograms(program)
    list(programs.prefill(*_prompt()))
    list(programs.prefill(*_prompt(), dense=True))
    modules = [programs.decode_graph, programs._append]
    modules += [piece.module for phases in (programs._phases, programs._dense_phases) for piece in phases.pieces()]
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for m in modules for t in m.parameters()}
    assert sum(held.values()) == sum(t.numel() * t.element_size() for t in program.state_dict.values())


def test_keys_and_values_live_no_longer_than_their_holder(toy_routed):
    programs = TracedPrograms(toy_routed(TOYS["plain"]), merge="copy")
    watched = []
    for item in programs.prefill(*_prompt()):
        gc.collect()
        assert all(ref() is None for ref in watched), "the layer before is still there"
        if isinstance(item, LayerKV):
            assert all(x.untyped_storage().nbytes() == x.nbytes for x in (item.k, item.v))
            watched += [weakref.ref(item.k), weakref.ref(item.v)]
        del item
    assert len(watched) == 4


def test_other_work_between_two_layers(toy_routed):
    """Decode steps of other requests between the layers of a prefill leave it as it is."""
    texts = Texts(toy_routed(TOYS["plain"]))
    args = _prompt()
    *_, alone = texts.programs.prefill(*args)
    items = []
    for item in texts.programs.prefill(*args):
        texts.check_decode(1)
        items.append(item)
    assert isinstance(items[-1], Prefilled)
    assert torch.equal(items[-1].logits, alone.logits)


def test_gradients_are_not_recorded_and_not_switched_off(toy_routed):
    programs = TracedPrograms(toy_routed(TOYS["plain"]))
    modes = [(torch.is_grad_enabled(), torch.is_inference_mode_enabled()) for _ in programs.prefill(*_prompt())]
    assert set(modes) == {(True, False)}
    *_, end = programs.prefill(*_prompt())
    assert not end.logits.requires_grad


def test_layers_that_one_cache_cannot_hold_are_refused(toy):
    draft = Draft(toy(TOYS["plain"]))
    (first, _) = [node for node in draft.graph.nodes if node.name.startswith("attention")]
    with draft.inserting_before(first):
        k, v = (draft.call(torch.ops.aten.repeat.default, (node, [1, 2, 1, 1])) for node in first.args[1:3])
    first.args = (first.args[0], k, v)
    with pytest.raises(UnsupportedAttentionError, match="layer 0 caches 2 heads of 8, layer 1 1 heads of 8"):
        TracedPrograms(draft.close())
