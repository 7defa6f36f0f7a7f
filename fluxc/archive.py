"""Saved programs: `torch.export` archives, written atomically and loaded without executing anything from the file.

`torch.export.load` unpickles sample inputs and evaluates strings of the archive. So torch never sees the file: it is
opened here, checked (`archive_zip`, `archive_model`, `archive_text`, `archive_weights`), and a cleaned copy of the
graph without tensors and without sample inputs is handed to torch; the tensors are then mapped from the file.
"""

from __future__ import annotations

import base64
import binascii
import copy
import dataclasses
import io
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch.export.exported_program import ExportedProgram

from fluxc import archive_weights
from fluxc.archive_model import checked_model, parse_json
from fluxc.archive_torch import CONSTANTS_CONFIG, MODEL, RECORDS, SAMPLE_INPUTS, WEIGHTS_CONFIG, read_graph
from fluxc.archive_weights import CONSTANTS, WEIGHTS
from fluxc.archive_zip import Archive, open_archive
from fluxc.atomic import atomic_file
from fluxc.errors import ArchiveError

_EXTRA = "extra/"
_BINARY = ".fluxc-base64"
_FOLDERS = (WEIGHTS, CONSTANTS, _EXTRA, ".data/")


@dataclasses.dataclass(frozen=True)
class ArchiveReport:
    """What an archive holds, found without loading it. Sizes are bytes."""

    torch_version: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    operators: dict[str, int]
    tensors: int
    tensor_bytes: int
    has_weights: bool
    extra: tuple[str, ...]

    @property
    def by_fluxc(self) -> bool:
        """Whether fluxc wrote it, so that the program is already in normal form."""
        return "fluxc.json" in self.extra


def save_program(
    program: ExportedProgram,
    path: str | os.PathLike[str],
    *,
    extra: Mapping[str, str | bytes] | None = None,
    with_weights: bool = True,
    force: bool = False,
) -> None:
    """Write `program` to `path` with `extra` files beside it (bytes as base64); the program is not changed.

    Sample inputs are never written. Without weights the state dict's tensors are left out (constants stay), for
    `bind_weights` to put back. Raises OutputExistsError if `path` exists and `force` is False, StorageError if the
    disk refuses, ArchiveError if the program holds objects that could only be pickled.
    """
    clean = _for_saving(program, with_weights)
    files = {_extra_name(name, data): _as_text(data) for name, data in (extra or {}).items()}
    with atomic_file(path, force=force) as temporary, _Sink(temporary) as sink:
        try:
            torch.export.save(clean, sink, extra_files=files)
        except RuntimeError:
            if sink.failure is not None:
                raise sink.failure from None
            raise


def load_program(path: str | os.PathLike[str]) -> tuple[ExportedProgram, dict[str, str | bytes]]:
    """The program at `path` and its extra files, as they were given to `save_program`.

    Nothing in the file is executed: anything that torch would unpickle or evaluate beyond arithmetic is refused, and
    sample inputs are not read. Tensors are mapped from the file, private to this process; those that were left out
    are on the meta device. Raises ArchiveError.
    """
    from fluxc import kernels

    kernels.register()
    archive, model, weights, constants = _inspected(path)
    program = read_graph(archive, model, weights, constants)
    program.state_dict.update(archive_weights.read_tensors(archive, weights, WEIGHTS))
    program.constants.update(archive_weights.read_tensors(archive, constants, CONSTANTS))
    return program, _read_extra(archive)


def inspect_archive(path: str | os.PathLike[str]) -> ArchiveReport:
    """Check the archive at `path` as `load_program` does, without loading it. Raises ArchiveError."""
    archive, model, weights, constants = _inspected(path)
    graph, signature = model["graph_module"]["graph"], model["graph_module"]["signature"]
    tensors = {WEIGHTS + p["path_name"] for p in weights.values()}
    tensors |= {CONSTANTS + p["path_name"] for p in constants.values()}
    stored = sum(archive.members[name].size for name in tensors)
    missing = [p for p in weights.values() if not archive.members[WEIGHTS + p["path_name"]].size]
    operators: dict[str, int] = {}
    for node in graph["nodes"]:
        operators[node["target"]] = operators.get(node["target"], 0) + 1
    return ArchiveReport(
        torch_version=str(model.get("torch_version", "")),
        inputs=_argument_names(signature["input_specs"], "user_input"),
        outputs=_argument_names(signature["output_specs"], "user_output"),
        operators=operators,
        tensors=len(weights) + len(constants),
        tensor_bytes=stored,
        has_weights=not any(0 not in [n["as_int"] for n in p["tensor_meta"]["sizes"]] for p in missing),
        extra=tuple(sorted(_read_extra(archive))),
    )


