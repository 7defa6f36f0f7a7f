"""Safetensors files whose tensors keep their order, read as views of one mapping.

The safetensors library sorts tensors by name and gives each a storage of its own. Here the writer decides what lies
side by side, and the reader can see it: weights that are merged into one GEMM are then merged by a view.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fluxc.errors import ArchiveError

_ALIGNMENT = 64  # bytes; where the data starts
_LONGEST_HEADER = 100_000_000  # bytes, as in the safetensors library
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def write_ordered(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors one after another in the order given, wider dtypes first. Raises OSError where the disk refuses."""
    order = sorted(tensors.items(), key=lambda item: -item[1].element_size())  # so that each stands aligned
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in order:
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in order:
            file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def map_tensors(path: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """The tensors `names` of a safetensors file as views of one private mapping (copy on write).

    Raises ArchiveError for a file that is not what it should be, or has no tensor of a name.
    """
    size, start, header = _header(path)
    storage: Any = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=size)
    tensors = {}
    for name in names:
        if name not in header:
            raise ArchiveError(f"{path} holds no tensor {name!r}")
        tensors[name] = _view(storage, start, header[name], f"{name} in {path}")
    return tensors


def _header(path: Path) -> tuple[int, int, dict[str, Any]]:
    """Bytes of the file, where the data starts, and the header."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if 8 + length <= min(size, _LONGEST_HEADER) else None
    except (OSError, ValueError) as cause:
        raise ArchiveError(f"{path} is no readable safetensors file: {cause}") from cause
    if not isinstance(header, dict):
        raise ArchiveError(f"{path} is no safetensors file")
    return size, 8 + length, header


def _view(storage: Any, start: int, entry: Any, where: str) -> Tensor:
    try:
        dtype, shape, (first, last) = _DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        is_whole = all(type(n) is int and n >= 0 for n in (*shape, first, last))
        is_whole = is_whole and last - first == math.prod(shape) * dtype.itemsize and start + last <= storage.nbytes()
    except (KeyError, TypeError, ValueError) as cause:
        raise ArchiveError(f"{where} is described in another way than safetensors does") from cause
    if not is_whole:
        raise ArchiveError(f"{where} has another size than its shape and dtype say")
    offset = start + first
    if offset % dtype.itemsize:  # other writers do not align: a storage of its own, at an address of any kind
        storage, offset = storage[offset : start + last], 0
    stride = torch.empty(shape, device="meta").stride()
    return torch.empty(0, dtype=dtype).set_(storage, offset // dtype.itemsize, shape, stride)
