"""Where a command writes: its default path, and what would make the writing fail after long work."""

from __future__ import annotations

import os
from pathlib import Path

from fluxc.errors import OutputExistsError, StorageError


def default_flux(model: str) -> Path:
    """`model.pt` -> model.flux, `folder/Llama-3` and `owner/Llama-3` -> Llama-3.flux, in the working directory."""
    path = Path(os.path.abspath(model) if Path(model).is_dir() else model)
    stem = path.stem if path.suffix in (".pt", ".pt2", ".gguf", ".flux") else path.name
    return Path(f"{stem}.flux")


def check_file(path: Path, force: bool) -> Path:
    """`path`, where a file may be written; raises OutputExistsError or StorageError, before any work is done."""
    if path.is_dir():
        raise OutputExistsError(f"{path} is a directory, not a file", hint="name another output with -o")
    if path.exists() and not force:
        raise OutputExistsError(f"{path} already exists", hint="give --force to replace it, or name another with -o")
    check_folder(path)
    return path


def check_folder(path: Path) -> None:
    """Raise StorageError unless the folder that `path` goes into is there and may be written to."""
    folder = path.absolute().parent
    if not folder.is_dir():
        raise StorageError(f"the folder {folder} does not exist", hint="make it, or choose another place with -o")
    if not os.access(folder, os.W_OK):
        raise StorageError(f"the folder {folder} may not be written to", hint="choose another place with -o")
