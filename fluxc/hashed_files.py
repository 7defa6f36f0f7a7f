"""Files of an artifact with their SHA-256. Imports no torch: an engine is opened without it."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from fluxc.errors import ArchiveError


@dataclasses.dataclass(frozen=True)
class FileEntry:
    """One file: SHA-256 in hexadecimal, and size in bytes."""

    sha256: str
    bytes: int

    @classmethod
    def of(cls, path: Path) -> FileEntry:
        """Hash a file."""
        with path.open("rb") as file:
            return cls(hashlib.file_digest(file, "sha256").hexdigest(), path.stat().st_size)


def entries_below(root: Path) -> dict[str, FileEntry]:
    """Every file under `root` by its path there."""
    return {str(file.relative_to(root)): FileEntry.of(file) for file in sorted(root.rglob("*")) if file.is_file()}


def verify_file(path: Path, entry: FileEntry, fault: str, hint: str) -> None:
    """Raise ArchiveError unless `path` is there and is what `entry` says; `fault` says what it means if not."""
    if not path.is_file():
        raise ArchiveError(f"{path} is missing", hint=hint)
    if path.stat().st_size != entry.bytes or FileEntry.of(path) != entry:
        raise ArchiveError(f"{path} {fault}", hint=hint)


def check_format(values: Any, newest: int, path: Path) -> None:
    """Raise ArchiveError unless `values` is a manifest of format `newest` or older."""
    found = values.get("format") if isinstance(values, dict) else None
    if not isinstance(found, int):
        raise ArchiveError(f"{path} is no fluxc manifest")
    if found > newest:
        raise ArchiveError(f"{path} has format {found}, newer than {newest}", hint="update fluxc")


def check_names(names: Iterable[str], path: Path) -> None:
    """Raise ArchiveError for a file name that leads out of the directory."""
    for name in names:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise ArchiveError(f"{path} names {name!r}, which is outside the directory")
