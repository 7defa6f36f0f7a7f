"""Every family through the engine: transformers' tokens where all is full, recomputation under other routes."""

from __future__ import annotations

import random

import pytest

from fluxc.capture.api import capture
from fluxc.engine.load import engine_of
from fluxc.runtime.model import load_flux
from fluxc.testing import TINY_FAMILIES
from fluxc.toy_engine import assert_recomputed, transformers_tokens
from fluxc.toy_flux import flux_of

# Between them: untied heads, q/k norms, windows of a layer's own, sinks, soft caps, experts, learned positions, RoPE
# that changes with the length. The others take the same ways and run with the slow tests.
QUICK = ("gemma2", "gemma3", "gpt-oss", "llama-untied", "opt", "phi3-longrope", "qwen3-moe")
VOCAB = 97


def ids(length: int) -> list[int]:
    return random.Random(length).choices(range(3, VOCAB), k=length)


@pytest.mark.parametrize(
    "family", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in sorted(TINY_FAMILIES)]
)
def test_tokens(family, tmp_path):
    source = TINY_FAMILIES[family]()
    found = capture(source)
    model = load_flux(flux_of(tmp_path / "model.flux", found.program, found.meta).path)
    # Without end tokens: random weights would end most answers early.
    options = {"max_new_tokens": 64, "eos_token_id": []}
    with engine_of(model, max_batch=2) as engine:
        prompts = [ids(7), ids(40)]
        want = [transformers_tokens(source, prompt, 64, eos_token_id=-1) for prompt in prompts]
        answers = engine.generate(prompts, budget=1.0, **options)
        assert [list(answer.tokens) for answer in answers] == want
        assert list(engine.generate(prompts[1], budget=1.0, **options).tokens) == want[1]
        for first in (False, True):
            routes = [bool(row % 2) == first for row in range(len(model.plan.layers))]
            sparse = engine.generate(prompts[1], routes=routes, **options)
            assert_recomputed(model, [*prompts[1], *sparse.tokens], 40, routes, 64)
