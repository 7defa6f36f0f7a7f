"""Reading the zip of a saved program with Python's own code, before torch sees any of it."""

from __future__ import annotations

import dataclasses
import os
import struct
import zipfile
from pathlib import Path

from fluxc.errors import ArchiveError

_MAX_MEMBERS = 100_000
_MAX_TEXT_BYTES = 512 * 1024 * 1024
_LOCAL_HEADER = 30
_CHUNK = 1 << 20
_SAVE_AGAIN = "save the program with torch.export.save, or give the model's Hugging Face directory"


@dataclasses.dataclass(frozen=True)
class Member:
    """One file of the archive: bytes [offset, offset + size) of the zip, never compressed."""

    offset: int
    size: int


@dataclasses.dataclass(frozen=True)
class Archive:
    """The members of a `torch.export` archive by path below its root folder; checksums are already verified."""

    path: Path
    members: dict[str, Member]

    def read(self, name: str) -> bytes:
        """The bytes of the text member `name`; raises ArchiveError if it is missing or absurdly large."""
        if name not in self.members:
            raise ArchiveError(f"{self.path} is damaged: it holds no {name}", hint=_SAVE_AGAIN)
        member = self.members[name]
        if member.size > _MAX_TEXT_BYTES:
            raise ArchiveError(f"{self.path}: {name} is {member.size} bytes long", hint=_SAVE_AGAIN)
        with open(self.path, "rb") as file:
            file.seek(member.offset)
            return file.read(member.size)


def open_archive(path: str | os.PathLike[str]) -> Archive:
    """Check the zip at `path` and list its members.

    Raises ArchiveError for anything that is not a whole `torch.export` archive: other files, pickles, TorchScript,
    AOTInductor packages, damaged or compressed zips, members outside the root folder, duplicates.
    """
    file = Path(path)
    _check_magic(file)
    try:
        with zipfile.ZipFile(file) as archive:
            infos = archive.infolist()
            _check_zip(file, infos)
            root = infos[0].filename.split("/")[0] + "/"
            members = {info.filename.removeprefix(root): _locate(file, archive, info) for info in infos}
    except ArchiveError:
        raise
    except Exception as error:  # zipfile raises many types on damaged files
        raise ArchiveError(f"{file} is truncated or damaged ({error})", hint="copy or save it again") from error
    found = Archive(file, members)
    if found.read("archive_format") != b"pt2":
        raise ArchiveError(f"{file} is not in the format of torch.export.save", hint=_SAVE_AGAIN)
    return found


def _check_magic(path: Path) -> None:
    if path.is_dir():
        raise ArchiveError(f"{path} is a directory, not a saved program", hint=_SAVE_AGAIN)
    try:
        with open(path, "rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise ArchiveError(f"cannot read {path}: {error.strerror}", hint="check the path") from error
    if not magic:
        raise ArchiveError(f"{path} is empty", hint=_SAVE_AGAIN)
    if magic[:1] == b"\x80":
        raise ArchiveError(f"{path} is a pickle; reading one would run whatever code it holds", hint=_SAVE_AGAIN)
    if magic != b"PK\x03\x04":
        raise ArchiveError(f"{path} is not a saved program", hint=_SAVE_AGAIN)


def _check_zip(path: Path, infos: list[zipfile.ZipInfo]) -> None:
    names = [info.filename for info in infos]
    if not infos or len(infos) > _MAX_MEMBERS or len(set(names)) != len(names):
        raise ArchiveError(f"{path} has no members, too many, or two of one name", hint=_SAVE_AGAIN)
    # Sample inputs are zips of their own: a file cut behind one ends like a whole zip that starts later.
    if min(info.header_offset for info in infos) != 0:
        raise ArchiveError(f"{path} is truncated or damaged", hint="copy or save it again")
    _check_kind(path, names)
    roots = {name.split("/")[0] for name in names}
    if len(roots) != 1 or any(not _is_plain(name) for name in names):
        raise ArchiveError(f"{path} has members outside one root folder", hint=_SAVE_AGAIN)
    if any(info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 for info in infos):
        raise ArchiveError(f"{path} has compressed or encrypted members, which torch never writes", hint=_SAVE_AGAIN)
    if sum(info.file_size for info in infos) > path.stat().st_size:
        raise ArchiveError(f"{path} claims more bytes than it has", hint=_SAVE_AGAIN)


def _is_plain(name: str) -> bool:
    parts = name.split("/")
    return len(parts) > 1 and "\\" not in name and name.isprintable() and not {"", ".", ".."} & set(parts)


def _check_kind(path: Path, names: list[str]) -> None:
    """Tell other kinds of zip by the members they always have."""
    root = names[0].split("/")[0]
    if "serialized_exported_program.json" in names:
        raise ArchiveError(f"{path} has the format of torch < 2.8, which stores pickles", hint=_SAVE_AGAIN)
    for member, kind in _OTHER_KINDS.items():
        if f"{root}/{member}" in names:
            raise ArchiveError(f"{path} is {kind}; reading one would run whatever code it holds", hint=_SAVE_AGAIN)
    if any(name.startswith(f"{root}/data/aotinductor/") for name in names):
        raise ArchiveError(f"{path} is an AOTInductor package (native code), not a graph", hint=_SAVE_AGAIN)
    if f"{root}/archive_format" not in names:
        raise ArchiveError(
            f"{path} is a zip, but not one that torch.export.save of torch >= 2.8 wrote", hint=_SAVE_AGAIN
        )


_OTHER_KINDS = {
    "constants.pkl": "a TorchScript archive",
    "data.pkl": "a pickle (a zip file of torch.save)",
}


def _locate(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Member:
    """Read the member once, which verifies its checksum, and say where its bytes lie."""
    with archive.open(info) as stream:
        while stream.read(_CHUNK):
            pass
    with open(path, "rb") as file:
        file.seek(info.header_offset)
        name_length, extra_length = struct.unpack("<HH", file.read(_LOCAL_HEADER)[26:30])
    return Member(info.header_offset + _LOCAL_HEADER + name_length + extra_length, info.file_size)
