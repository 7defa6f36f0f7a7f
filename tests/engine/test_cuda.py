"""An engine on a GPU: the tokens and routes of the CPU's, alone and in a batch, greedy and drawn."""

from __future__ import annotations

import random

import pytest
import torch

from fluxc.capture.api import capture
from fluxc.engine.decode_graphs import DecodeGraphs
from fluxc.engine.load import load
from fluxc.runtime.model import load_flux
from fluxc.testing import TINY_FAMILIES
from fluxc.toy_engine import assert_recomputed
from fluxc.toy_flux import flux_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def ids(length: int) -> list[int]:
    return random.Random(length).choices(range(3, 97), k=length)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt-oss", "phi3-longrope"])
def test_tokens_equal_recomputation(family, tmp_path):
    found = capture(TINY_FAMILIES[family]())
    path = flux_of(tmp_path / "model.flux", found.program, found.meta).path
    reference = load_flux(path)
    layers = len(reference.plan.layers)
    prompts = [ids(40), ids(5), ids(64)]
    with load(path, "cuda", max_batch=4) as engine:
        engine.scheduler.runner.cache.fill_(torch.nan)
        for routes in ([True] * layers, [False] * layers):
            answers = engine.generate(prompts, routes=routes, max_new_tokens=40, eos_token_id=[])
            for prompt, answer in zip(prompts, answers, strict=True):
                assert_recomputed(reference, [*prompt, *answer.tokens], len(prompt), routes, 40)
        with engine.conversation() as talk:
            first = engine.generate(ids(50), routes=[False] * layers, conversation=talk, max_new_tokens=9)
            second = engine.generate(ids(21), conversation=talk, max_new_tokens=9, eos_token_id=[])
            known = [*ids(50), *first.tokens, *ids(21), *second.tokens]
            assert_recomputed(reference, known, 50, [False] * layers, 9)
        drawn = [engine.generate(ids(40), temperature=0.8, seed=4, max_new_tokens=9).tokens for _ in range(2)]
        assert drawn[0] == drawn[1]
        assert engine.scheduler.keeper.pool.used == 0


def test_one_graph_whatever_the_routes(tmp_path):
    found = capture(TINY_FAMILIES["llama"]())
    path = flux_of(tmp_path / "model.flux", found.program, found.meta).path
    with load(path, "cuda", max_batch=4) as engine:
        layers = len(engine.plan.layers)
        for routes in ([True] * layers, [False] * layers, [row % 2 == 0 for row in range(layers)]):
            engine.generate([ids(40), ids(64), ids(7)], routes=routes, max_new_tokens=70, eos_token_id=[])
        sizes = len(engine.scheduler.runner.store._graphs)
        assert 1 <= sizes <= 3, "batches of 1, 2 and 3 (filled up to 4) requests"
        before = torch.cuda.memory_reserved()
        engine.generate([ids(40), ids(64), ids(7)], max_new_tokens=70, eos_token_id=[])
        assert (len(engine.scheduler.runner.store._graphs), torch.cuda.memory_reserved()) == (sizes, before)


def test_recorded_steps_equal_eager_ones(tmp_path):
    found = capture(TINY_FAMILIES["llama"]())
    path = flux_of(tmp_path / "model.flux", found.program, found.meta).path
    tokens = []
    for record in (True, False):
        with load(path, "cuda", max_batch=4) as engine:
            store = engine.scheduler.runner.store
            store._graphs = DecodeGraphs(engine.scheduler.runner.programs, store.cache, record=record)
            answers = engine.generate([ids(40), ids(64), ids(7)], max_new_tokens=40, eos_token_id=[])
            tokens.append([answer.tokens for answer in answers])
    assert tokens[0] == tokens[1]
