"""Weights on disk: safetensors shards in which a tensor that several names share is stored once, read back by mmap."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fluxc.errors import ArchiveError
from fluxc.options import canonical_digest
from fluxc.tensor_file import map_tensors, write_ordered

SHARD_BYTES = 4_000_000_000
"""Upper bound of a shard in bytes; a single tensor larger than that has a shard of its own."""


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """Where a tensor is stored: file, its name there, dtype and shape."""

    file: str
    name: str
    dtype: str
    shape: tuple[int, ...]


def split_aliases(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors to store, and for every other name (a tied weight) the name that it shares its storage with."""
    first: dict[tuple[object, ...], str] = {}
    stored: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, tensor in tensors.items():
        owner = first.setdefault(_place(name, tensor), name)
        if owner == name:
            stored[name] = tensor
        else:
            aliases[name] = owner
    return stored, aliases


def _place(name: str, tensor: Tensor) -> tuple[object, ...]:
    if tensor.numel() == 0:
        return (name,)
    return (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes the tensors take on disk."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def weights_digest(tensors: Mapping[str, Tensor]) -> str:
    """Hexadecimal SHA-256 over names, dtypes, shapes and bytes, whatever the sharding and the order of names."""
    return canonical_digest({name: tensor_digest(tensor) for name, tensor in tensors.items()})


def tensor_digest(tensor: Tensor) -> list[object]:
    """dtype, shape and SHA-256 of one tensor's bytes."""
    raw: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return [dtype_name(tensor), list(tensor.shape), hashlib.sha256(raw).hexdigest()]


def dtype_name(tensor: Tensor) -> str:
    """float32, bfloat16, ..."""
    return str(tensor.dtype).removeprefix("torch.")


def write_shards(tensors: Mapping[str, Tensor], root: Path, folder: str, limit: int) -> dict[str, TensorEntry]:
    """Write `root/folder/model-NNNNN.safetensors`, none larger than `limit` bytes; returns where each tensor went."""
    (root / folder).mkdir(parents=True, exist_ok=True)
    entries: dict[str, TensorEntry] = {}
    for index, shard in enumerate(_shards(tensors, limit), start=1):
        file = f"{folder}/model-{index:05d}.safetensors"
        entries |= write_tensors(shard, root, file)
    return entries


def write_tensors(tensors: Mapping[str, Tensor], root: Path, file: str) -> dict[str, TensorEntry]:
    """Write one safetensors file, in this order; returns where each tensor went. Raises OSError as the disk does."""
    write_ordered(tensors, root / file)
    return {name: TensorEntry(file, name, dtype_name(t), tuple(t.shape)) for name, t in tensors.items()}


def safetensors_contents(path: Path) -> Iterator[tuple[list[object], TensorEntry]]:
    """The tensor_digest and the entry of every tensor in a file; raises ArchiveError for one that cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (a safetensors file is no mapping)
                tensor = file.get_tensor(name)
                yield tensor_digest(tensor), TensorEntry(str(path), name, dtype_name(tensor), tuple(tensor.shape))
    except (SafetensorError, OSError) as cause:
        raise ArchiveError(f"{path} is no readable safetensors file: {cause}") from cause


def _shards(tensors: Mapping[str, Tensor], limit: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if shard and bytes_of(shard.values()) + bytes_of([tensor]) > limit:
            yield shard
            shard = {}
        shard[name] = tensor
    if shard:
        yield shard


def read_tensors(root: Path, entries: Mapping[str, TensorEntry]) -> dict[str, Tensor]:
    """The tensors as views of the memory-mapped files; raises ArchiveError where one is not what its entry says."""
    found: dict[str, Tensor] = {}
    for file in dict.fromkeys(entry.file for entry in entries.values()):
        wanted = {name: entry for name, entry in entries.items() if entry.file == file}
        found |= _read_file(root / file, wanted)
    return {name: found[name] for name in entries}


def _read_file(path: Path, wanted: Mapping[str, TensorEntry]) -> dict[str, Tensor]:
    stored = map_tensors(path, [entry.name for entry in wanted.values()])
    tensors = {name: stored[entry.name] for name, entry in wanted.items()}
    for name, entry in wanted.items():
        if (dtype_name(tensors[name]), tuple(tensors[name].shape)) != (entry.dtype, tuple(entry.shape)):
            raise ArchiveError(f"{name} in {path} has another dtype or shape than the manifest says")
    return tensors


def in_groups(tensors: Mapping[str, Tensor], groups: Iterable[Sequence[str]]) -> dict[str, Tensor]:
    """The same tensors in an order that puts each group in one place: that of its first member."""
    group_of = {name: group for group in groups for name in group if all(other in tensors for other in group)}
    return {other: tensors[other] for name in tensors for other in group_of.get(name, (name,))}


def pack(tensors: Mapping[str, Tensor], groups: Iterable[Sequence[str]], device: str) -> dict[str, Tensor]:
    """The tensors on `device`, those of a group one after another in one allocation (they differ in rows only)."""
    moved: dict[str, Tensor] = {}
    for group in groups:
        if all(name in tensors for name in group):
            parts = [tensors[name] for name in group]
            rows = [part.shape[0] for part in parts]
            whole = torch.empty(sum(rows), *parts[0].shape[1:], dtype=parts[0].dtype, device=device)
            moved |= zip(group, whole.split(rows), strict=True)
            for name, part in zip(group, parts, strict=True):
                moved[name].copy_(part)
    return {name: moved[name] if name in moved else tensor.to(device) for name, tensor in tensors.items()}
