"""Routes as one line: a character for each attention layer of the model, in graph order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

FULL = "█"
SPARSE = "·"
WINDOWED = "w"
"""A layer with a window of its own: it has no route."""

COLOURS = {FULL: "bold cyan", SPARSE: "yellow", WINDOWED: "dim"}
GROUP = 10
"""Layers between two gaps of the strip, so that an index can be read off."""


def strip(routes: Mapping[int, bool], layers: Sequence[int]) -> str:
    """The strip of a model's attention `layers`; those without an entry in `routes` have a window of their own."""
    signs = [WINDOWED if layer not in routes else FULL if routes[layer] else SPARSE for layer in layers]
    groups = ["".join(signs[at : at + GROUP]) for at in range(0, len(signs), GROUP)]
    return " ".join(groups)


def coloured(line: str) -> str:
    """The strip in rich markup."""
    return "".join(f"[{COLOURS[sign]}]{sign}[/]" if sign in COLOURS else sign for sign in line)


def legend(line: str) -> str:
    """What the signs in the strip mean, in words; only those that occur."""
    meaning = {FULL: "full", SPARSE: "sparse", WINDOWED: "own window"}
    return ", ".join(f"{coloured(sign)} {text}" for sign, text in meaning.items() if sign in line)
