"""Replacing several small files of a directory at once.

New contents are written beside the old as `NAME.next`. Writing `manifest.json.next`, with the hashes of all, is the
moment of commitment: before it the old files count, after it `finish` moves the new ones in place, now or, after a
crash, when the directory is opened next.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fluxc import manifest
from fluxc.atomic import atomic_file, storage_errors
from fluxc.manifest import FileEntry, Manifest

SUFFIX = ".next"


@dataclasses.dataclass(frozen=True)
class Changes:
    """Contents waiting to take the place of files under `root`; `names` collects which."""

    root: Path
    names: list[str] = dataclasses.field(default_factory=list)

    def reserve(self, name: str) -> str:
        """The relative path to write the new content of `name` to."""
        self.names.append(name)
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        return name + SUFFIX

    def write(self, name: str, content: bytes | str) -> None:
        """New content of `name`."""
        (self.root / self.reserve(name)).write_bytes(content.encode() if isinstance(content, str) else content)

    def commit(self, old: Manifest, **changes: Any) -> None:
        """Make the new contents count: `old` with their hashes and with `changes` becomes the manifest."""
        files = {name: FileEntry.of(self.root / (name + SUFFIX)) for name in self.names}
        new = dataclasses.replace(old, files=old.files | files, **changes)
        with atomic_file(self.root / (manifest.NAME + SUFFIX), force=True) as path:
            path.write_text(new.to_json(), encoding="utf-8")


@contextlib.contextmanager
def changes(root: Path) -> Iterator[Changes]:
    """Collect changes under `root`; they take effect if the block commits. Raises StorageError."""
    with storage_errors(root):
        _discard(root)
        try:
            yield Changes(root)
            finish(root)
        finally:
            if not (root / (manifest.NAME + SUFFIX)).exists():
                _discard(root)


def finish(root: Path) -> None:
    """Complete a committed change that was cut off; does nothing where there is none. Raises StorageError."""
    committed = root / (manifest.NAME + SUFFIX)
    if not committed.exists():
        return
    new = Manifest.load(committed)
    with storage_errors(root):
        for name, entry in new.files.items():
            waiting = root / (name + SUFFIX)
            if waiting.is_file() and FileEntry.of(waiting) == entry:
                waiting.replace(root / name)
        committed.replace(root / manifest.NAME)


def _discard(root: Path) -> None:
    for path in root.rglob("*" + SUFFIX):
        path.unlink()
