"""Texts of the user's own in place of the packaged corpus: every text file of a folder."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

from fluxc.data.corpus import Piece
from fluxc.data.prompt import HELDOUT
from fluxc.errors import DataError

PROSE = (".txt", ".md", ".rst", ".tex")
CODE = (".py", ".c", ".h", ".cc", ".cpp", ".rs", ".go", ".java", ".js", ".ts", ".sh")


class FolderTexts:
    """`*.txt`, `*.md`, ... of a folder are prose, source files are code; each file is a source of its own.

    All of it is held out: calibration only ever reads the packaged corpus. Raises DataError for a folder that is
    missing or holds no such file, and for a file that is no UTF-8.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise DataError(f"the corpus folder {folder} does not exist", hint="name a folder of text files")
        if not self._pieces:
            raise DataError(f"{folder} holds no text files", hint=f"these are read: {' '.join(PROSE + CODE)}")

    @functools.cached_property
    def _pieces(self) -> tuple[Piece, ...]:
        found = sorted(path for path in self.folder.rglob("*") if path.suffix in PROSE + CODE and path.is_file())
        names = [path.relative_to(self.folder).as_posix() for path in found]
        kinds = ["prose" if path.suffix in PROSE else "code" for path in found]
        return tuple(Piece(name, kind, name, HELDOUT) for name, kind in zip(names, kinds, strict=True))

    def pieces(self, kind: str | None = None, split: str | None = None) -> tuple[Piece, ...]:
        """All pieces in the order of their names, or those of one kind and one split."""
        return tuple(p for p in self._pieces if kind in (None, p.kind) and split in (None, p.split))

    def read(self, piece: Piece) -> str:
        """The text of a piece, its lines ended by a bare newline."""
        try:
            return (self.folder / piece.file).read_bytes().decode().replace("\r\n", "\n")
        except UnicodeDecodeError as error:
            raise DataError(f"{self.folder / piece.file} is not UTF-8 text", hint="leave it out") from error

    def size(self, piece: Piece) -> int:
        """Bytes of a piece."""
        return (self.folder / piece.file).stat().st_size

    def hash(self) -> str:
        """Hexadecimal SHA-256 over the names and contents of all pieces."""
        digest = hashlib.sha256()
        for piece in self._pieces:
            content = (self.folder / piece.file).read_bytes()
            digest.update(f"{piece.file} {len(content)}\n".encode() + content)
        return digest.hexdigest()
