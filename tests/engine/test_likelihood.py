"""What answers say of their tokens' likelihood, and the limits and the state that servers ask for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fluxc.engine.engine import Engine
from fluxc.engine.likelihood import likelihood
from fluxc.engine.options import EngineOptions, GenerationOptions
from fluxc.errors import ContextError, DataError
from fluxc.testing import tiny_tokenizer
from fluxc.toy_engine import ToyPrograms, toy_plan


@pytest.fixture
def engine():
    plan = toy_plan([(2, 6), 4, (2, 6)])
    with Engine(ToyPrograms(plan), plan, options=EngineOptions(max_batch=2, context=40)) as made:
        yield made


@pytest.mark.parametrize("kind", [torch.tensor, np.array])
def test_likelihood_is_the_log_softmax(kind):
    logits = [0.5, 3.0, -200.0, 3.0, 1.0]
    value, top = likelihood(kind(logits), 4, 3)
    want = torch.tensor(logits).log_softmax(0)
    assert value == pytest.approx(float(want[4]), abs=1e-6)
    assert [token for token, _ in top] == [1, 3, 4]
    assert [log for _, log in top] == pytest.approx(want[[1, 3, 4]].tolist(), abs=1e-6)
    assert likelihood(kind(logits), 0, 0)[1] == ()
    assert len(likelihood(kind(logits), 0, 99)[1]) == 5


def test_pieces_carry_it_where_it_was_asked_for(engine):
    prompt = [3, 1, 4, 1, 5]
    pieces = list(engine.generate(prompt, stream=True, max_new_tokens=6, logprobs=2, routes=[True, True]))
    whole = engine.programs.logits([*prompt, *(piece.token for piece in pieces)], 5, [True, True]).log_softmax(-1)
    for at, piece in enumerate(pieces):
        row = whole[len(prompt) - 1 + at]
        assert piece.logprob == pytest.approx(float(row[piece.token]), abs=1e-6)
        assert [token for token, _ in piece.top] == row.topk(2).indices.tolist()
    assert all(piece.logprob is None for piece in engine.generate(prompt, stream=True, max_new_tokens=2))


def test_the_status_says_what_is_held(engine):
    assert (engine.status.running, engine.status.waiting, engine.status.kv_used) == (0, 0, 0)
    with engine.conversation() as talk:
        engine.generate([3, 1, 4], conversation=talk, max_new_tokens=2)
        # The result is handed out a moment before the request is forgotten.
        assert engine.status.kv_used == engine.status.kv_kept > 0
    assert engine.status.kv_used == engine.status.kv_kept == 0
    assert engine.status.kv_free > 0


def test_the_context_can_be_limited(engine):
    assert len(engine.generate([2] * 30, max_new_tokens=64).tokens) == 10
    with pytest.raises(ContextError, match="context of 40"):
        engine.generate([2] * 40)


def test_a_temperature_next_to_zero_is_greedy():
    assert not GenerationOptions(temperature=1e-30).samples and GenerationOptions(temperature=0.01).samples


def test_text_that_is_no_unicode_is_refused():
    plan = toy_plan([(2, 6)])
    with Engine(ToyPrograms(plan), plan, tokenizer=tiny_tokenizer()) as engine:
        for prompt in ("\ud800", [{"role": "user", "content": "\ud800"}]):
            with pytest.raises(DataError, match="surrogate"):
                engine.generate(prompt)
