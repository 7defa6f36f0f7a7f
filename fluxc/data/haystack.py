"""Stretches of corpus text with a wanted number of tokens."""

from __future__ import annotations

import random
import re
from typing import Any, NamedTuple

from fluxc.data import corpus
from fluxc.data.corpus import Piece
from fluxc.data.tokenizing import encode
from fluxc.errors import DataError

PARAGRAPH = re.compile(r"\n\n+(?=\S)")
BREAKS = (PARAGRAPH, re.compile(r"(?<=[.!?;:])\s+(?=\S)"), re.compile(r"\s+(?=\S)"))
"""Places where a sentence may be put into a text, best first."""


class _Cut(NamedTuple):
    text: str
    starts: list[int]
    """Character at which each token starts."""
    paragraphs: list[int]
    """Tokens that start a paragraph."""


class Haystacks:
    """The texts of one split, tokenized piece by piece when first needed and kept for the next prompt."""

    def __init__(self, tokenizer: Any, split: str) -> None:
        self._tokenizer = tokenizer
        self._split = split
        self._cuts: dict[str, _Cut] = {}

    def take(self, rng: random.Random, kind: str, tokens: int, *, one_source: bool = False) -> str:
        """About `tokens` tokens of text that start at a paragraph of a random piece and run on into other pieces.

        With `one_source` all of it comes from one source. Raises DataError when the corpus is too small.
        """
        text, first = [], True
        for piece in self._order(rng, kind, one_source):
            cut = self._cut(piece)
            start = _start(rng, cut, tokens) if first else 0
            text.append(_slice(cut, start, tokens))
            tokens, first = tokens - (len(cut.starts) - start), False
            if tokens <= 0:
                return "\n\n".join(text).strip()
        raise DataError(
            f"the packaged corpus is {tokens} tokens short of a {kind} prompt", hint="ask for shorter prompts"
        )

    def _order(self, rng: random.Random, kind: str, one_source: bool) -> list[Piece]:
        found = list(corpus.pieces(kind, self._split))
        # Sources differ much in size; drawing the source first keeps a big one from filling every haystack.
        source = rng.choice(sorted({piece.source for piece in found}))
        rng.shuffle(found)
        ours = [piece for piece in found if piece.source == source]
        return ours if one_source else ours[:1] + [piece for piece in found if piece is not ours[0]]

    def _cut(self, piece: Piece) -> _Cut:
        if piece.file not in self._cuts:
            self._cuts[piece.file] = _tokenized(corpus.read(piece), self._tokenizer)
        return self._cuts[piece.file]


def breaks(text: str, low: int, high: int, wanted: int) -> list[int]:
    """Characters in [low, high] where a sentence may be put in: the best kind of break that has `wanted` of them."""
    for pattern in BREAKS:
        found = [match.end() for match in pattern.finditer(text) if low <= match.end() <= high]
        if len(found) >= wanted:
            return found
    return []


def _tokenized(text: str, tokenizer: Any) -> _Cut:
    encoding = encode(text, tokenizer)
    paragraphs = {encoding.token_at(match.end()) for match in PARAGRAPH.finditer(text)}
    return _Cut(text, encoding.starts, sorted({0} | paragraphs))


def _start(rng: random.Random, cut: _Cut, tokens: int) -> int:
    """A paragraph's first token, early enough for the piece to hold all the tokens where it can."""
    last = max(len(cut.starts) - tokens, 0)
    return rng.choice([token for token in cut.paragraphs if token <= last])


def _slice(cut: _Cut, start: int, tokens: int) -> str:
    end = start + tokens
    return cut.text[cut.starts[start] : cut.starts[end] if end < len(cut.starts) else None]
