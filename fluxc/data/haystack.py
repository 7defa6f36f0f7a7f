"""Stretches of corpus text with a wanted number of tokens."""

from __future__ import annotations

import random
import re
from typing import Any, NamedTuple, Protocol

from fluxc.data import corpus
from fluxc.data.corpus import Piece
from fluxc.data.tokenizing import encode
from fluxc.errors import DataError

PARAGRAPH = re.compile(r"\n\n+(?=\S)")
CHARACTERS = 5
"""More characters than a token usually has."""
BREAKS = (PARAGRAPH, re.compile(r"(?<=[.!?;:])\s+(?=\S)"), re.compile(r"\s+(?=\S)"))
"""Places where a sentence may be put into a text, best first."""


class Texts(Protocol):
    """Where texts come from: the module `fluxc.data.corpus`, or a folder of the user's (see there for each)."""

    def pieces(self, kind: str | None = None, split: str | None = None) -> tuple[Piece, ...]:
        """The pieces of one kind and one split."""

    def read(self, piece: Piece) -> str:
        """The text of a piece."""

    def size(self, piece: Piece) -> int:
        """Bytes of a piece."""

    def hash(self) -> str:
        """SHA-256 over all of it."""


class Hay(NamedTuple):
    """A stretch of corpus text and the character at which each of its tokens starts."""

    text: str
    starts: list[int]


def take(
    rng: random.Random,
    tokenizer: Any,
    split: str,
    kind: str,
    tokens: int,
    *,
    one_source: bool = False,
    texts: Texts = corpus,
) -> Hay:
    """About `tokens` tokens of text that start at a paragraph of a random piece and run on into other pieces.

    With `one_source` all of it comes from one source. Raises DataError when the corpus is too small.
    """
    wanted = CHARACTERS * tokens
    found = _order(rng, split, kind, one_source, texts)
    if not found:
        raise DataError(f"the corpus holds no {kind}", hint="leave out what needs it, or add such files")
    # No token is shorter than a byte: what cannot fit is refused before anything is tokenized.
    if sum(map(texts.size, found)) < tokens:
        raise _too_small(kind, tokens)
    first, *others = found
    text = _from_paragraph(rng, texts.read(first), wanted)
    while True:
        # Only as much as is likely to do: tokenizing whole pieces would take most of the time.
        starts = encode(text[:wanted], tokenizer).starts
        if len(starts) > tokens:
            text = text[: starts[tokens]].rstrip()
            return Hay(text, starts[:tokens])
        if len(text) < wanted and not others:
            raise _too_small(kind, tokens)
        text += "\n\n" + texts.read(others.pop(0)) if others else ""
        wanted *= 2


def _too_small(kind: str, tokens: int) -> DataError:
    return DataError(f"the {kind} of the corpus is shorter than {tokens} tokens", hint="ask for shorter prompts")


def _order(rng: random.Random, split: str, kind: str, one_source: bool, texts: Texts) -> list[Piece]:
    found = list(texts.pieces(kind, split))
    if not found:
        return []
    # Sources differ in size; drawing the source first keeps a big one from filling every haystack.
    source = rng.choice(sorted({piece.source for piece in found}))
    rng.shuffle(found)
    ours = [piece for piece in found if piece.source == source]
    return ours if one_source else [ours[0], *(piece for piece in found if piece is not ours[0])]


def _from_paragraph(rng: random.Random, text: str, wanted: int) -> str:
    """The text from a random paragraph on, early enough for `wanted` characters to follow where it can be."""
    last = max(len(text) - wanted, 0)
    return text[rng.choice([0, *(m.end() for m in PARAGRAPH.finditer(text) if m.end() <= last)]) :]


def breaks(text: str, low: int, high: int, wanted: int) -> list[int]:
    """Characters in [low, high] where a sentence may be put in: the best kind of break that has `wanted` of them."""
    for pattern in BREAKS:
        found = [match.end() for match in pattern.finditer(text) if low <= match.end() <= high]
        if len(found) >= wanted:
            return found
    return []
