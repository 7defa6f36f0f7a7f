"""Sampling without torch equals transformers' processors, score for score."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fluxc.engine.array_sampling import ArraySampler, new_seed
from fluxc.engine.options import GenerationOptions
from fluxc.engine.sampling import Sampler, _processors
from fluxc.errors import DataError
from fluxc.testing import tiny_tokenizer

VOCAB, EOS = 200, [1, 7]
PROMPT = [5, 9, 3, 5, 9, 40, 5, 9]
CASES = [
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.6},
    {"no_repeat_ngram_size": 1},
    {"no_repeat_ngram_size": 3},
    {"no_repeat_ngram_size": 30},
    {"min_new_tokens": 3},
    {"do_sample": True},
    {"temperature": 0.3},
    {"temperature": 1.5, "top_k": 0},
    {"top_k": 5},
    {"top_k": 500},
    {"top_p": 0.4, "top_k": 0},
    {"top_p": 0.01, "top_k": 0},
    {"min_p": 0.3, "temperature": 2.0},
    {"typical_p": 0.5, "top_k": 0},
    {"typical_p": 0.9, "repetition_penalty": 1.4, "top_p": 0.8, "no_repeat_ngram_size": 2, "min_new_tokens": 2},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_scores_are_those_of_the_processors(case):
    options = GenerationOptions(**case)
    for seed in range(6):
        logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * 4
        tokens = [*PROMPT, *torch.randint(VOCAB, (seed,), generator=torch.Generator().manual_seed(seed)).tolist()]
        expected = _processors(options, len(PROMPT), EOS, "cpu")(torch.tensor([tokens]), logits[None].clone())[0]
        sampler = ArraySampler(options, PROMPT, EOS, None)
        for token in tokens[len(PROMPT) :]:
            sampler.ends(token)
        found = sampler.scores(logits.numpy())
        np.testing.assert_array_equal(np.isinf(found), np.isinf(expected.numpy()))
        np.testing.assert_allclose(found, expected.numpy(), rtol=1e-6)
        assert np.isfinite(found).any()


@pytest.mark.parametrize("case", [{}, *CASES], ids=str)
def test_greedy_is_the_same_question(case):
    options = GenerationOptions(**case)
    assert ArraySampler(options, PROMPT, EOS, None).greedy == Sampler(options, PROMPT, EOS, None, "cpu").greedy


def test_draws_follow_the_shares_and_the_seed():
    logits = np.log(np.array([0.5, 0.3, 0.2, 1e-9], np.float32))

    def draw(seed, **options):
        sampler = ArraySampler(GenerationOptions(do_sample=True, seed=seed, **options), PROMPT, EOS, None)
        return [sampler.choose(logits) for _ in range(4000)]

    first = draw(1)
    assert first == draw(1) != draw(2)
    np.testing.assert_allclose(np.bincount(first, minlength=4)[:3] / 4000, [0.5, 0.3, 0.2], atol=0.03)
    assert set(draw(3, top_k=1)) == {0}
    assert new_seed() != new_seed()


@pytest.mark.parametrize("text", ["brown f", "quick", " fox", "never"])
def test_stop_strings_end_where_transformers_ends(text):
    tokenizer = tiny_tokenizer()
    ids = tokenizer("The quick brown fox jumps over the lazy dog")["input_ids"]
    options = GenerationOptions(stop_strings=(text,))
    ours, theirs = ArraySampler(options, ids[:2], [], tokenizer), Sampler(options, ids[:2], [], tokenizer, "cpu")
    assert [ours.ends(token) for token in ids[2:]] == [theirs.ends(token) for token in ids[2:]]
    with pytest.raises(DataError, match="tokenizer"):
        ArraySampler(options, ids, [], None)


def test_end_tokens():
    sampler = ArraySampler(GenerationOptions(), PROMPT, EOS, None)
    assert [sampler.ends(token) for token in (3, 7)] == [False, True]
    assert ArraySampler(GenerationOptions(eos_token_id=()), PROMPT, EOS, None).eos_ids == frozenset()
