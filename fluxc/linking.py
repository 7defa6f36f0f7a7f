"""Weights that are not copied: a model.flux that refers to the safetensors files of its source by path and hash."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.export import ExportedProgram

from fluxc.errors import ArchiveError, SourceError
from fluxc.manifest import FileEntry
from fluxc.weight_files import TensorEntry, dtype_name, safetensors_contents, split_aliases, tensor_digest

_COPY = "leave --link out: the weights are then copied"


@dataclasses.dataclass(frozen=True)
class Links:
    """Tensors that stand in files of the source: where each is, by name in the program, and the files' hashes."""

    entries: dict[str, TensorEntry] = dataclasses.field(default_factory=dict)
    files: dict[str, FileEntry] = dataclasses.field(default_factory=dict)

    @classmethod
    def to(cls, tensors: Mapping[str, Tensor], files: Iterable[str | Path]) -> Links:
        """The tensors whose dtype, shape and bytes stand in one of the safetensors `files`, whatever their names there.

        Raises ArchiveError for a file that cannot be read.
        """
        known = {str(digest): entry for file in files for digest, entry in safetensors_contents(Path(file).resolve())}
        found = {name: known.get(str(tensor_digest(tensor))) for name, tensor in tensors.items()} if known else {}
        entries = {name: entry for name, entry in found.items() if entry}
        return cls(entries, {file: FileEntry.of(Path(file)) for file in {entry.file for entry in entries.values()}})

    def verify(self) -> None:
        """Raise ArchiveError naming the first file that is gone or has changed since."""
        for name, entry in self.files.items():
            if not Path(name).is_file() or FileEntry.of(Path(name)) != entry:
                raise ArchiveError(f"{name} has changed while it was linked to", hint="transform the model again")


def source_files(model: Any) -> tuple[Path, ...]:
    """The safetensors files of a Hugging Face directory.

    Raises SourceError, with the reason, for every other kind of model: its weights are stored in another form than
    they are used in, or where they may go away.
    """
    from fluxc.capture.sources import locate

    if not isinstance(model, (str, Path)):
        raise SourceError(f"a {type(model).__name__} in memory has no files to link to", hint=_COPY)
    path = Path(model)
    if path.is_file() and path.suffix in (".pt", ".pt2"):
        raise SourceError(
            f"{path} holds its weights inside and cannot be linked to",
            hint="name the Hugging Face directory it was captured from, or leave --link out",
        )
    location = locate(model)
    if location.file:
        raise SourceError(f"{model} is a GGUF file: its weights are converted when they are loaded", hint=_COPY)
    if not location.local:
        raise SourceError(
            f"{model} is a hub id: its files stand in a cache that may be cleared",
            hint="download it to a directory and name that, or leave --link out",
        )
    return _weight_files(path)


def _weight_files(folder: Path) -> tuple[Path, ...]:
    """As transformers finds them: one file, or the shards of an index."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return (single,)
    if not index.is_file():
        raise SourceError(f"{folder} holds no model.safetensors to link to", hint=_COPY)
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        return tuple(folder / name for name in names)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as cause:
        raise SourceError(f"{index} is no index of weights", hint="is this the whole checkpoint?") from cause


def link_weights(program: ExportedProgram, files: Iterable[Path]) -> Links:
    """Links for every weight of `program`; small buffers that stand in no file are left to be copied.

    Raises SourceError where a weight is not used as it is stored (another dtype, merged or split when loaded), and
    ArchiveError for a file that cannot be read.
    """
    files = tuple(files)
    stored, _ = split_aliases(program.state_dict)
    links = Links.to(stored, files)
    changed = [name for name in program.graph_signature.parameters if name in stored and name not in links.entries]
    if changed:
        first = stored[changed[0]]
        what = f"{changed[0]}, {dtype_name(first)} {list(first.shape)}"
        raise SourceError(
            f"{len(changed)} of {len(stored)} tensors are not stored in {files[0].parent} as they are used ({what}): "
            "they were converted, merged or split",
            hint=_COPY,
        )
    return links
