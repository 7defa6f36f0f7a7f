"""Outputs that are either whole or not there.

Both contexts give a temporary sibling of the output to write to. It takes the output's name only after everything was
written and synced to the disk; whatever goes wrong before (Ctrl-C included), nothing is left behind.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from fluxc.errors import OutputExistsError, StorageError

_STORAGE_ERRNOS = frozenset(
    {
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EFBIG,
        errno.EROFS,
        errno.EACCES,
        errno.EPERM,
        errno.EIO,
        errno.ENAMETOOLONG,
        errno.ENOTDIR,
        errno.ENOENT,
    }
)


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str], *, force: bool = False) -> Iterator[Path]:
    """Give a temporary path beside `path` to write to; on success it becomes `path`.

    Raises OutputExistsError if `path` exists and `force` is False, StorageError if the disk refuses. With `force` the
    old file stays until the new one is complete.
    """
    target = Path(path)
    _check_free(target, force)
    if target.is_dir():
        raise OutputExistsError(f"{target} is a directory, not a file", hint="name another output")
    temporary = _sibling(target)
    try:
        with storage_errors(target, temporary):
            temporary.touch(exist_ok=False)
            yield temporary
            _sync(temporary)
            _check_free(target, force)
            os.replace(temporary, target)
            _sync(target.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_directory(path: str | os.PathLike[str], force: bool = False) -> Iterator[Path]:
    """Give a new temporary directory beside `path` to fill; on success it becomes `path`.

    Raises OutputExistsError if `path` exists and `force` is False, StorageError if the disk refuses. With `force` the
    old directory stays until the new one is complete. The working directory, a directory above it and the home
    directory are never replaced.
    """
    target = Path(path)
    _check_free(target, force)
    _check_replaceable(target)
    temporary = _sibling(target)
    try:
        with storage_errors(target, temporary):
            temporary.mkdir()
            yield temporary
            for root, _, files in os.walk(temporary):
                for name in files:
                    _sync(Path(root, name))
                _sync(Path(root))
            _check_free(target, force)
            _swap(temporary, target)
            _sync(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def storage_errors(target: str | os.PathLike[str], *written: Path) -> Iterator[None]:
    """Turn an OSError of the disk into a StorageError that names `target` and the reason.

    Errors about files other than `target` and `written` (a source that cannot be read) pass through unchanged.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _STORAGE_ERRNOS or not _concerns(error, (Path(target), *written)):
            raise
        hint = _HINTS.get(error.errno or 0, "check the path and its permissions")
        raise StorageError(f"cannot write {target}: {os.strerror(error.errno or 0)}", hint=hint) from error


_HINTS = {
    errno.ENOSPC: "free some space or write elsewhere",
    errno.EDQUOT: "free some space or write elsewhere",
    errno.EFBIG: "write to a place that takes larger files",
    errno.ENOENT: "create the directory it goes into first",
    errno.ENOTDIR: "a part of the path is a file",
}


def _concerns(error: OSError, paths: tuple[Path, ...]) -> bool:
    """Whether the failing file is one of ours: a failed write names no file, a failed open names it."""
    if error.filename is None:
        return error.errno != errno.ENOENT
    failed = Path(os.fsdecode(error.filename))
    return any(failed == path or path in failed.parents or failed == path.parent for path in paths)


def _check_free(target: Path, force: bool) -> None:
    if os.path.lexists(target) and not force:
        raise OutputExistsError(f"{target} already exists", hint="give --force to replace it, or name another output")


def _check_replaceable(target: Path) -> None:
    if not os.path.lexists(target):
        return
    if target.is_symlink() or not target.is_dir():
        raise OutputExistsError(f"{target} is not a directory", hint="name another output")
    here, old = Path.cwd().resolve(), target.resolve()
    if old == here or old in here.parents or old == Path.home():
        raise OutputExistsError(f"{target} is in use and will not be replaced", hint="name another output")


def _sibling(target: Path) -> Path:
    name = target.resolve().name if target.name in ("", "..") else target.name
    return target.parent / f".{name}.{secrets.token_hex(6)}.tmp"


def _swap(new: Path, target: Path) -> None:
    """Move `new` to `target`; an old directory is kept aside until then and comes back if the move fails."""
    if not target.exists():
        os.rename(new, target)
        return
    old = _sibling(target)
    os.rename(target, old)
    try:
        os.rename(new, target)
    except BaseException:
        os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
