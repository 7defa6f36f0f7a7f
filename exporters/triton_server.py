"""A model of Triton Inference Server's Python backend around an engine: requests join its running batch.

The server hands over requests and does not wait: each one's pieces are sent as they come (decoupled mode). Inputs are a
text (chat messages as JSON, where it begins with a bracket) or token ids, and options of a generation.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ENGINE = "engine"
_OPTIONS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "max_new_tokens": ("TYPE_INT32", int),
    "budget": ("TYPE_FP32", float),
    "temperature": ("TYPE_FP32", float),
    "top_p": ("TYPE_FP32", float),
    "top_k": ("TYPE_INT32", int),
    "seed": ("TYPE_INT64", int),
    "stop": ("TYPE_STRING", lambda value: value.decode("utf-8")),
}


def config_text(name: str, device: str) -> str:
    """The `config.pbtxt` of the model."""
    options = ",\n".join(_input(option, kind, "1") for option, (kind, _) in _OPTIONS.items())
    kind = "KIND_GPU" if device.startswith("cuda") else "KIND_CPU"
    return f"""name: "{name}"
backend: "python"
max_batch_size: 0
model_transaction_policy {{ decoupled: true }}
input [
{_input("prompt", "TYPE_STRING", "1")},
{_input("input_ids", "TYPE_INT64", "-1")},
{options}
]
output [
  {{ name: "text" data_type: TYPE_STRING dims: [ 1 ] }},
  {{ name: "token" data_type: TYPE_INT64 dims: [ 1 ] }}
]
instance_group [ {{ count: 1 kind: {kind} }} ]
"""


def _input(name: str, kind: str, size: str) -> str:
    return f'  {{ name: "{name}" data_type: {kind} dims: [ {size} ] optional: true }}'


class TritonPythonModel:
    """What the server calls: `initialize`, `execute`, `finalize`."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the engine that stands beside the model file; raises what `fluxc.load` raises."""
        import triton_python_backend_utils as server

        import fluxc

        self._server = server
        self._threads: list[threading.Thread] = []
        self._engine = fluxc.load(Path(args["model_repository"]) / args["model_version"] / ENGINE)

    def execute(self, requests: list[Any]) -> None:
        """Start each request; a thread of its own sends its pieces, and stops it where the client has gone."""
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        for request in requests:
            thread = threading.Thread(target=self._answer, args=(request, request.get_response_sender()), daemon=True)
            self._threads.append(thread)
            thread.start()

    def finalize(self) -> None:
        """Unload: running requests end, and their clients are told."""
        self._engine.close()
        for thread in self._threads:
            thread.join()

    def _answer(self, request: Any, sender: Any) -> None:
        final = self._server.TRITONSERVER_RESPONSE_COMPLETE_FINAL
        try:
            with self._engine.submit(self._prompt(request), **self._options(request)) as handle:
                for piece in handle:
                    if sender.is_cancelled():
                        break
                    sender.send(self._response(piece))
        except Exception as fault:  # whatever it is, the client has to hear of it, and the server must live on
            sender.send(self._server.InferenceResponse(error=self._server.TritonError(str(fault))), flags=final)
            return
        sender.send(flags=final)

    def _response(self, piece: Any) -> Any:
        text, token = np.array([piece.text.encode("utf-8")], np.object_), np.array([piece.token], np.int64)
        tensors = [self._server.Tensor("text", text), self._server.Tensor("token", token)]
        return self._server.InferenceResponse(output_tensors=tensors)

    def _prompt(self, request: Any) -> Any:
        ids, text = self._value(request, "input_ids"), self._value(request, "prompt")
        if ids is not None:
            return ids.flatten().tolist()
        if text is None:
            raise ValueError("the request has neither prompt nor input_ids")
        given: str = text.flatten()[0].decode("utf-8")
        return _messages(given)

    def _options(self, request: Any) -> dict[str, Any]:
        found = {name: (self._value(request, name), read) for name, (_, read) in _OPTIONS.items()}
        options = {name: read(value.flatten()[0]) for name, (value, read) in found.items() if value is not None}
        stop = options.pop("stop", None)
        return {**options, "stop_strings": stop} if stop else options

    def _value(self, request: Any, name: str) -> Any:
        tensor = self._server.get_input_tensor_by_name(request, name)
        return None if tensor is None else tensor.as_numpy()


def _messages(text: str) -> Any:
    """Chat messages where the text is a JSON list of them, else the text."""
    if not text.startswith("["):
        return text
    try:
        values = json.loads(text)
    except ValueError:
        return text
    is_chat = isinstance(values, list) and values and all(isinstance(value, dict) for value in values)
    return values if is_chat else text
