"""The model repository of Triton Inference Server, against a stub of the server's Python utilities."""

from __future__ import annotations

import importlib.util
import queue
import re
import shutil
import sys
import types

import numpy as np
import pytest

pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

import fluxc
from fluxc.exporters import layouts
from fluxc.exporters.engine_dir import open_engine
from fluxc.exporters.triton_server import config_text

FINAL = 1


class Tensor:
    def __init__(self, name, array):
        self.name, self.array = name, array

    def as_numpy(self):
        return self.array


class Sender:
    """What the server gives for a request: it keeps what is sent to the client."""

    def __init__(self):
        self.sent = queue.Queue()
        self.cancelled = False

    def send(self, response=None, flags=0):
        self.sent.put((response, flags))

    def is_cancelled(self):
        return self.cancelled


class Request:
    def __init__(self, **inputs):
        self.inputs = {name: Tensor(name, np.asarray(value)) for name, value in inputs.items()}
        self.sender = Sender()

    def get_response_sender(self):
        return self.sender

    def next(self):
        """Tokens and text of the next response; None at the end."""
        response, flags = self.sender.sent.get(timeout=60)
        if response is None:
            assert flags == FINAL
            return None
        if response.error is not None:
            assert flags == FINAL
            raise RuntimeError(response.error)
        values = {each.name: each.array[0] for each in response.output_tensors}
        return int(values["token"]), values["text"].decode()

    def rest(self):
        return list(iter(self.next, None))


class Response:
    def __init__(self, output_tensors=(), error=None):
        self.output_tensors, self.error = output_tensors, error


@pytest.fixture
def server(monkeypatch):
    stub = types.ModuleType("triton_python_backend_utils")
    stub.Tensor, stub.InferenceResponse, stub.TritonError = Tensor, Response, str
    stub.TRITONSERVER_RESPONSE_COMPLETE_FINAL = FINAL
    stub.get_input_tensor_by_name = lambda request, name: request.inputs.get(name)
    monkeypatch.setitem(sys.modules, stub.__name__, stub)
    return stub


@pytest.fixture
def repository(made, tmp_path):
    """The layout, around the engine that all tests share."""
    root = tmp_path / "models"
    root.mkdir()
    inner = layouts.engine_folder(root, layouts.TRITON)
    shutil.copytree(made[1].path, inner, dirs_exist_ok=True)
    layouts.write_layout(root, layouts.TRITON, open_engine(inner).manifest)
    return root


@pytest.fixture
def model(server, repository):
    """The model as the server loads it: from its file, with the server's arguments."""
    folder = repository / layouts.MODEL
    spec = importlib.util.spec_from_file_location("model", folder / "1" / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = module.TritonPythonModel()
    found.initialize({"model_repository": str(folder), "model_version": "1", "model_name": layouts.MODEL})
    yield found
    found.finalize()


def test_files(repository):
    files = {str(path.relative_to(repository)) for path in repository.rglob("*") if path.is_file()}
    assert {"fluxc/config.pbtxt", "fluxc/1/model.py", "fluxc/1/engine/engine.json"} <= files
    text = (repository / "fluxc" / "config.pbtxt").read_text()
    assert 'name: "fluxc"' in text
    assert "decoupled: true" in text
    assert text.count("[") == text.count("]")
    assert text.count("{") == text.count("}")
    assert len(re.findall(r"optional: true", text)) == 9
    assert "KIND_GPU" in config_text("x", "cuda:0")


def test_two_interleaved_streams_get_what_they_would_get_alone(model, made):
    first = Request(input_ids=[3, 4, 5], max_new_tokens=[40], budget=[1.0])
    second = Request(input_ids=[[9, 8]], max_new_tokens=[25])
    model.execute([first, second])
    found = {first: [], second: []}
    while any(len(pieces) < 5 for pieces in found.values()):
        for request, pieces in found.items():
            pieces.append(request.next())
    with fluxc.load(made[1].path) as engine:
        for request, ids, count in ((first, [3, 4, 5], 40), (second, [9, 8], 25)):
            options = {"budget": 1.0} if request is first else {}
            alone = engine.generate(ids, max_new_tokens=count, **options)
            assert [token for token, _ in [*found[request], *request.rest()]] == list(alone.tokens)


def test_sampling_options_reach_the_engine(model, made):
    request = Request(input_ids=[3, 4], max_new_tokens=[12], temperature=[2.0], top_k=[9], top_p=[0.9], seed=[7])
    model.execute([request])
    with fluxc.load(made[1].path) as engine:
        alone = engine.generate(
            [3, 4], max_new_tokens=12, temperature=2.0, top_k=9, top_p=float(np.float64(0.9)), seed=7
        )
    assert [token for token, _ in request.rest()] == list(alone.tokens)


def test_cancelled_requests_give_their_pages_back(model):
    request = Request(input_ids=[3, 4, 5], max_new_tokens=[200])
    model.execute([request])
    request.next()
    request.sender.cancelled = True
    assert len(request.rest()) < 199
    model._engine.generate([1], max_new_tokens=1)  # one more step of the scheduler
    assert model._engine.scheduler.keeper.pool.used == 0


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({}, "neither prompt nor input_ids"),
        ({"input_ids": [99_999]}, "outside the model's vocabulary"),
        ({"input_ids": [3], "temperature": [-1.0]}, "temperature"),
        ({"prompt": np.array([b'[{"role": "user", "content": "x"}]'], object)}, "outside the model's vocabulary"),
    ],
)
def test_bad_requests_are_answered_and_others_go_on(model, inputs, said):
    bad, good = Request(**inputs), Request(input_ids=[3], max_new_tokens=[2])
    model.execute([bad, good])
    with pytest.raises(RuntimeError, match=said):
        bad.next()
    assert len(good.rest()) == 2


def test_unloading_ends_what_runs(server, repository, model):
    request = Request(input_ids=[3, 4, 5], max_new_tokens=[220])
    model.execute([request])
    request.next()
    model.finalize()
    with pytest.raises(RuntimeError, match="the engine was closed"):
        request.rest()


def test_texts_and_messages():
    from fluxc.exporters.triton_server import _messages

    assert _messages('[{"role": "user"}]') == [{"role": "user"}]
    assert [_messages(text) for text in ("[1]", "[x", "[]", "hello")] == ["[1]", "[x", "[]", "hello"]
