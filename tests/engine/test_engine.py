"""The engine's own interface: prompts of every kind, streams, handles, threads, and what it refuses."""

from __future__ import annotations

import asyncio
import gc
import random
import threading

import pytest
import torch

from fluxc.engine.engine import Engine
from fluxc.engine.options import EngineOptions
from fluxc.engine.result import KvBytes
from fluxc.errors import DataError, OptionError, PlanError
from fluxc.testing import tiny_tokenizer
from fluxc.tiny_tokenizer import VOCAB
from fluxc.toy_engine import CONTEXT, ToyPrograms, toy_plan


def make(tokenizer=None, **options) -> Engine:
    plan = toy_plan([(2, 6), 5, (3, 9)])
    programs = ToyPrograms(plan)
    if tokenizer is not None:
        programs.vocabulary, programs.embed = VOCAB, torch.randn(VOCAB, 8, dtype=torch.float64)
        programs.head = torch.randn(8, VOCAB, dtype=torch.float64)
    return Engine(programs, plan, tokenizer=tokenizer, options=EngineOptions(**options))


@pytest.fixture
def engine():
    with make() as made:
        yield made
        assert not made.scheduler.busy
        assert made.scheduler.keeper.pool.used == 0


@pytest.fixture(scope="module")
def talker():
    with make(tiny_tokenizer()) as made:
        yield made


def ids(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(61), k=length)


def test_one_prompt_or_a_list(engine):
    one = engine.generate(ids(20), max_new_tokens=5)
    batch = engine.generate([ids(20), ids(70, 1), ids(1, 2)], max_new_tokens=5)
    assert batch[0].tokens == one.tokens
    assert [found.prompt_tokens for found in batch] == [20, 70, 1]
    assert engine.routes.shape == (2, 3)
    assert torch.equal(engine.routes[:, 1], batch[1].routes)
    assert engine.kv_bytes == sum((found.kv_bytes for found in batch), KvBytes(0, 0, 0))
    assert engine.kv_bytes.measured > 0


def test_values_of_each_prompt(engine):
    found = engine.generate([ids(20)] * 3, max_new_tokens=12, budget=[0.0, 1.0, 0.0], temperature=2.0, seed=[1, 1, 2])
    assert [one.sparse_ratio for one in found] == [1.0, 0.0, 1.0]
    assert found[0].tokens != found[2].tokens
    again = engine.generate([ids(20)] * 2, routes=torch.tensor([[True, False], [False, False]]), max_new_tokens=2)
    assert [one.routes.tolist() for one in again] == [[True, False], [False, False]]
    with pytest.raises(OptionError, match="2 values of budget for 3 prompts"):
        engine.generate([ids(2)] * 3, budget=[0.0, 1.0])


def test_warming_up_runs_every_program(engine):
    engine.warm_up()
    assert engine.programs.calls == ["prefill", "decode 1"] * 2
    assert engine.kv_bytes == KvBytes(0, 0, 0)


def test_timings_add_up(engine):
    found = engine.generate(ids(30), max_new_tokens=6)
    times = found.timings
    assert len(times.per_token) == 5
    assert min(times.queue, times.prefill, *times.per_token) >= 0
    assert times.decode == sum(times.per_token)
    assert times.first_token == times.queue + times.prefill


def test_streams(talker):
    text = "Some words to begin with, and then"
    whole = talker.generate(text, max_new_tokens=9, stop_strings="never")
    pieces = list(talker.generate(text, max_new_tokens=9, stream=True))
    assert tuple(piece.token for piece in pieces) == whole.tokens
    assert "".join(piece.text for piece in pieces) == whole.text
    heard: list[str] = []
    assert talker.generate(text, max_new_tokens=9, stream=heard.append).text == "".join(heard) == whole.text
    assert talker.tokenizer.decode(whole.tokens, skip_special_tokens=True) == whole.text


def test_messages_and_end_tokens(talker):
    found = talker.generate([{"role": "user", "content": "Hello"}], max_new_tokens=20, eos_token_id=list(range(400)))
    assert found.finish_reason == "stop"
    assert found.tokens[-1] < 400
    assert all(token >= 400 for token in found.tokens[:-1])
    assert found.text == talker.tokenizer.decode(found.tokens[:-1])


def test_closing_a_stream_cancels(engine):
    stream = engine.generate(ids(10), max_new_tokens=400, stream=True)
    next(stream)
    stream.close()
    assert len(engine.generate(ids(3), max_new_tokens=2).tokens) == 2
    assert not engine.scheduler.active


