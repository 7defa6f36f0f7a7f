"""Engines of model.flux directories: transformers' own tokens where all is full, recomputation under any routes."""

from __future__ import annotations

import dataclasses
import functools
import random
import shutil

import pytest
import torch

from fluxc.capture.api import capture
from fluxc.engine.load import engine_of, load
from fluxc.errors import ArchiveError, DataError, OptionError, PlanError
from fluxc.exporters import engine_dir
from fluxc.ir.sparse import SparseSettings
from fluxc.runtime.model import FluxModel, load_flux
from fluxc.testing import tiny_llama, tiny_tokenizer
from fluxc.tiny_tokenizer import VOCAB
from fluxc.toy_engine import assert_recomputed, transformers_tokens
from fluxc.toy_flux import flat_plan, flux_of

CONTEXT = 300


@pytest.fixture(scope="module")
def source():
    ends = {"bos_token_id": 0, "eos_token_id": 1}
    return tiny_llama(vocab_size=VOCAB, max_position_embeddings=CONTEXT, num_hidden_layers=3, **ends)


@pytest.fixture(scope="module")
def model(source, tmp_path_factory) -> FluxModel:
    """Three routable layers, sink 4 and window 12."""
    found = capture(source, tokenizer=tiny_tokenizer())
    path = tmp_path_factory.mktemp("model") / "model.flux"
    return load_flux(flux_of(path, found.program, found.meta, tokenizer_files=found.tokenizer_files).path)


@pytest.fixture(scope="module")
def engine(model):
    with engine_of(model, max_batch=4) as made:
        # What nobody wrote must not be read, not even with a weight of 0.
        made.scheduler.runner.cache.fill_(torch.nan)
        yield made
        assert made.scheduler.keeper.pool.used == 0


def ids(length: int, seed: int = 0, vocabulary: int = VOCAB) -> list[int]:
    return random.Random(seed).choices(range(2, vocabulary), k=length)


def test_all_full_gives_the_tokens_of_transformers_alone_and_in_a_batch(engine, source):
    prompts = [ids(length, length) for length in (1, 17, 64, 130, 5)]
    want = [transformers_tokens(source, prompt, 64) for prompt in prompts]
    found = engine.generate(prompts, budget=1.0, max_new_tokens=64)
    assert [list(one.tokens) for one in found] == want
    assert list(engine.generate(prompts[2], routes=[True] * 3, max_new_tokens=64).tokens) == want[2]
    assert {one.sparse_ratio for one in found} == {0.0}


def test_fused_ops_where_asked_for_or_on_a_gpu(engine, model):
    """On the CPU their implementations are the same arithmetic, one call more dear: off unless asked for."""
    prompts = [ids(40), ids(7), ids(64)]
    with engine_of(model, fuse=True) as fused:
        assert fused.scheduler.runner.programs.fuse
        assert engine.scheduler.runner.programs.fuse == (model.device != "cpu")
        for routes in ([True] * 3, [False, True, False]):
            found, wanted = (
                one.generate(prompts, routes=routes, max_new_tokens=20, eos_token_id=[]) for one in (fused, engine)
            )
            assert [answer.tokens for answer in found] == [answer.tokens for answer in wanted]
        talk = [fused.conversation(), engine.conversation()]
        for turn in (ids(50), ids(9)):
            mine, theirs = (
                one.generate(turn, conversation=held, max_new_tokens=5).tokens
                for one, held in zip((fused, engine), talk, strict=True)
            )
            assert mine == theirs
        for held in talk:
            held.close()


def test_ops_of_an_exported_engine_are_chosen(tmp_path):
    (tmp_path / engine_dir.NAME).write_text("{}")
    with pytest.raises(OptionError, match="is an exported engine: its ops are chosen"):
        load(tmp_path, fuse=True)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 63, 64, 65, 150])
def test_any_routes_equal_recomputation(engine, model, length):
    for code in range(8):
        routes = [bool(code & 1 << row) for row in range(3)]
        found = engine.generate(ids(length), routes=routes, max_new_tokens=40, eos_token_id=[])
        assert_recomputed(model, [*ids(length), *found.tokens], length, routes, 40)
        page = 64 * 2 * 2 * 8 * 4
        assert 0 <= found.kv_bytes.measured - found.kv_bytes.planned < 3 * page


def test_a_sparse_cache_of_a_long_prompt_is_sink_and_window(tmp_path):
    found = capture(tiny_llama(max_position_embeddings=40_000))
    model = load_flux(flux_of(tmp_path / "model.flux", found.program, found.meta).path)
    page = 64 * 2 * 2 * 8 * 4
    with engine_of(model, kv_memory=2 * page) as engine:
        sparse = engine.generate(ids(32_768, vocabulary=97), budget=0.0, max_new_tokens=3, eos_token_id=[])
        assert sparse.sparse_ratio == 1.0
        assert sparse.kv_bytes.planned == 2 * 16 * page // 64
        assert sparse.kv_bytes.measured == 2 * page
        # In transit: the keys and values of one layer.
        assert sparse.kv_bytes.peak <= 2 * page + 32_768 * page // 64
        with pytest.raises(DataError, match="needs 1026 pages"):
            engine.generate(ids(32_768, vocabulary=97), budget=1.0, max_new_tokens=3)


