"""The tensors of a saved program: descriptions checked, bytes mapped from the file, nothing unpickled."""

from __future__ import annotations

import mmap
from typing import Any

import torch

from fluxc import archive_text
from fluxc.archive_zip import Archive
from fluxc.errors import ArchiveError

WEIGHTS = "data/weights/"
CONSTANTS = "data/constants/"
_PREFIXES = {WEIGHTS: "weight_", CONSTANTS: "tensor_"}
_SAVE_AGAIN = "save the program again"

# torch's serialized ScalarType.
_DTYPES = {
    1: torch.uint8, 2: torch.int8, 3: torch.int16, 4: torch.int32, 5: torch.int64,
    6: torch.float16, 7: torch.float32, 8: torch.float64, 12: torch.bool, 13: torch.bfloat16,
    28: torch.uint16, 29: torch.float8_e4m3fn, 30: torch.float8_e5m2, 34: torch.uint32, 35: torch.uint64,
}  # fmt: skip
_STRIDED = 7


def checked_config(archive: Archive, config: Any, folder: str) -> dict[str, dict[str, Any]]:
    """The tensor descriptions of `folder` (WEIGHTS or CONSTANTS) by name; raises ArchiveError for pickled ones."""
    try:
        payloads = config["config"]
        for name, payload in payloads.items():
            archive_text.check_path(name)
            _check_payload(archive, name, payload, folder)
    except (KeyError, TypeError, AttributeError) as error:
        raise ArchiveError(f"the archive's tensor list is damaged ({error})", hint=_SAVE_AGAIN) from error
    return payloads


def _check_payload(archive: Archive, name: str, payload: dict[str, Any], folder: str) -> None:
    path = payload["path_name"]
    if payload["use_pickle"] is not False or not path.startswith(_PREFIXES[folder]):
        reason = "is stored as a pickle, which would run code when read"
        raise ArchiveError(f"{archive.path}: {name} {reason}", hint="export the model with plain tensors")
    member, meta = archive.members.get(folder + path), payload["tensor_meta"]
    if "/" in path or member is None:
        raise ArchiveError(f"{archive.path} is damaged: the tensor of {name} is missing", hint=_SAVE_AGAIN)
    archive_text.check_name(meta["device"]["type"])
    size, stride, offset = _geometry(meta)
    if meta["dtype"] not in _DTYPES or meta["layout"] != _STRIDED:
        raise ArchiveError(f"{archive.path}: {name} has a dtype or layout fluxc does not read")
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    if 0 not in size and member.size and (last + 1) * _DTYPES[meta["dtype"]].itemsize > member.size:
        raise ArchiveError(f"{archive.path} is damaged: {name} needs more bytes than are stored", hint=_SAVE_AGAIN)


def _geometry(meta: dict[str, Any]) -> tuple[list[int], list[int], int]:
    """Size, stride and storage offset; symbols and negative numbers are damage."""
    size = [n["as_int"] for n in meta["sizes"]]
    stride = [n["as_int"] for n in meta["strides"]]
    offset = meta["storage_offset"]["as_int"]
    if len(size) != len(stride) or any(type(n) is not int or not 0 <= n < 2**48 for n in (*size, *stride, offset)):
        raise ArchiveError("the archive's tensor list is damaged (a size is no size)", hint=_SAVE_AGAIN)
    return size, stride, offset


def without_data(payloads: dict[str, dict[str, Any]], folder: str) -> dict[str, dict[str, Any]]:
    """Descriptions of the same tensors on the meta device, each in a file of its own that may be empty."""
    return {
        name: {
            "path_name": f"{_PREFIXES[folder]}{index}",
            "is_param": bool(payload["is_param"]),
            "use_pickle": False,
            "tensor_meta": _meta_device(payload["tensor_meta"]),
        }
        for index, (name, payload) in enumerate(payloads.items())
    }


def _meta_device(meta: dict[str, Any]) -> dict[str, Any]:
    size = [n["as_int"] for n in meta["sizes"]]
    stride = torch.empty(size, device="meta").stride()
    return {
        "dtype": meta["dtype"],
        "sizes": meta["sizes"],
        "requires_grad": bool(meta["requires_grad"]),
        "device": {"type": "meta", "index": None},
        "strides": [{"as_int": n} for n in stride],
        "storage_offset": {"as_int": 0},
        "layout": _STRIDED,
    }


def read_tensors(archive: Archive, payloads: dict[str, dict[str, Any]], folder: str) -> dict[str, torch.Tensor]:
    """The tensors of `folder`, mapped from the file (private, copy on write); tied ones share their storage.

    A tensor whose bytes were left out comes back on the meta device.
    """
    storages: dict[str, torch.UntypedStorage] = {}
    mapped = _map(archive)
    tensors = {}
    for name, payload in payloads.items():
        path = payload["path_name"]
        if path not in storages:
            storages[path] = _storage(mapped, archive, folder + path)
        tensors[name] = _tensor(storages[path], payload)
    return tensors


def _map(archive: Archive) -> mmap.mmap:
    with open(archive.path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def _storage(mapped: mmap.mmap, archive: Archive, path: str) -> torch.UntypedStorage:
    member = archive.members[path]
    if member.size == 0:
        return torch.UntypedStorage(0)
    raw = torch.frombuffer(mapped, dtype=torch.uint8, count=member.size, offset=member.offset)
    # torch aligns each tensor in the file; a copy is aligned where another writer did not.
    return (raw if member.offset % 16 == 0 else raw.clone()).untyped_storage()


def _tensor(storage: torch.UntypedStorage, payload: dict[str, Any]) -> torch.Tensor:
    meta = payload["tensor_meta"]
    size, stride, offset = _geometry(meta)
    dtype = _DTYPES[meta["dtype"]]
    if storage.nbytes() == 0 and 0 not in size:
        tensor = torch.empty_strided(size, stride, dtype=dtype, device="meta")
    else:
        tensor = torch.empty(0, dtype=dtype).set_(storage, offset, size, stride)
        tensor = _placed(tensor, meta["device"])
    if payload["is_param"]:
        return torch.nn.Parameter(tensor, requires_grad=bool(meta["requires_grad"]))
    return tensor


def _placed(tensor: torch.Tensor, device: dict[str, Any]) -> torch.Tensor:
    """The tensor on the device it was saved from; raises ArchiveError if this machine has none."""
    if device["type"] in ("cpu", "meta"):
        return tensor
    try:
        return tensor.to(torch.device(device["type"], device["index"] or 0))
    except (RuntimeError, AssertionError) as error:
        raise ArchiveError(f"the program was saved on {device['type']}", hint="export it on the CPU") from error
