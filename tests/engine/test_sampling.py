"""The chosen tokens are those of transformers' own `generate`, and depend on nothing but the request."""

from __future__ import annotations

import pytest
import torch

from fluxc.engine.options import EngineOptions, GenerationOptions
from fluxc.engine.sampling import Sampler, TokenBuffer, new_seed
from fluxc.errors import DataError, OptionError
from fluxc.testing import tiny_llama, tiny_tokenizer
from fluxc.tiny_tokenizer import VOCAB

PROMPT = list(range(20, 40))


@pytest.fixture(scope="module")
def source():
    return tiny_llama(vocab_size=VOCAB, bos_token_id=0, eos_token_id=1)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@torch.no_grad()
def ours(source, options: GenerationOptions, prompt=PROMPT, tokenizer=None) -> list[int]:
    """An answer by whole forward passes of the source."""
    sampler = Sampler(options, prompt, [1], tokenizer, "cpu")
    tokens: list[int] = []
    while len(tokens) < options.max_new_tokens:
        logits = source(torch.tensor([[*prompt, *tokens]])).logits[0, -1]
        tokens.append(int(logits.argmax()) if sampler.greedy else sampler.choose(logits))
        if sampler.ends(tokens[-1]):
            break
    return tokens


def theirs(source, prompt=PROMPT, tokenizer=None, seed=None, **options) -> list[int]:
    if seed is not None:
        torch.manual_seed(seed)
    options = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 12, **options}
    return source.generate(torch.tensor([prompt]), tokenizer=tokenizer, **options)[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 2},
        {"repetition_penalty": 0.6, "no_repeat_ngram_size": 1},
    ],
)
def test_greedy_tokens_are_those_of_transformers(source, options):
    assert ours(source, GenerationOptions(max_new_tokens=12, **options)) == theirs(source, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.3},
        {"temperature": 1.5, "top_k": 0},
        {"top_k": 5},
        {"top_p": 0.4, "top_k": 0},
        {"min_p": 0.3, "temperature": 2.0},
        {"typical_p": 0.5, "repetition_penalty": 1.4},
    ],
)
def test_sampled_tokens_are_those_of_transformers_with_the_same_seed(source, options):
    found = ours(source, GenerationOptions(max_new_tokens=12, do_sample=True, seed=3, **options))
    assert found == theirs(source, seed=3, **{**options, "do_sample": True})


def test_seeds_differ_and_repeat(source):
    first, again, other = (ours(source, GenerationOptions(top_p=0.9, seed=seed)) for seed in (1, 1, 2))
    assert first == again != other
    torch.manual_seed(5)
    drawn = new_seed()
    torch.manual_seed(5)
    assert drawn == new_seed()


def test_end_tokens_as_transformers(source):
    free = theirs(source)
    stop = free[4]
    options = GenerationOptions(max_new_tokens=12, eos_token_id=(stop,))
    assert ours(source, options) == theirs(source, eos_token_id=stop) == free[: free.index(stop) + 1]
    longer = GenerationOptions(max_new_tokens=12, eos_token_id=(stop,), min_new_tokens=8)
    assert ours(source, longer) == theirs(source, eos_token_id=stop, min_new_tokens=8)
    assert len(ours(source, longer)) >= 8


def test_stop_strings_as_transformers(source, tokenizer):
    free = theirs(source)
    text = tokenizer.decode(free[3:5])[1:]
    options = GenerationOptions(max_new_tokens=12, stop_strings=("never this", text))
    found = ours(source, options, tokenizer=tokenizer)
    assert found == theirs(source, tokenizer=tokenizer, stop_strings=["never this", text])
    assert found == free[: len(found)]
    assert len(found) < len(free)
    with pytest.raises(DataError, match="tokenizer"):
        Sampler(options, PROMPT, [1], None, "cpu")


@pytest.mark.parametrize(
    ("options", "samples"),
    [
        ({}, False),
        ({"seed": 1}, False),
        ({"temperature": 0}, False),
        ({"temperature": 0, "top_p": 0.5}, False),
        ({"temperature": 0.7}, True),
        ({"top_k": 3}, True),
        ({"do_sample": True}, True),
        ({"do_sample": False, "temperature": 0.7}, False),
    ],
)
def test_what_samples(options, samples):
    assert GenerationOptions(**options).samples == samples


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_beams": 4}, "unknown option 'num_beams'"),
        ({"temperature": -1}, "temperature -1"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"top_p": 0.0}, "top_p 0.0"),
        ({"top_p": 1.5}, "top_p 1.5"),
        ({"top_k": -1}, "top_k -1"),
        ({"top_k": 2.5}, "top_k 2.5"),
        ({"max_new_tokens": 0}, "max_new_tokens 0"),
        ({"max_new_tokens": True}, "max_new_tokens True"),
        ({"repetition_penalty": 0}, "repetition_penalty 0"),
        ({"stop_strings": ["a", ""]}, "stop_strings"),
        ({"eos_token_id": "a"}, "eos_token_id"),
        ({"seed": -1}, "seed -1"),
    ],
)
def test_bad_options_are_named(options, said):
    with pytest.raises(OptionError, match=said):
        GenerationOptions.from_dict(options)


def test_single_values_stand_for_lists():
    options = GenerationOptions.from_dict({"stop_strings": "end", "eos_token_id": 7})
    assert (options.stop_strings, options.eos_token_id) == (("end",), (7,))
    assert GenerationOptions.from_dict({"eos_token_id": []}).eos_token_id == ()
    assert GenerationOptions.from_dict({"eos_token_id": None}).eos_token_id is None


@pytest.mark.parametrize(
    "options", [{"max_batch": 0}, {"admission": "hope"}, {"max_decode_stall_ms": -1}, {"pages": 1}]
)
def test_bad_engine_options(options):
    with pytest.raises(OptionError, match=next(iter(options))):
        EngineOptions.from_dict(options)


def test_the_buffer_grows():
    buffer = TokenBuffer([5])
    for token in range(200):
        buffer.add(token)
    assert buffer.ids.tolist() == [[5, *range(200)]]
