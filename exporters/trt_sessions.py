"""The sessions of a TensorRT engine directory, as `OnnxSessions`. Imports numpy and TensorRT, neither torch nor onnx.

No engine was run by its authors: what is tested is this code over a stand-in for the library and the driver.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fluxc.errors import TargetError
from fluxc.exporters.cuda_driver import CudaDriver

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class TrtSessions:
    """The engines of `root`, each opened when it is first run; split plans: prefill_full and prefill_sparse.

    `files`: file of each program, as in the manifest. `library`, `version`: what built them.
    """

    root: Path
    files: Mapping[str, str]
    driver: CudaDriver
    library: str
    version: str
    name: str = "prefill"

    def prefill(
        self, input_ids: np.ndarray, prompt_lens: np.ndarray, route_bias: np.ndarray, logits_at: np.ndarray
    ) -> Arrays:
        """See `OnnxSessions.prefill`."""
        length = input_ids.shape[1]
        return self._run(
            self.name,
            {
                "input_ids": input_ids,
                "position_ids": np.arange(length, dtype=np.int64)[None],
                "seq_lens": np.full(1, length, np.int64),
                "prompt_lens": prompt_lens,
                "route_bias": route_bias,
                "logits_at": logits_at,
            },
        )

    def decode(
        self, caches: Arrays, input_ids: np.ndarray, position_ids: np.ndarray, slots: np.ndarray, lens: np.ndarray
    ) -> np.ndarray:
        """See `OnnxSessions.decode`. The caches go to the device and come back at every step."""
        given = {"input_ids": input_ids, "position_ids": position_ids, "slots": slots, "lens": lens, **caches}
        found = self._run("decode", given)
        for name, cache in caches.items():
            cache[...] = found[f"{name}_out"]
        return found["logits"]

    def _run(self, phase: str, given: Mapping[str, np.ndarray]) -> Arrays:
        engine, context = self._engine(phase)
        self.driver.use()
        inputs, outputs = _tensors(self._library, engine)
        arrays = {name: np.ascontiguousarray(given[name], _dtype(self._library, engine, name)) for name in inputs}
        for name, array in arrays.items():
            if not context.set_input_shape(name, array.shape):
                raise TargetError(
                    f"{self.files[phase]} takes no {name} of shape {list(array.shape)}",
                    hint="export with a larger --max-length or --batch",
                )
        for name in outputs:
            shape = tuple(context.get_tensor_shape(name))
            arrays[name] = np.empty(shape, _dtype(self._library, engine, name))
        return self._execute(phase, context, arrays, inputs, outputs)

    def _execute(self, phase: str, context: Any, arrays: Arrays, inputs: list[str], outputs: list[str]) -> Arrays:
        with contextlib.ExitStack() as stack:
            places = {name: stack.enter_context(self.driver.buffer(array.nbytes)) for name, array in arrays.items()}
            for name, place in places.items():
                context.set_tensor_address(name, place)
            for name in inputs:
                self.driver.upload(places[name], arrays[name])
            if not context.execute_async_v3(self.driver.stream):
                raise TargetError(f"TensorRT could not run {self.files[phase]}", hint="its log says why")
            self.driver.wait()
            for name in outputs:
                self.driver.download(arrays[name], places[name])
        return {name: arrays[name] for name in outputs}

    @functools.cached_property
    def _library(self) -> Any:
        return open_library(self.library, self.version)

    def _engine(self, phase: str) -> tuple[Any, Any]:
        opened: dict[str, tuple[Any, Any]] = self._opened
        if phase not in opened:
            opened[phase] = _open_engine(self._library, self.root / self.files[phase])
        return opened[phase]

    @functools.cached_property
    def _opened(self) -> dict[str, tuple[Any, Any]]:
        return {}


def open_library(name: str, version: str) -> Any:
    """The module; raises TargetError where it is missing, or is another version than the one that built the engine."""
    try:
        module = importlib.import_module(name)
    except ImportError as cause:
        raise TargetError(
            f"running this engine needs {name}, which is not installed",
            hint=f"pip install {name.replace('_', '-')}=={version}",
        ) from cause
    if module.__version__ != version:
        raise TargetError(
            f"the engine was built by {name} {version}, and {module.__version__} is installed: it opens only its own",
            hint=f"export it again, or pip install {name.replace('_', '-')}=={version}",
        )
    return module


def _open_engine(trt: Any, path: Path) -> tuple[Any, Any]:
    runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
    engine = runtime.deserialize_cuda_engine(path.read_bytes())
    context = engine.create_execution_context() if engine else None
    if context is None:
        raise TargetError(f"this GPU cannot run {path.name}", hint="`fluxc doctor` lists the GPUs TensorRT-RTX runs on")
    return engine, context


def _tensors(trt: Any, engine: Any) -> tuple[list[str], list[str]]:
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    given = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
    return given, [name for name in names if name not in given]


def _dtype(trt: Any, engine: Any, name: str) -> Any:
    return np.dtype(trt.nptype(engine.get_tensor_dtype(name)))
