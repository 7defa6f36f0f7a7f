"""One external-data file for several ONNX models: equal tensors are stored once."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import onnx_ir as ir

LEAST_BYTES = 1024
"""Smaller tensors stay in the model: shape inference and constant folding want to see them."""
_PAGE = 4096  # so that a runtime can map each tensor
_LINE = 64


def save_models(models: Mapping[str, ir.Model], root: Path, weights: str) -> None:
    """Write each model to `root/<file name>`, with the larger initializers of all in `root/weights`, each once.

    A tensor is read, hashed and written before the next: peak memory grows by one tensor. Raises OSError as the disk
    does.
    """
    with (root / weights).open("wb") as file:
        writer = _Writer(file, root, weights)
        for model in models.values():
            for value in model.graph.initializers.values():
                if value.const_value is not None and value.const_value.nbytes >= LEAST_BYTES:
                    value.const_value = writer.store(value.const_value, str(value.name))
    for name, model in models.items():
        ir.save(model, root / name)


class _Writer:
    """Appends tensors to a file and remembers, by their bytes, where each one stands."""

    def __init__(self, file: IO[bytes], root: Path, location: str) -> None:
        self._file, self._root, self._location = file, root, location
        self._places: dict[bytes, int] = {}

    def store(self, tensor: ir.TensorProtocol, name: str) -> ir.ExternalTensor:
        """The tensor, as one of the file."""
        content = tensor.tobytes()
        digest = hashlib.sha256(content).digest()
        if digest not in self._places:
            self._places[digest] = self._append(content)
        return ir.ExternalTensor(
            self._location,
            self._places[digest],
            len(content),
            tensor.dtype,
            shape=ir.Shape(tensor.shape.numpy()),
            name=name,
            base_dir=self._root,
        )

    def _append(self, content: bytes) -> int:
        unit = _PAGE if len(content) >= _PAGE else _LINE
        self._file.write(b"\0" * (-self._file.tell() % unit))
        at = self._file.tell()
        self._file.write(content)
        return at
