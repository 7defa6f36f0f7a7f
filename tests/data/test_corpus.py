"""The packaged corpus: size, licences, splits, and nothing in it that names a person's mailbox or a machine."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from fluxc.data import SPLITS, corpus

CLEAN = {
    "e-mail": re.compile(r"[\w.+-]+@[\w-]+\.[A-Za-z]{2,}"),
    "home or temporary folder": re.compile(r"/(?:home|root|tmp|opt|work|Users)/"),
    "web address": re.compile(r"https?://\w"),
}


def test_size_is_between_three_and_five_megabytes() -> None:
    size = sum(len(corpus.read(piece).encode()) for piece in corpus.pieces())
    assert 3_000_000 <= size <= 5_000_000


def test_prose_is_a_little_more_than_half() -> None:
    sizes = {kind: sum(len(corpus.read(piece)) for piece in corpus.pieces(kind)) for kind in ("prose", "code")}
    assert 0.5 <= sizes["prose"] / sum(sizes.values()) <= 0.6


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind", ["prose", "code"])
def test_each_split_has_two_sources_of_each_kind(kind: str, split: str) -> None:
    assert len({piece.source for piece in corpus.pieces(kind, split)}) >= 2


def test_every_piece_is_long() -> None:
    assert min(len(corpus.read(piece)) for piece in corpus.pieces()) >= 32_000


def test_index_names_exactly_the_files() -> None:
    files = {str(path.relative_to(corpus.FOLDER)) for split in SPLITS for path in (corpus.FOLDER / split).iterdir()}
    assert files == {piece.file for piece in corpus.pieces()}


def test_splits_share_no_source_and_no_paragraph() -> None:
    sources, paragraphs = [], []
    for split in SPLITS:
        texts = [corpus.read(piece) for piece in corpus.pieces(split=split)]
        sources.append({piece.source for piece in corpus.pieces(split=split)})
        paragraphs.append({part for text in texts for part in text.split("\n\n") if len(part) > 300})
    assert not sources[0] & sources[1]
    assert not paragraphs[0] & paragraphs[1]


def test_every_source_has_its_licence() -> None:
    table = (corpus.FOLDER / "LICENSES.md").read_text()
    rows = {line.split("|")[1].strip(): line for line in table.splitlines() if line.startswith("| ")}
    for source in {piece.source for piece in corpus.pieces()}:
        named = re.search(r"`(licenses/[\w-]+\.txt)`", rows[source])
        assert named, source
        assert "opyright" in (corpus.FOLDER / named.group(1)).read_text()
        assert f"**{source}**: `" in table


@pytest.mark.parametrize("what", CLEAN)
def test_texts_hold_no(what: str) -> None:
    found = [(piece.file, CLEAN[what].search(corpus.read(piece))) for piece in corpus.pieces()]
    assert [(file, match.group()) for file, match in found if match] == []


def test_hash_is_stable_and_sees_every_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert corpus.hash() == corpus.hash()
    piece = {"file": "heldout/a.txt", "kind": "prose", "source": "a", "split": "heldout"}
    (tmp_path / "heldout").mkdir()
    (tmp_path / "index.json").write_text(json.dumps({"version": 1, "pieces": [piece]}))
    (tmp_path / "heldout/a.txt").write_text("one")
    monkeypatch.setattr(corpus, "FOLDER", tmp_path)
    before = corpus.hash()
    (tmp_path / "heldout/a.txt").write_text("two")
    assert corpus.hash() != before
