"""Generation: greedy tokens of the source model, sticky routes, stopping, text and streaming."""

from __future__ import annotations

import pytest
import torch

from fluxc.capture.api import capture
from fluxc.errors import DataError, OptionError
from fluxc.runtime.model import load_flux
from fluxc.testing import tiny_llama
from fluxc.tiny_tokenizer import VOCAB, tiny_tokenizer
from fluxc.toy_flux import flux_of, toy_flux

CONTEXT = 160


@pytest.fixture(scope="module")
def source():
    ends = {"bos_token_id": 0, "eos_token_id": 1}
    return tiny_llama(vocab_size=VOCAB, max_position_embeddings=CONTEXT, **ends)


@pytest.fixture(scope="module")
def model(source, tmp_path_factory):
    found = capture(source, tokenizer=tiny_tokenizer())
    path = tmp_path_factory.mktemp("model") / "model.flux"
    return load_flux(flux_of(path, found.program, found.meta, tokenizer_files=found.tokenizer_files).path)


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A model without tokenizer files or end-of-answer tokens."""
    return load_flux(toy_flux(tmp_path_factory.mktemp("bare") / "model.flux").path)


def ids(length: int, seed: int = 0) -> list[int]:
    return torch.randint(2, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def greedy(source, prompt: list[int], count: int) -> list[int]:
    out = source.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False, pad_token_id=0)
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("length", [1, 40])
def test_all_full_gives_the_tokens_of_the_source(model, source, length):
    want = greedy(source, ids(length), 6)
    full = model.generate(ids(length), max_new_tokens=6, routes=[True, True])
    assert list(full.tokens) == want
    assert full.sparse_ratio == 0.0
    assert model.generate(ids(length), max_new_tokens=6, budget=1.0).tokens == full.tokens


def test_routes_are_the_prompts_and_stay(model, monkeypatch):
    seen = []
    run_routed = type(model).run_routed

    def spy(self, batch, bias):
        result = run_routed(self, batch, bias)
        seen.append((batch.seq_lens.item(), batch.prompt_lens.item(), result.routes[:, 0].tolist()))
        return result

    monkeypatch.setattr(type(model), "run_routed", spy)
    scores = model.prefill(ids(40), program="routed").scores[:, 0]
    seen.clear()
    answer = model.generate(ids(40), max_new_tokens=3, stop_ids=[])
    assert torch.equal(answer.scores, scores)
    assert [row[:2] for row in seen] == [(40, 40), (41, 40), (42, 40)]
    assert all(row[2] == answer.routes.tolist() for row in seen)


def test_sparse_decoding_attends_to_what_the_plan_keeps(model):
    routes = [True, False]
    answer = model.generate(ids(60), max_new_tokens=2, routes=routes, stop_ids=[])
    again = model.prefill([[*ids(60), answer.tokens[0]]], prompt_lens=[60], routes=routes)
    assert answer.tokens[1] == int(again.logits.argmax())
    # 2 layers of 2 KV heads x (8 + 8) fp32 numbers; layer 0 keeps 62 tokens, layer 1 sink + window = 16.
    assert answer.kv_bytes == (62 + 16) * 2 * 16 * 4
    assert answer.sparse_ratio == 0.5


def test_a_short_prompt_stays_dense_past_the_crossover(model):
    answer = model.generate(ids(28), max_new_tokens=8, budget=0.0, stop_ids=[])
    assert answer.scores is None
    assert bool(answer.routes.all())
    assert answer.tokens == model.generate(ids(28), max_new_tokens=8, routes=[True, True], stop_ids=[]).tokens


def test_it_stops_at_stop_ids_at_the_count_and_at_the_context(model):
    free = model.generate(ids(40), max_new_tokens=5, stop_ids=[])
    assert (len(free.tokens), free.finish) == (5, "length")
    stop = free.tokens[2]
    stopped = model.generate(ids(40), max_new_tokens=5, stop_ids=[stop])
    assert stopped.tokens == free.tokens[: free.tokens.index(stop) + 1]
    assert stopped.finish == "stop"
    full = model.generate(ids(CONTEXT - 2), max_new_tokens=5, stop_ids=[])
    assert (len(full.tokens), full.finish) == (2, "length")


def test_text_and_messages_are_tokenized_and_answers_are_streamed(model):
    pieces = []
    text = "The quick brown fox jumps over the lazy dog. " * 3
    answer = model.generate(text, max_new_tokens=6, stop_ids=[], stream=pieces.append)
    tokens = model.tokenizer(text)["input_ids"]
    assert answer.prompt_tokens == len(tokens)
    assert answer.tokens == model.generate(tokens, max_new_tokens=6, stop_ids=[]).tokens
    assert answer.text == "".join(pieces) == model.tokenizer.decode(answer.tokens, skip_special_tokens=True)
    messages = [{"role": "user", "content": "Hello there"}]
    chat = model.generate(messages, max_new_tokens=1, stop_ids=[])
    rendered = model.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert chat.prompt_tokens == len(model.tokenizer(rendered, add_special_tokens=False)["input_ids"])


def test_a_stopping_token_is_no_text(model):
    free = model.generate(ids(40), max_new_tokens=3, stop_ids=[])
    stopped = model.generate(ids(40), max_new_tokens=3, stop_ids=[free.tokens[0]])
    assert stopped.text == ""
    assert stopped.tokens == free.tokens[:1]


def test_a_model_without_tokenizer_takes_ids_only(bare):
    assert bare.generate([1, 2, 3], max_new_tokens=2).text == ""
    assert bare.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=2).prompt_tokens == 3
    with pytest.raises(DataError, match="tokenizer"):
        bare.generate("text", max_new_tokens=2)


def test_bad_requests_are_refused(model):
    with pytest.raises(OptionError, match="max_new_tokens"):
        model.generate(ids(4), max_new_tokens=0)
    with pytest.raises(DataError, match="context"):
        model.generate(ids(CONTEXT), max_new_tokens=1)
    with pytest.raises(DataError, match="no tokens"):
        model.generate([], max_new_tokens=1)
