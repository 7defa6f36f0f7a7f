"""Checks of the place a command writes to, made before its long work."""

from __future__ import annotations

import os
from pathlib import Path

from fluxc.errors import OutputExistsError, StorageError


def check_file(path: Path, force: bool) -> Path:
    """`path`, where a file may be written; raises OutputExistsError or StorageError, before any work is done."""
    if path.is_dir():
        raise OutputExistsError(f"{path} is a directory, not a file", hint="name another output with -o")
    if path.exists() and not force:
        raise OutputExistsError(f"{path} already exists", hint="give --force to replace it, or name another with -o")
    check_folder(path)
    return path


def check_flux(path: Path, force: bool) -> Path:
    """`path`, where a model.flux folder may be written; raises as `check_file` does."""
    from fluxc.manifest import NAME
    from fluxc.preflight import check_target

    check_target(path, NAME, force)
    check_folder(path)
    return path


def check_folder(path: Path) -> None:
    """Raise StorageError unless the folder that `path` goes into is there and may be written to."""
    folder = path.absolute().parent
    if not folder.is_dir():
        raise StorageError(f"the folder {folder} does not exist", hint="make it, or choose another place with -o")
    if not os.access(folder, os.W_OK):
        raise StorageError(f"the folder {folder} may not be written to", hint="choose another place with -o")
