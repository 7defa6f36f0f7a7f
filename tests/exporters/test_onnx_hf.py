"""`--io hf`: a dense cache under Hugging Face's names; prompts take their routes, later tokens are full."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

import numpy as np
import onnxruntime
import torch

import fluxc
from fluxc.errors import UnsupportedAttentionError
from fluxc.exporters import onnx
from fluxc.ir.graph import runnable
from fluxc.ir.sparse import SparseSettings
from fluxc.passes.apply_plan import ApplyPlan
from fluxc.testing import TINY_FAMILIES
from fluxc.toy_flux import TOY, toy_flux
from fluxc.toy_flux import toy_routed as route

LAYERS = range(len(TOY.windows))
TEXT = [int(token) for token in np.random.default_rng(0).integers(2, TOY.vocab, 75)]
PROMPT = 60


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    flux = toy_flux(folder / "toy.flux")
    options = {"io": "hf", "max_length": 200}
    return flux, fluxc.export(flux.path, target="onnx", output=folder / "engine", options=options, verify=False).path


@pytest.fixture(scope="module")
def session(exported):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(exported[1] / "model.onnx", options, providers=["CPUExecutionProvider"])


def answers(session, calls, bias):
    """Logits [V] at the end of each call over its tokens, the cache passed on."""
    past = {
        f"past_key_values.{layer}.{name}": np.zeros((1, 1, 0, 8), np.float32)
        for layer in LAYERS
        for name in ("key", "value")
    }
    names = [output.name for output in session.get_outputs()]
    found, known = [], 0
    for tokens in calls:
        at = np.arange(known, known + len(tokens))[None]
        inputs = {"input_ids": np.array([tokens]), "position_ids": at, "route_bias": bias, **past}
        results = dict(zip(names, session.run(None, inputs), strict=True))
        found.append(torch.from_numpy(results.pop("logits")[0, -1]))
        past = {name.replace("present", "past_key_values"): value for name, value in results.items()}
        known += len(tokens)
    return found


@pytest.mark.parametrize("bias", [[np.inf, np.inf], [-np.inf, -np.inf], [np.inf, -np.inf]])
def test_prompt_steps_and_turns_equal_recomputation(exported, session, bias):
    """The reference: one pass over the whole text, rows after the prompt full (`decode: full`)."""
    settings = SparseSettings(sink=4, window=12, decode_full=True)
    routed = exported[0].load("routed")
    whole = runnable(ApplyPlan({0: settings, 2: settings}).apply(routed).program)
    forced = np.array(bias, np.float32)[:, None]
    calls = [TEXT[:PROMPT], TEXT[PROMPT : PROMPT + 1], TEXT[PROMPT + 1 : PROMPT + 9], TEXT[PROMPT + 9 : PROMPT + 10]]
    rows = torch.tensor([[PROMPT - 1, PROMPT, PROMPT + 8, PROMPT + 9]])
    lens = torch.tensor([PROMPT + 10]), torch.tensor([PROMPT])
    with torch.no_grad():
        ids = torch.tensor([TEXT[: PROMPT + 10]])
        expected = whole(ids, torch.arange(PROMPT + 10)[None], *lens, torch.from_numpy(forced), rows)[0][0]
    for found, row in zip(answers(session, calls, forced), expected, strict=True):
        torch.testing.assert_close(found, row, rtol=1e-4, atol=1e-5)


def test_the_default_bias_is_the_plans(exported, session):
    flux, path = exported
    (default,) = session.get_overridable_initializers()
    assert (default.name, default.shape) == ("route_bias", [2, 1])
    bias = np.array(flux.plan.bias(), np.float32)[:, None]
    asked = {"input_ids": np.array([TEXT]), "position_ids": np.arange(len(TEXT))[None]}
    past = {each.name: np.zeros((1, 1, 0, 8), np.float32) for each in session.get_inputs() if "past" in each.name}
    plain, given = (session.run(["logits"], {**asked, **past, **more})[0] for more in ({}, {"route_bias": bias}))
    assert np.array_equal(plain, given)
    config = json.loads((path / "config.json").read_text())
    assert (config["num_hidden_layers"], config["num_key_value_heads"], config["vocab_size"]) == (3, 1, TOY.vocab)


def test_the_weights_are_shared(exported):
    flux, path = exported
    stored = sum(tensor.nbytes for tensor in (*flux.weights.values(), *flux.routers.values()))
    assert (path / "weights.bin").stat().st_size <= 1.15 * stored
    assert (path / "model.onnx").stat().st_size < 2 * (path / "prefill.onnx").stat().st_size


def test_factors_that_change_with_the_length_are_refused():
    captured = fluxc.capture(TINY_FAMILIES["phi3-longrope"]()).program
    with pytest.raises(UnsupportedAttentionError, match="RoPE factors of this model change"):
        onnx.check(route(captured), io="hf")


def test_optimum_generates_with_it(exported):
    """Its loader reads the folder as it is; greedy tokens are those of the session alone."""
    optimum = pytest.importorskip("optimum.onnxruntime", reason="optimum-onnx is not installed")
    _, path = exported
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    model = optimum.ORTModelForCausalLM.from_pretrained(path, file_name="model.onnx", use_io_binding=False)
    made = model.generate(torch.tensor([TEXT]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert len(made[0]) == len(TEXT) + 12