def bind_weights(program: ExportedProgram, tensors: Mapping[str, torch.Tensor]) -> ExportedProgram:
    """The same program over `tensors` (state dict name to tensor), which are shared, not copied.

    Raises ArchiveError naming the tensors that are missing, unexpected, or of another shape or dtype.
    """
    wanted = program.state_dict
    for names, problem in ((wanted.keys() - tensors.keys(), "misses"), (tensors.keys() - wanted.keys(), "also has")):
        if names:
            listed = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise ArchiveError(f"the weights do not fit the program: the file {problem} {listed}")
    bound = copy.copy(program)
    bound._state_dict = {name: _bound(name, old, tensors[name]) for name, old in wanted.items()}
    return bound


def _bound(name: str, old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    if old.shape != new.shape or old.dtype != new.dtype:
        want, got = f"{old.dtype} {tuple(old.shape)}", f"{new.dtype} {tuple(new.shape)}"
        raise ArchiveError(f"the weights do not fit the program: {name} is {got}, the program has {want}")
    if isinstance(old, torch.nn.Parameter) and not isinstance(new, torch.nn.Parameter):
        return torch.nn.Parameter(new, requires_grad=old.requires_grad)
    return new


def _inspected(path: str | os.PathLike[str]) -> tuple[Archive, dict[str, Any], dict[str, Any], dict[str, Any]]:
    archive = open_archive(path)
    for name in archive.members:
        if name not in (*RECORDS, MODEL, SAMPLE_INPUTS) and not name.startswith(_FOLDERS):
            raise ArchiveError(f"{archive.path} holds {name}, which no saved program has", hint="save it again")
    model = checked_model(parse_json(archive.read(MODEL), MODEL))
    weights = parse_json(archive.read(WEIGHTS_CONFIG), WEIGHTS_CONFIG)
    constants = parse_json(archive.read(CONSTANTS_CONFIG), CONSTANTS_CONFIG)
    if archive.members.get("byteorder") and archive.read("byteorder") != b"little":
        raise ArchiveError(f"{archive.path} was saved on a big-endian machine")
    return (
        archive,
        model,
        archive_weights.checked_config(archive, weights, WEIGHTS),
        archive_weights.checked_config(archive, constants, CONSTANTS),
    )


def _read_extra(archive: Archive) -> dict[str, str | bytes]:
    extra: dict[str, str | bytes] = {}
    for member in archive.members:
        if member.startswith(_EXTRA):
            name = member.removeprefix(_EXTRA)
            try:
                if name.endswith(_BINARY):
                    extra[name.removesuffix(_BINARY)] = base64.b64decode(archive.read(member), validate=True)
                else:
                    extra[name] = archive.read(member).decode()
            except (binascii.Error, UnicodeDecodeError) as error:
                raise ArchiveError(f"{archive.path}: the extra file {name} is damaged", hint="save it again") from error
    return extra


def _extra_name(name: str, data: str | bytes) -> str:
    if name.endswith(_BINARY) or {"", ".", ".."} & set(name.split("/")) or "\\" in name:
        raise ArchiveError(f"{name!r} cannot be the name of an extra file", hint="use a relative path")
    return name if isinstance(data, str) else name + _BINARY


def _as_text(data: str | bytes) -> str:
    return data if isinstance(data, str) else base64.b64encode(data).decode()


def _for_saving(program: ExportedProgram, with_weights: bool) -> ExportedProgram:
    """A shallow copy without sample inputs; the tensors that are not to be written are replaced by meta ones."""
    for name, value in (*program.state_dict.items(), *program.constants.items()):
        plain = isinstance(value, torch.Tensor) and type(value.data) is torch.Tensor and value.layout == torch.strided
        if not plain:
            raise ArchiveError(f"{name} is a {type(value).__name__}, which could only be pickled")
    clean = copy.copy(program)
    clean.example_inputs = None
    if not with_weights:
        clean._state_dict = {name: _on_meta(tensor) for name, tensor in program.state_dict.items()}
    return clean


def _on_meta(tensor: torch.Tensor) -> torch.Tensor:
    empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    return torch.nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else empty


def _argument_names(specs: list[dict[str, Any]], kind: str) -> tuple[str, ...]:
    arguments = [spec[kind]["arg"] for spec in specs if kind in spec]
    values = [next(iter(argument.values())) for argument in arguments]
    return tuple(str(v.get("name") or v.get("as_name")) if isinstance(v, dict) else str(v) for v in values)


class _Sink(io.FileIO):
    """A file that remembers why writing failed: torch's writer turns the disk's error into its own."""

    failure: OSError | None = None

    def __init__(self, path: os.PathLike[str]) -> None:
        super().__init__(path, "wb")

    def write(self, data: Any) -> int:
        """Write all of `data`."""
        view = memoryview(data).cast("B")
        done = 0
        try:
            while done < len(view):
                done += super().write(view[done:]) or 0
        except OSError as error:
            self.failure = error
            raise
        return done
