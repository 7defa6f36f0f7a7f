"""Continuous batching over an exact model: tokens, pages and interleaving do not depend on who else is running."""

from __future__ import annotations

import dataclasses
import random
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxc.engine.engine import Engine
from fluxc.engine.options import EngineOptions
from fluxc.engine.programs import LayerKV
from fluxc.errors import DataError
from fluxc.kernels.schemas import PAGE
from fluxc.toy_engine import ToyPrograms, toy_plan

RINGS = ((2, 6), 5, (3, 9))


def make(rings=RINGS, decode="sparse", pages=None, rope_limit=0, crossover=0, **options) -> Engine:
    plan = toy_plan(rings, decode)
    programs = ToyPrograms(plan, rope_limit=rope_limit)
    page_bytes = 2 * PAGE * 4 * 8
    memory = {} if pages is None else {"kv_memory": pages * page_bytes}
    settings = EngineOptions(**{"max_batch": 4, **memory, **options})
    engine = Engine(programs, plan, options=settings, crossover=lambda budget: crossover)
    # What nobody wrote must not be read.
    engine.scheduler.runner.cache.fill_(torch.nan)
    return engine


def ids(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(61), k=length)


def drive(engine: Engine, *requests, until=None) -> list:
    """Step until all is done; the results."""
    for request in requests:
        engine.scheduler.add(request)
    while engine.scheduler.step():
        if until and until():
            break
    return [request.handle.result(0) for request in requests] if until is None else []


def recomputed(engine: Engine, prompt: list[int], routes: list[bool], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(engine.programs.logits(tokens, len(prompt), routes)[-1].argmax()))
    return tokens[len(prompt) :]


def empty(engine: Engine) -> bool:
    pool = engine.scheduler.keeper.pool
    return (pool.free, pool.unclaimed) == (pool.total, pool.total)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    st.integers(1, 150),
    st.integers(1, 90),
    st.lists(st.booleans(), min_size=2, max_size=2),
    st.sampled_from([RINGS, ((0, 3), 2, (70, 5)), ((1, 1), 64, (4, 60))]),
    st.sampled_from(["sparse", "full"]),
)
def test_every_token_is_that_of_full_recomputation(length, count, routes, rings, decode):
    engine = make(rings, decode)
    request = engine.prepare(ids(length), routes=routes, max_new_tokens=count)
    (found,) = drive(engine, request)
    assert list(found.tokens) == recomputed(engine, ids(length), routes, count)
    assert found.routes.tolist() == routes
    assert empty(engine)


def test_planned_and_measured_bytes():
    engine = make()
    (found,) = drive(engine, engine.prepare(ids(200), routes=[True, False], max_new_tokens=30))
    page_bytes = engine.scheduler.keeper.page_bytes
    assert found.kv_bytes.measured == (4 + 1 + 1) * page_bytes
    # float64 programs under a plan that counts float32.
    assert found.kv_bytes.planned * 2 == (229 + 5 + 12) * 2 * 4 * 8
    assert found.kv_bytes.peak >= found.kv_bytes.measured + 200 * 2 * 4 * 8 - 2 * page_bytes


def test_keys_of_one_layer_are_in_transit_at_a_time(monkeypatch):
    engine = make()
    prefill = engine.programs.prefill
    alive: list[weakref.ref] = []

    def watched(*args, **kwargs):
        for item in prefill(*args, **kwargs):
            assert [ref for ref in alive if ref() is not None] == []
            if isinstance(item, LayerKV):
                k = item.k.clone()
                alive.append(weakref.ref(k))
                item = dataclasses.replace(item, k=k)
                del k
            yield item
            del item

    monkeypatch.setattr(engine.programs, "prefill", watched)
    (found,) = drive(engine, engine.prepare(ids(30), max_new_tokens=2))
    assert (len(found.tokens), len(alive)) == (2, 3)


def test_answers_do_not_depend_on_batch_mates():
    prompts = [ids(length, seed) for seed, length in enumerate([3, 90, 17, 140, 1, 66])]
    alone = [drive(engine := make(), engine.prepare(p, max_new_tokens=40, temperature=0.9, seed=7)) for p in prompts]
    engine = make()
    together = drive(engine, *(engine.prepare(p, max_new_tokens=40, temperature=0.9, seed=7) for p in prompts))
    for (single,), found in zip(alone, together, strict=True):
        assert found.tokens == single.tokens
        assert torch.equal(found.scores, single.scores)
        assert torch.equal(found.routes, single.routes)
    assert empty(engine)
    assert any(call in engine.programs.calls for call in ("decode 3", "decode 4"))


