"""Checks made before long work, so that it does not fail at its last step."""

from __future__ import annotations

import shutil
from pathlib import Path

from fluxc.errors import OutputExistsError, StorageError


def check_target(target: Path, marker: str, force: bool) -> None:
    """Raise OutputExistsError unless `target` is free, or `force` is set and it is a directory that holds `marker`.

    An empty directory may be replaced too; somebody else's files never are.
    """
    if not target.exists():
        return
    if not force:
        raise OutputExistsError(f"{target} already exists", hint="give --force to replace it, or name another output")
    if not target.is_dir() or (any(target.iterdir()) and not (target / marker).is_file()):
        raise OutputExistsError(f"{target} was not written by fluxc and is not replaced", hint="name another output")


def check_space(target: Path, needed: int) -> None:
    """Raise StorageError when the disk that `target` goes to has less than `needed` bytes free."""
    folder = next(parent for parent in target.absolute().parents if parent.exists())
    free = shutil.disk_usage(folder).free
    if free < needed:
        have = f"{needed / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free"
        raise StorageError(f"cannot write {target}: {have}", hint="free some space or write elsewhere")
