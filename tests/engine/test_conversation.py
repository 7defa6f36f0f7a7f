"""Further turns on a kept cache: the same tokens as full recomputation under the first turn's routes."""

from __future__ import annotations

import gc
import random
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxc.engine.engine import Engine
from fluxc.engine.options import EngineOptions
from fluxc.errors import DataError, OptionError
from fluxc.kernels.schemas import PAGE
from fluxc.toy_engine import ToyPrograms, toy_plan

RINGS = ((2, 6), 5, (3, 9))


def make(rings=RINGS, pages=60, rope_limit=0, tokenizer=None, eos_ids=(), **options) -> Engine:
    plan = toy_plan(rings)
    programs = ToyPrograms(plan, rope_limit=rope_limit)
    settings = EngineOptions(max_batch=4, kv_memory=pages * 2 * PAGE * 4 * 8, **options)
    engine = Engine(programs, plan, options=settings, tokenizer=tokenizer, eos_ids=eos_ids)
    engine.scheduler.runner.cache.fill_(torch.nan)
    return engine


def ids(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(61), k=length)


def continued(engine: Engine, tokens: list[int], prompt: int, routes, count: int) -> list[int]:
    """Greedy tokens after `tokens`, of which `prompt` chose the routes."""
    tokens, before = list(tokens), len(tokens)
    for _ in range(count):
        tokens.append(int(engine.programs.logits(tokens, prompt, routes)[-1].argmax()))
    return tokens[before:]


def used(engine: Engine) -> int:
    return engine.scheduler.keeper.pool.used


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(1, 70), st.integers(1, 15)), min_size=2, max_size=4),
    st.lists(st.booleans(), min_size=2, max_size=2),
    st.sampled_from([1, 7, 1024]),
    st.sampled_from([RINGS, ((0, 3), 2, (70, 5))]),
    st.sampled_from([0, 60]),
)
def test_turns_equal_recomputation_with_the_first_turns_routes(turns, routes, turn_tokens, rings, rope_limit):
    with make(rings, turn_tokens=turn_tokens, rope_limit=rope_limit) as engine:
        talk, known = engine.conversation(), []
        for number, (length, count) in enumerate(turns):
            new = ids(length, number)
            chosen = {} if number else {"routes": routes}
            found = engine.generate(new, conversation=talk, max_new_tokens=count, **chosen)
            known += new
            assert found.prompt_tokens == len(known)
            assert list(found.tokens) == continued(engine, known, turns[0][0], routes, count)
            assert found.routes.tolist() == routes
            known += found.tokens
        assert talk.tokens == tuple(known)
        if not rope_limit:
            assert engine.programs.calls.count("prefill") == 1
        assert used(engine) > 0
        talk.close()
        assert used(engine) == 0


def test_a_forgotten_conversation_gives_its_pages_back():
    with make() as engine:
        talk = engine.conversation()
        engine.generate(ids(40), conversation=talk, max_new_tokens=5)
        assert used(engine) > 0
        del talk
        deadline = time.monotonic() + 20
        while used(engine) and time.monotonic() < deadline:
            gc.collect()
        assert used(engine) == 0
        assert engine.scheduler.keeper.idle == []


def test_a_reroute_computes_the_whole_text_as_one_prompt():
    with make() as engine, engine.conversation() as talk:
        engine.generate(ids(40), conversation=talk, routes=[True, False], max_new_tokens=5)
        known = [*talk.tokens, *ids(9, 1)]
        found = engine.generate(ids(9, 1), conversation=talk, reroute=True, budget=0.0, max_new_tokens=6)
        assert found.routes.tolist() == [False, False]
        assert list(found.tokens) == continued(engine, known, len(known), [False, False], 6)
        assert used(engine) == 3
        with pytest.raises(OptionError, match="keeps the routes"):
            engine.generate(ids(3), conversation=talk, budget=0.5)


def test_a_kept_conversation_gives_way_and_is_computed_again():
    # Each needs 3 + 1 + 1 pages under these routes; the pool holds one of them.
    with make(pages=7) as engine, engine.conversation() as talk:
        first = engine.generate(ids(150), conversation=talk, routes=[True, False], max_new_tokens=5)
        known = [*ids(150), *first.tokens]
        other = engine.generate(ids(160, 1), routes=[True, False], max_new_tokens=5)
        assert list(other.tokens) == continued(engine, ids(160, 1), 160, [True, False], 5)
        assert used(engine) == 0
        second = engine.generate(ids(4, 2), conversation=talk, max_new_tokens=5)
        assert list(second.tokens) == continued(engine, [*known, *ids(4, 2)], 150, [True, False], 5)
        assert engine.programs.calls.count("prefill") == 3


