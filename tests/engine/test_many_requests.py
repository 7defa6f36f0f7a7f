"""Two thousand requests of random lengths with random cancels: no page leaks, no answer is another's."""

from __future__ import annotations

import dataclasses
import random

import pytest

from fluxc.engine.engine import Engine
from fluxc.engine.options import EngineOptions
from fluxc.kernels.schemas import PAGE
from fluxc.toy_engine import ToyPrograms, toy_plan


def make(admission: str) -> Engine:
    plan = toy_plan([(2, 6), 5, (3, 9)])
    options = EngineOptions(max_batch=8, kv_memory=18 * 2 * PAGE * 4 * 8, admission=admission)
    engine = Engine(ToyPrograms(plan), plan, options=options)
    engine.scheduler.runner.cache.fill_(float("nan"))
    return engine


def ids(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(61), k=length)


def recomputed(engine: Engine, prompt: list[int], routes: list[bool], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(engine.programs.logits(tokens, len(prompt), routes)[-1].argmax()))
    return tokens[len(prompt) :]


@dataclasses.dataclass
class Load:
    """Random requests, some of which are cancelled at a random moment."""

    seed: int
    count: int
    requeues: int = 0

    def run(self, engine: Engine) -> None:
        rng = random.Random(self.seed)
        checked = 0
        live: list = []
        for number in range(self.count):
            prompt = ids(rng.randint(1, 160), number)
            request = engine.prepare(prompt, budget=0.45, max_new_tokens=rng.randint(1, 12))
            request.sequence.bias = rng.choices([-9.0, 9.0], k=2)
            engine.scheduler.add(request)
            live.append((request, prompt))
            for _ in range(rng.randint(0, 8)):
                engine.scheduler.step()
            if rng.random() < 0.3:
                rng.choice(live)[0].handle.cancel()
            for done in [entry for entry in live if entry[0].handle.done]:
                live.remove(done)
                checked += self.check(engine, *done)
        while engine.scheduler.step():
            pass
        assert checked > self.count / 20, checked
        assert all(self.check(engine, *entry) is not None for entry in live)

    def check(self, engine, request, prompt) -> bool:
        """The answer, as far as it came; every eighth is compared with recomputation."""
        found = request.handle.result(0)
        if found.finish_reason == "cancelled":
            assert request.handle.cancelled
        else:
            assert len(found.tokens) == request.limit
        self.requeues += found.requeues
        if request.number % 8 or not found.tokens:
            return False
        assert list(found.tokens) == recomputed(engine, prompt, found.routes.tolist(), len(found.tokens))
        return True


@pytest.mark.parametrize("admission", ["worst", "expected"])
def test_the_pool_is_empty_in_the_end(admission):
    engine = make(admission)
    load = Load(seed=3, count=1000)
    load.run(engine)
    assert (load.requeues > 0) == (admission == "expected")
    pool = engine.scheduler.keeper.pool
    assert (pool.free, pool.unclaimed) == (pool.total, pool.total)
    assert not engine.scheduler.keeper.idle