def test_a_cancelled_request_gives_what_it_has(engine):
    with engine.submit(ids(10), max_new_tokens=450) as handle:
        first = next(handle)
    found = handle.result(20)
    assert found.finish_reason == "cancelled"
    assert found.tokens[0] == first.token
    assert len(found.tokens) < 450


def test_many_threads_and_one_engine(engine):
    want = {n: engine.generate(ids(n), max_new_tokens=6).tokens for n in range(1, 9)}
    found = {}

    def ask(n: int) -> None:
        found[n] = engine.generate(ids(n), max_new_tokens=6).tokens

    threads = [threading.Thread(target=ask, args=(n,)) for n in want]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == want


def test_async_readers(engine):
    async def read(prompt, count):
        return [piece.token async for piece in engine.submit(prompt, max_new_tokens=count)]

    async def leave(prompt):
        async with engine.submit(prompt, max_new_tokens=400) as handle:
            async for _ in handle:
                break
        return handle

    async def both():
        return await asyncio.gather(*(read(ids(9, n), 7) for n in range(6)), leave(ids(4)))

    *rows, handle = asyncio.run(both())
    assert rows == [list(engine.generate(ids(9, n), max_new_tokens=7).tokens) for n in range(6)]
    assert handle.result(20).finish_reason == "cancelled"


def test_a_handle_keeps_its_engine():
    handle = make().submit(ids(10), max_new_tokens=30)
    gc.collect()
    assert len(handle.result(30).tokens) == 30


def test_a_closed_engine_ends_its_requests():
    engine = make()
    handle = engine.submit(ids(10), max_new_tokens=450)
    next(handle)
    engine.close()
    with pytest.raises(DataError, match="closed"):
        list(handle)
    with pytest.raises(DataError, match="closed"):
        engine.submit(ids(3))


def test_a_fault_of_the_programs_reaches_the_caller_and_the_engine_goes_on(engine, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(engine.programs, "decode", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.generate(ids(10), max_new_tokens=3)
    assert len(engine.generate(ids(10), max_new_tokens=3).tokens) == 3


def test_the_context_ends_an_answer(engine):
    found = engine.generate(ids(CONTEXT - 3), max_new_tokens=50)
    assert (len(found.tokens), found.finish_reason) == (3, "length")


@pytest.mark.parametrize(
    ("prompt", "options", "error", "said"),
    [
        ([], {}, DataError, "no tokens"),
        ([5] * CONTEXT, {}, DataError, f"no room for an answer in a context of {CONTEXT}"),
        ([5, 61], {}, DataError, "token 61 is outside the model's vocabulary of 61"),
        ([-1], {}, DataError, "token -1"),
        ("text", {}, DataError, "tokenizer"),
        ([5], {"num_beams": 2}, OptionError, "num_beams"),
        ([5], {"max_new_tokens": 0}, OptionError, "max_new_tokens"),
        ([5], {"budget": 1.5}, PlanError, "1.5"),
        ([5], {"budget": 0.001}, PlanError, "outside what this plan was calibrated for"),
        ([5], {"routes": [True]}, PlanError, "routes have shape"),
        ([5], {"stop_strings": "a"}, DataError, "tokenizer"),
        ([[5], [6]], {"stream": True}, OptionError, "one prompt"),
        ([[5], []], {}, DataError, "no tokens"),
    ],
)
def test_bad_requests_are_refused_before_they_start(engine, prompt, options, error, said):
    with pytest.raises(error, match=said):
        engine.generate(prompt, **options)


def test_a_list_longer_than_the_batch_waits_its_turn():
    with make(max_batch=2) as engine:
        found = engine.generate([ids(5, n) for n in range(7)], max_new_tokens=4)
        assert [len(one.tokens) for one in found] == [4] * 7
        assert {call for call in engine.programs.calls if call.startswith("decode")} <= {"decode 1", "decode 2"}


def test_a_pool_takes_no_more_than_there_is():
    with pytest.raises(OptionError, match=r"kv_memory of .* is more than the .* bytes that are free"):
        make(kv_memory=2**60)
    with make() as engine:
        # 16 requests of the whole context: two layers of 8 pages, one with a ring of 5 slots.
        assert engine.scheduler.keeper.pool.total == 16 * 17


def test_a_pool_must_hold_a_page_a_layer():
    with pytest.raises(OptionError, match="less than one page a layer"):
        make(kv_memory=5000)
