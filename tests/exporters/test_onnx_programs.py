"""An ONNX engine behind `fluxc.load`, against the traced programs of the same model."""

from __future__ import annotations

import json
import random
import shutil

import pytest
import torch

pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

import numpy as np

import fluxc
from fluxc.cli import main
from fluxc.engine.programs import LayerKV, Prefilled
from fluxc.engine.traced import TracedPrograms
from fluxc.errors import ArchiveError, OptionError
from fluxc.exporters.engine_dir import open_engine
from fluxc.exporters.onnx_programs import OnnxPrograms
from fluxc.toy_cache import ToyCache
from fluxc.toy_flux import SPARSE, TOY

CLOSE = {"rtol": 1e-5, "atol": 3e-6}  # sums of another order
LENGTHS = (9, 70, 3)


class OnTensors:
    """An ONNX engine and its store behind the protocol of torch programs."""

    def __init__(self, path):
        self.programs = OnnxPrograms(open_engine(path))
        self.store = self.programs.open_store(1)
        self.layers, self.dtype = self.programs.layers, torch.float32

    def prefill(self, *args, dense=False):
        shape = self.layers[0]
        nothing = np.zeros((1, shape.kv_heads, 1, shape.head_dim), np.float32)
        self.store.write(nothing, nothing, np.array([[-1]]))  # the toy cache writes beside the store
        for item in self.programs.prefill(*(x.numpy() for x in args), dense=dense):
            if isinstance(item, LayerKV):
                yield LayerKV(item.index, torch.from_numpy(item.k), torch.from_numpy(item.v), item.route)
            else:
                scores = None if item.scores is None else torch.from_numpy(item.scores)
                yield Prefilled(torch.from_numpy(item.logits), torch.from_numpy(item.routes), scores)

    def decode(self, cache, *inputs):
        self.store.cache = cache.numpy()
        return torch.from_numpy(self.store.decode(*(x.numpy() for x in inputs)))

    def append(self, cache, *inputs):
        self.store.cache = cache.numpy()
        return torch.from_numpy(self.store.append(*(x.numpy() for x in inputs)))


@pytest.fixture(scope="module")
def both(made):
    flux, exported = made
    return TracedPrograms(flux.load("routed"), context=256, merge="no"), OnTensors(exported.path)


def ids(count, seed):
    return random.Random(seed).choices(range(2, TOY.vocab), k=count)


def test_they_say_the_same_of_the_model(both):
    traced, onnx = both
    for name in ("layers", "vocabulary", "context", "rope_limit"):
        assert getattr(onnx.programs, name) == getattr(traced, name), name
    assert (str(onnx.programs.dtype), onnx.programs.device) == ("float32", str(traced.device))


@pytest.mark.parametrize("dense", [False, True])
def test_prefill(both, dense):
    args = (torch.tensor([ids(30, 0)]), torch.tensor([25]), torch.tensor([[0.0], [-torch.inf]]), torch.tensor([[29]]))
    (*layers, end), (*own_layers, own) = (list(each.prefill(*args, dense=dense)) for each in both)
    torch.testing.assert_close(own.logits, end.logits, **CLOSE)
    assert torch.equal(own.routes, end.routes)
    assert (own.scores is None) == dense
    for item, expected in zip(own_layers, layers, strict=True):
        assert (item.index, item.route) == (expected.index, expected.route)
        torch.testing.assert_close((item.k, item.v), (expected.k, expected.v), **CLOSE)


def test_steps_and_turns_of_several_requests(both):
    """Pages in any order, unwritten slots NaN, rings that wrap; the longest text passes a page."""
    caches = [ToyCache(each, SPARSE.sink, SPARSE.window, room=150, requests=3) for each in both]
    biases = [torch.full((2,), torch.inf), torch.full((2,), -torch.inf), torch.tensor([torch.inf, -torch.inf])]
    for number, (length, bias) in enumerate(zip(LENGTHS, biases, strict=True)):
        for cache in caches:
            cache.prefill(ids(length, number), bias)

    def same(call):
        traced, onnx = (call(cache) for cache in caches)
        torch.testing.assert_close(onnx, traced, **CLOSE)

    copied = []
    original = both[1].store._copied
    both[1].store._copied = lambda *args: copied.append(1) or original(*args)
    for step in range(20):
        same(lambda cache, seed=step: cache.decode(ids(3, seed)))
    assert len(copied) == 1
    rows = torch.tensor([[0, 12], [0, 0], [2, 5]])
    same(lambda cache: cache.append([ids(13, 7), ids(1, 8), ids(6, 9)], rows))
    same(lambda cache: cache.decode(ids(3, 99)))


def test_the_engine_answers_as_it_does_without_export(made):
    flux, exported = made
    prompts = [ids(length, length) for length in (1, 40, 90)]
    found = []
    for path in (flux.path, exported.path):
        with fluxc.load(path, "cpu") as engine:
            engine.scheduler.runner.cache[...] = np.nan
            answers = engine.generate(prompts, max_new_tokens=12, budget=[0.2, 0.5, 1.0])
            talk = engine.conversation()
            turns = [engine.generate(ids(20, turn), conversation=talk, max_new_tokens=6) for turn in range(2)]
            found.append([(one.tokens, one.routes.tolist()) for one in (*answers, *turns)])
            talk.close()
    assert found[0] == found[1]


def test_calibrate_changes_the_budget_of_an_engine(made, tmp_path, capsys):
    path = shutil.copytree(made[1].path, tmp_path / "engine")
    assert main(["calibrate", str(path), "--budget", "0.8", "-n"]) == 0
    assert open_engine(path).plan.budget == 0.4
    assert main(["calibrate", str(path), "--budget", "0.8"]) == 0
    assert "from budget 0.4 (Ω 0.6) to budget 0.8" in capsys.readouterr().out
    with fluxc.load(path) as engine:
        assert engine.plan.budget == 0.8


def test_damaged_engines_and_other_devices_are_refused(made, tmp_path):
    path = shutil.copytree(made[1].path, tmp_path / "engine")
    with pytest.raises(OptionError, match="cannot run an engine for onnx on cuda"):
        fluxc.load(path, "cuda")
    (path / "weights.bin").write_bytes(b"")
    with pytest.raises(ArchiveError, match=r"weights\.bin is damaged"):
        fluxc.load(path)


def test_the_command_line_answers_with_an_engine(made, capsys):
    """Texts of tokens that the toy model knows; exit code 2 for one it does not."""
    path = str(made[1].path)
    with fluxc.load(path) as engine:
        known = next(text for text in map(chr, range(33, 127)) if engine.tokenizer(text)["input_ids"][0] < TOY.vocab)
    asked = ["run", path, "--prompt", known * 3, "--raw", "--max-new-tokens", "4", "--json", "--routes", "sparse"]
    assert main(asked) == 0
    found = json.loads(capsys.readouterr().out)
    assert (len(found["tokens"]), found["sparse_ratio"], found["timing"]) == (4, 1.0, None)
    assert main(["run", path, "--prompt", "zebra quilt", "--raw"]) == 2
    assert "outside the model's vocabulary" in capsys.readouterr().err
