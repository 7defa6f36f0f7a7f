"""The packaged corpus: prose and code for haystacks and perplexity, split by source.

No source stands in both splits, so a held-out prompt shares no document with a calibration prompt.
`corpus/LICENSES.md` lists where each source comes from and under which licence.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

FOLDER = Path(__file__).parent / "corpus"
INDEX = "index.json"


@dataclasses.dataclass(frozen=True)
class Piece:
    """One long text of the corpus. `file` is relative to the corpus folder and unique."""

    file: str
    kind: str
    source: str
    split: str


def pieces(kind: str | None = None, split: str | None = None) -> tuple[Piece, ...]:
    """All pieces in index order, or those of one kind (prose, code) and one split (calibration, heldout)."""
    return tuple(p for p in _index() if kind in (None, p.kind) and split in (None, p.split))


def read(piece: Piece) -> str:
    """The text of a piece; its lines end in a bare newline on every system."""
    return (FOLDER / piece.file).read_bytes().decode()


def size(piece: Piece) -> int:
    """Bytes of a piece, without reading it."""
    return (FOLDER / piece.file).stat().st_size


def hash() -> str:
    """Hexadecimal SHA-256 over the index and all pieces; every result that used the corpus records it."""
    digest = hashlib.sha256()
    for name in (INDEX, *sorted(piece.file for piece in _index())):
        content = (FOLDER / name).read_bytes()
        digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _index() -> tuple[Piece, ...]:
    return tuple(Piece(**entry) for entry in json.loads((FOLDER / INDEX).read_text())["pieces"])