def test_a_prefill_is_interleaved_with_decode_steps():
    engine = make([(2, 6)] * 8, max_decode_stall_ms=0)
    first = engine.prepare(ids(5), max_new_tokens=60)
    drive(engine, first, until=lambda: len(first.tokens) == 3)
    engine.programs.calls.clear()
    second = engine.prepare(ids(100, 1), max_new_tokens=2)
    drive(engine, second, until=lambda: second.tokens)
    assert engine.programs.calls.count("decode 1") >= 8
    patient = make([(2, 6)] * 8, max_decode_stall_ms=60_000)
    first = patient.prepare(ids(5), max_new_tokens=60)
    drive(patient, first, until=lambda: len(first.tokens) == 3)
    patient.programs.calls.clear()
    second = patient.prepare(ids(100, 1), max_new_tokens=2)
    drive(patient, second, until=lambda: second.tokens)
    assert patient.programs.calls.count("decode 1") == 0


def test_pages_are_promised_before_a_request_starts():
    # 3 layers: 150 tokens that may be full in 2 of them need 3 + 1 + 3 pages.
    engine = make(pages=8)
    first, second = (engine.prepare(ids(100, seed), max_new_tokens=51) for seed in range(2))
    drive(engine, first, second, until=lambda: len(first.tokens) == 20)
    assert second in engine.scheduler.waiting
    drive(engine)
    assert [request.requeues for request in (first, second)] == [0, 0]
    assert len(second.handle.result(0).tokens) == 51
    assert empty(engine)


def test_what_cannot_fit_is_refused_with_the_numbers_and_others_go_on():
    engine = make(pages=8)
    with pytest.raises(DataError, match=r"251 tokens needs 9 pages of KV .* the pool has 8"):
        engine.prepare(ids(200), max_new_tokens=52)
    (found,) = drive(engine, engine.prepare(ids(200), routes=[False, False], max_new_tokens=52))
    assert len(found.tokens) == 52


def test_expected_admission_puts_back_and_computes_again():
    engine = make(pages=12, admission="expected")
    prompts = [ids(60 + 9 * seed, seed) for seed in range(5)]
    made = [engine.prepare(p, budget=0.01, max_new_tokens=80) for p in prompts]
    for request in made:
        # The routers say full where the budget lets expect sparse.
        request.sequence.bias = [30.0, 30.0]
    results = drive(engine, *made)
    assert sum(found.requeues for found in results) > 0
    for prompt, found in zip(prompts, results, strict=True):
        assert list(found.tokens) == recomputed(engine, prompt, [True, True], 80)
    assert empty(engine)


def test_expected_admission_fails_what_can_never_fit_and_goes_on():
    engine = make(pages=5, admission="expected")
    bad, good = engine.prepare(ids(100), budget=0.01, max_new_tokens=90), engine.prepare(ids(20, 1), max_new_tokens=5)
    bad.sequence.bias = [30.0, 30.0]
    drive(engine, bad, good, until=lambda: False)
    with pytest.raises(DataError, match="pages"):
        bad.handle.result(0)
    assert len(good.handle.result(0).tokens) == 5
    assert empty(engine)


def test_a_request_that_fails_leaves_the_others_alone(monkeypatch):
    engine = make()
    good, bad = engine.prepare(ids(30), max_new_tokens=9), engine.prepare(ids(31, 1), max_new_tokens=9)
    monkeypatch.setattr(bad.sampler, "ends", lambda token: 1 / 0)
    drive(engine, good, bad, until=lambda: False)
    assert len(good.handle.result(0).tokens) == 9
    with pytest.raises(ZeroDivisionError):
        bad.handle.result(0)
    assert empty(engine)


@pytest.mark.parametrize("limit", [40, 64])
@pytest.mark.parametrize("dense", [False, True])
def test_keys_are_made_anew_past_the_rope_limit(limit, dense):
    engine = make(rope_limit=limit)
    routes = [True, True] if dense else [True, False]
    (found,) = drive(engine, engine.prepare(ids(limit - 5), routes=routes, max_new_tokens=20))
    assert list(found.tokens) == recomputed(engine, ids(limit - 5), routes, 20)
    assert engine.programs.calls.count("prefill") == 2


def test_short_prompts_run_dense_below_the_crossover():
    engine = make(crossover=50)
    short, long = drive(engine, *(engine.prepare(ids(n), budget=0.0, max_new_tokens=70) for n in (49, 50)))
    assert (short.scores, short.sparse_ratio) == (None, 0.0)
    assert (long.scores is None, long.sparse_ratio) == (False, 1.0)
    assert list(short.tokens) == recomputed(engine, ids(49), [True, True], 70)


def test_a_budget_is_a_value_of_each_request():
    engine = make()
    found = drive(engine, *(engine.prepare(ids(90), budget=b, max_new_tokens=3) for b in (0.0, 0.01, 0.99, 1.0)))
    assert [one.sparse_ratio for one in found] == [1.0, 1.0, 0.0, 0.0]
