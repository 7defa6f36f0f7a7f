"""The sessions of an ONNX engine. Imports onnxruntime and numpy, neither torch nor transformers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fluxc.errors import TargetError

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class OnnxSessions:
    """Prefill and decode of the engine in `root`, each opened when it is first run.

    `files`: file of each program, as in the manifest. `threads`: of one operator, 0 for all cores. `prepack`: ONNX
    Runtime keeps a rearranged copy of the weights for each session: steps take a third less time, and the weights are
    in memory three times. Without it both sessions read one mapping of the file. `arena`: ONNX Runtime keeps the memory
    of a run for the next one.
    """

    root: Path
    files: Mapping[str, str]
    threads: int = 0
    prepack: bool = False
    arena: bool = True

    def prefill(
        self, input_ids: np.ndarray, prompt_lens: np.ndarray, route_bias: np.ndarray, logits_at: np.ndarray
    ) -> Arrays:
        """One request: input_ids i64[1,S], prompt_lens i64[1], route_bias f32[L,1], logits_at i64[1,N].

        Returns logits [1,N,V], routes bool[L,1], scores f32[L,1] and k_a, v_a [1,Hk,S,D] of each attention.
        """
        length = input_ids.shape[1]
        inputs = {
            "input_ids": input_ids,
            "position_ids": np.arange(length, dtype=np.int64)[None],
            "seq_lens": np.full(1, length, np.int64),
            "prompt_lens": prompt_lens,
            "route_bias": route_bias,
            "logits_at": logits_at,
        }
        results = self._prefill.run(None, {name: inputs[name] for name in _names(self._prefill.get_inputs())})
        return dict(zip(_names(self._prefill.get_outputs()), results, strict=True))

    def decode(
        self, caches: Arrays, input_ids: np.ndarray, position_ids: np.ndarray, slots: np.ndarray, lens: np.ndarray
    ) -> np.ndarray:
        """One token of each of B requests: logits [B,V]. `caches` are written in place.

        input_ids, position_ids i64[B,1]; slots i64[A,B] within a request's own cache; lens i32[A,B], this token
        included; caches k_cache_a, v_cache_a [B,Hk,C,D], contiguous and finite everywhere.
        """
        bound = self._decode.io_binding()
        given = {"input_ids": input_ids, "position_ids": position_ids, "slots": slots, "lens": lens, **caches}
        kept = {name: np.ascontiguousarray(given[name]) for name in _names(self._decode.get_inputs())}
        for name, array in kept.items():
            bound.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        for name, array in caches.items():
            bound.bind_output(f"{name}_out", "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        bound.bind_output("logits", "cpu")
        self._decode.run_with_iobinding(bound)
        logits: np.ndarray = bound.get_outputs()[-1].numpy()
        return logits

    def close(self, phase: str) -> None:
        """Free the session of "prefill" or "decode"; the next call opens it again."""
        self.__dict__.pop(f"_{phase}", None)

    @functools.cached_property
    def _prefill(self) -> Any:
        return self._session("prefill")

    @functools.cached_property
    def _decode(self) -> Any:
        return self._session("decode")

    def _session(self, phase: str) -> Any:
        try:
            import onnxruntime
        except ImportError as cause:
            raise TargetError(
                "running an ONNX engine needs onnxruntime, which is not installed", hint="pip install onnxruntime"
            ) from cause
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.log_severity_level = 3
        options.enable_cpu_mem_arena = self.arena
        options.add_session_config_entry("session.disable_prepacking", str(int(not self.prepack)))
        return onnxruntime.InferenceSession(
            str(self.root / self.files[phase]), options, providers=["CPUExecutionProvider"]
        )


def _names(values: Sequence[Any]) -> list[str]:
    return [value.name for value in values]
