"""Outputs are whole or absent: success, failure half-way, Ctrl-C, full disk, existing output."""

from __future__ import annotations

import errno
import os
import resource
import signal
from pathlib import Path

import pytest

from fluxc.atomic import atomic_directory, atomic_file
from fluxc.errors import OutputExistsError, StorageError


def names(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir())


@pytest.fixture
def tiny_disk():
    """Writing more than 4 KiB to one file fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, old)


def test_file_appears_only_at_the_end(tmp_path):
    out = tmp_path / "out.json"
    with atomic_file(out) as draft:
        draft.write_text("new")
        assert not out.exists()
    assert out.read_text() == "new"
    assert names(tmp_path) == ["out.json"]


def test_file_has_ordinary_permissions(tmp_path):
    (tmp_path / "plain").touch()
    with atomic_file(tmp_path / "out"):
        pass
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt])
def test_failure_leaves_nothing(tmp_path, failure):
    with pytest.raises(failure), atomic_file(tmp_path / "out") as draft:
        draft.write_text("half")
        raise failure
    with pytest.raises(failure), atomic_directory(tmp_path / "dir") as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a").write_text("half")
        raise failure
    assert names(tmp_path) == []


def test_existing_file_needs_force(tmp_path):
    out = tmp_path / "out"
    out.write_text("old")
    with pytest.raises(OutputExistsError, match=r"out already exists.*--force"), atomic_file(out):
        pytest.fail("the body must not run")
    with pytest.raises(ValueError), atomic_file(out, force=True) as draft:
        draft.write_text("half")
        raise ValueError
    assert out.read_text() == "old"
    with atomic_file(out, force=True) as draft:
        draft.write_text("new")
        assert out.read_text() == "old"
    assert out.read_text() == "new"
    assert names(tmp_path) == ["out"]


def test_output_that_appears_meanwhile_is_kept(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(OutputExistsError), atomic_file(out) as draft:
        draft.write_text("mine")
        out.write_text("theirs")
    assert out.read_text() == "theirs"
    assert names(tmp_path) == ["out"]


def test_existing_directory_needs_force(tmp_path):
    out = tmp_path / "model.flux"
    out.mkdir()
    (out / "old").touch()
    with pytest.raises(OutputExistsError), atomic_directory(out):
        pytest.fail("the body must not run")
    with pytest.raises(ValueError), atomic_directory(out, force=True):
        raise ValueError
    assert names(out) == ["old"]
    with atomic_directory(out, force=True) as folder:
        (folder / "new").touch()
        assert names(out) == ["old"]
    assert names(out) == ["new"]
    assert names(tmp_path) == ["model.flux"]


def test_old_directory_comes_back_if_the_swap_fails(tmp_path, monkeypatch):
    out = tmp_path / "model.flux"
    out.mkdir()
    (out / "old").touch()
    real = os.rename

    def failing(source, target):
        if Path(target) == out and (Path(source) / "new").exists():
            raise OSError(errno.EIO, "I/O error", str(target))
        real(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(StorageError), atomic_directory(out, force=True) as folder:
        (folder / "new").touch()
    assert names(out) == ["old"]
    assert names(tmp_path) == ["model.flux"]


def test_the_working_directory_is_never_replaced(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for target in (tmp_path, tmp_path / "here", Path(".")):
        with pytest.raises(OutputExistsError), atomic_directory(target, force=True):
            pytest.fail("the body must not run")


def test_a_file_and_a_directory_do_not_replace_each_other(tmp_path):
    (tmp_path / "dir").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(OutputExistsError), atomic_file(tmp_path / "dir", force=True):
        pytest.fail("the body must not run")
    with pytest.raises(OutputExistsError), atomic_directory(tmp_path / "file", force=True):
        pytest.fail("the body must not run")


def test_full_disk(tmp_path, tiny_disk):
    with (
        pytest.raises(StorageError, match=r"cannot write .*out\.bin: File too large"),
        atomic_file(tmp_path / "out.bin") as draft,
    ):
        draft.write_bytes(bytes(10000))
    with (
        pytest.raises(StorageError, match=r"cannot write .*model\.flux"),
        atomic_directory(tmp_path / "model.flux") as folder,
    ):
        (folder / "weights").write_bytes(bytes(10000))
    assert names(tmp_path) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_refusals_of_the_disk_are_storage_errors(tmp_path, code):
    with pytest.raises(StorageError, match=os.strerror(code)) as caught, atomic_file(tmp_path / "out"):
        raise OSError(code, os.strerror(code))
    assert caught.value.exit_code == 2
    assert names(tmp_path) == []


def test_missing_parent(tmp_path):
    for context in (atomic_file, atomic_directory):
        with pytest.raises(StorageError, match="create the directory"), context(tmp_path / "no" / "out"):
            pytest.fail("the body must not run")


def test_errors_about_other_files_pass_through(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_file(tmp_path / "out"):
        (tmp_path / "source").read_bytes()
    with pytest.raises(PermissionError), atomic_directory(tmp_path / "out"):
        raise PermissionError(errno.EACCES, "denied", "/elsewhere/source")