def test_a_cancelled_turn_frees_its_pages_and_the_conversation_goes_on():
    with make() as engine, engine.conversation() as talk:
        first = engine.generate(ids(30), conversation=talk, max_new_tokens=4)
        handle = engine.submit(ids(5, 1), conversation=talk, max_new_tokens=300)
        next(handle)
        with pytest.raises(DataError, match="still running"):
            engine.submit(ids(1), conversation=talk)
        handle.cancel()
        part = handle.result(20)
        assert part.finish_reason == "cancelled"
        assert used(engine) == 0
        known = [*ids(30), *first.tokens, *ids(5, 1), *part.tokens]
        assert talk.tokens == tuple(known)
        found = engine.generate(ids(3, 2), conversation=talk, max_new_tokens=4)
        assert list(found.tokens) == continued(engine, [*known, *ids(3, 2)], 30, found.routes.tolist(), 4)


def test_the_context_counts_all_turns():
    with make() as engine, engine.conversation() as talk:
        engine.generate(ids(300), conversation=talk, max_new_tokens=100)
        with pytest.raises(DataError, match="a prompt of 512 tokens leaves no room"):
            engine.generate(ids(112), conversation=talk)
        assert len(engine.generate(ids(102), conversation=talk, max_new_tokens=100).tokens) == 10


class Chat:
    """A tokenizer of single characters with a chat template, for a vocabulary of 61."""

    chat_template = "in Python, below"
    letters = "".join(map(chr, range(64, 122)))

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [self.letters.index(x) if x in self.letters else 60 for x in text]}

    def decode(self, tokens, skip_special_tokens=False):
        return "".join(self.letters[t] if t < 58 else "" if skip_special_tokens else "_" for t in tokens)

    def apply_chat_template(self, messages, add_generation_prompt=True, tokenize=True, return_dict=True):
        text = "".join(f"{m['role'][0].upper()}:{m['content'].strip()}_" for m in messages)
        text += "A:" if add_generation_prompt else ""
        return self(text) if tokenize else text


def end_after(programs: ToyPrograms, steps: int) -> None:
    """Make the end token the most likely one from that decode step on."""
    decode = programs.decode

    def biased(*args):
        logits = decode(*args)
        logits[:, 60] += 1000.0 * (sum(call.startswith("decode") for call in programs.calls) >= steps)
        return logits

    programs.decode = biased


@pytest.mark.parametrize("stops", [False, True])
def test_chat_turns_continue_the_rendered_text(stops):
    """A finished answer ends with the token 60, the template's end of message."""
    tokenizer = Chat()
    with make(tokenizer=tokenizer, eos_ids=[60]) as engine, engine.conversation() as talk:
        hello = [{"role": "user", "content": "hello"}]
        options = {} if stops else {"eos_token_id": []}
        if stops:
            end_after(engine.programs, 3)
        first = engine.generate(hello, conversation=talk, max_new_tokens=7, **options)
        assert (first.finish_reason == "stop") == stops
        prompt = len(tokenizer.apply_chat_template(hello)["input_ids"])
        more = [{"role": "user", "content": "andmore"}]
        engine.generate(more, conversation=talk, max_new_tokens=2, **options)
        turn = "U:andmore_A:" if stops else "_U:andmore_A:"
        known = [*tokenizer.apply_chat_template(hello)["input_ids"], *first.tokens, *tokenizer(turn)["input_ids"]]
        assert list(talk.tokens[: len(known)]) == known
        assert first.prompt_tokens == prompt
        assert [message["role"] for message in talk.messages] == ["user", "assistant"] * 2
        with pytest.raises(DataError, match="not both"):
            engine.generate("text", conversation=talk)
        again = engine.generate(more, conversation=talk, reroute=True, max_new_tokens=1)
        whole = tokenizer.apply_chat_template([*talk.messages[:-1]])["input_ids"]
        assert again.prompt_tokens == len(whole)


def test_a_template_that_changes_the_past_is_refused(monkeypatch):
    tokenizer = Chat()
    with make(tokenizer=tokenizer) as engine, engine.conversation() as talk:
        hello = [{"role": "user", "content": "hello"}]
        engine.generate(hello, conversation=talk, max_new_tokens=5)
        monkeypatch.setattr(
            tokenizer, "apply_chat_template", lambda messages, **_: f"{len(messages)}" + messages[-1]["content"]
        )
        with pytest.raises(DataError, match=r"changes earlier turns.*reroute=True"):
            engine.generate(hello, conversation=talk)