def test_routes_are_those_of_the_routed_program_and_bit_equal_in_a_batch(engine, model):
    prompts = [ids(length, length) for length in (80, 33, 140)]
    alone = [engine.generate(prompt, budget=0.5, max_new_tokens=30, eos_token_id=[]) for prompt in prompts]
    together = engine.generate(prompts, budget=0.5, max_new_tokens=30, eos_token_id=[])
    for prompt, one, mate in zip(prompts, alone, together, strict=True):
        expected = model.prefill([prompt], budget=0.5, program="routed")
        assert torch.equal(one.routes, expected.routes[:, 0])
        torch.testing.assert_close(one.scores, expected.scores[:, 0])
        assert torch.equal(mate.scores, one.scores)
        assert mate.tokens == one.tokens


@pytest.mark.parametrize("turn_tokens", [1, 7, 1024])
def test_turns_equal_recomputation(model, turn_tokens):
    with engine_of(model, turn_tokens=turn_tokens) as engine, engine.conversation() as talk:
        routes, prompt = [False, True, False], ids(70)
        first = engine.generate(prompt, conversation=talk, routes=routes, max_new_tokens=20, eos_token_id=[])
        known = [*prompt, *first.tokens]
        for turn in range(3):
            new = ids(31, 10 + turn)
            found = engine.generate(new, conversation=talk, max_new_tokens=15, eos_token_id=[])
            known += [*new, *found.tokens]
            assert_recomputed(model, known, 70, routes, 15)
        assert talk.tokens == tuple(known)


def test_short_prompts_run_dense(engine, model):
    short = engine.generate(ids(31), budget=0.0, max_new_tokens=40, eos_token_id=[])
    assert (short.scores, short.sparse_ratio) == (None, 0.0)
    assert_recomputed(model, [*ids(31), *short.tokens], 31, [True] * 3, 40)
    assert engine.generate(ids(32), budget=0.0, max_new_tokens=1).sparse_ratio == 1.0


@pytest.mark.parametrize("kind", ["triangle", "decode-full", "full-block"])
def test_other_kinds_equal_recomputation(source, tmp_path, kind, monkeypatch):
    settings = {
        "triangle": SparseSettings(kind="triangle", sink=4, window=12, last=8),
        "decode-full": SparseSettings(sink=4, window=12, decode_full=True),
        "full-block": SparseSettings(sink=4, window=12, block=16, stride=4, threshold=0.6, full_kind="block"),
    }[kind]
    found = capture(source)
    from fluxc import toy_flux

    monkeypatch.setattr(toy_flux, "toy_routed", functools.partial(toy_flux.toy_routed, sparse=settings))
    monkeypatch.setattr(toy_flux, "flat_plan", functools.partial(flat_plan, sparse=settings))
    model = load_flux(flux_of(tmp_path / "model.flux", found.program, found.meta).path)
    with engine_of(model) as engine:
        for routes in ([False] * 3, [False, True, False]):
            one = engine.generate(ids(90), routes=routes, max_new_tokens=40, eos_token_id=[])
            assert_recomputed(model, [*ids(90), *one.tokens], 90, routes, 40)


def test_load_reads_text_and_end_tokens_from_the_directory(model, source):
    with load(model.flux.path, "cpu") as engine:
        text = "The quick brown fox"
        found = engine.generate(text, max_new_tokens=12)
        tokens = engine.tokenizer(text)["input_ids"]
        assert list(found.tokens) == transformers_tokens(source, tokens, 12)
        assert found.text == engine.tokenizer.decode(found.tokens, skip_special_tokens=True)
        stop = found.tokens[3]
        ended = engine.generate(text, max_new_tokens=12, eos_token_id=stop)
        assert ended.tokens == found.tokens[: found.tokens.index(stop) + 1]


def test_another_plan_of_the_same_model(model, tmp_path):
    other = flat_plan(model.plan.model, budget=0.9)
    (tmp_path / "other.json").write_text(other.to_json())
    with load(model.flux.path, "cpu", plan=tmp_path / "other.json") as engine:
        assert engine.plan == other
    stranger = dataclasses.replace(other, model=dataclasses.replace(other.model, weights="cd" * 32))
    with pytest.raises(PlanError, match="another model"):
        load(model.flux.path, "cpu", plan=stranger)
    wider = flat_plan(model.plan.model, sparse=SparseSettings(sink=4, window=13))
    with pytest.raises(PlanError, match="other kinds or sizes"):
        load(model.flux.path, "cpu", plan=wider)


@pytest.mark.parametrize("name", ["weights/00001.safetensors", "graphs/routed.pt2", "plan.json", "routers.safetensors"])
def test_a_damaged_directory_is_named(model, tmp_path, name):
    damaged = tmp_path / "damaged.flux"
    shutil.copytree(model.flux.path, damaged)
    file = damaged / name if (damaged / name).exists() else next((damaged / name).parent.iterdir())
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(ArchiveError, match=file.name):
        load(damaged, "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_engine_without_a_gpu_is_refused(model):
    with pytest.raises(OptionError, match="no CUDA device"):
        load(model.flux.path, "cuda")


def test_unknown_engine_options_are_named(model):
    with pytest.raises(OptionError, match="pages"):
        load(model.flux.path, "cpu", pages=3)
