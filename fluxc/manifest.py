"""`manifest.json`: what a model.flux directory holds, with the hash of each file that loading depends on.

`device.json` (measured on one machine) is not in it; everything else is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fluxc.errors import ArchiveError
from fluxc.hashed_files import FileEntry, check_format, check_names, verify_file
from fluxc.json_form import dump, parse, read_text, strict
from fluxc.weight_files import TensorEntry

__all__ = ["FORMAT", "NAME", "FileEntry", "Manifest"]

NAME = "manifest.json"
FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Contents of a model.flux directory.

    `files` by path relative to the directory; `tensors` and `aliases` the weights by name in the programs (an alias
    shares the tensor of another name); `routers` the routers' tensors; `plan` the plan's digest; `meta` what capture
    knew of the source; `versions` the tools that wrote it; `links` safetensors files of the source, by absolute path,
    that hold tensors in place of files of the directory.
    """

    files: dict[str, FileEntry]
    tensors: dict[str, TensorEntry]
    aliases: dict[str, str]
    routers: dict[str, TensorEntry]
    plan: str
    meta: dict[str, Any]
    versions: dict[str, str]
    links: dict[str, FileEntry]
    format: int = FORMAT

    def to_json(self) -> str:
        """The text of `manifest.json`."""
        return dump(dataclasses.asdict(self), ArchiveError, "the manifest")

    @classmethod
    def load(cls, path: Path) -> Manifest:
        """Read and check a manifest; raises ArchiveError for a newer format and for anything malformed."""
        values = parse(read_text(path, ArchiveError), ArchiveError, str(path))
        check_format(values, FORMAT, path)
        manifest = strict(cls, values, ArchiveError, str(path))
        manifest = dataclasses.replace(
            manifest,
            files=_entries(FileEntry, manifest.files, path),
            links=_entries(FileEntry, manifest.links, path),
            tensors=_entries(TensorEntry, manifest.tensors, path),
            routers=_entries(TensorEntry, manifest.routers, path),
        )
        _check_paths(manifest, path)
        return manifest

    def verify(self, root: Path, weights: bool = True) -> None:
        """Compare files with their hashes (`weights` False: not those of the backbone, which are large).

        Raises ArchiveError naming the first that is damaged, missing, or changed since it was linked.
        """
        damaged = "is damaged: its SHA-256 is not the manifest's"
        for name, entry in self.files.items():
            if weights or not name.startswith("weights/"):
                verify_file(root / name, entry, damaged, "copy the directory again, or transform the model again")
        changed = f"has changed since {root} was linked to it"
        for name, entry in self.links.items() if weights else ():
            verify_file(Path(name), entry, changed, f"{root} has its weights there: put it back, or transform again")


def _entries(cls: type[Any], values: Mapping[str, Any], path: Path) -> dict[str, Any]:
    return {name: strict(cls, value, ArchiveError, f"{name} in {path}") for name, value in values.items()}


def _check_paths(manifest: Manifest, path: Path) -> None:
    entries = (*manifest.tensors.values(), *manifest.routers.values())
    check_names(manifest.files, path)
    unlisted = [entry.file for entry in entries if entry.file not in manifest.files | manifest.links]
    if unlisted:
        raise ArchiveError(f"{path} has no hash for {unlisted[0]!r}")
