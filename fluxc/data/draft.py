"""What a task asks for, before a haystack is put around it."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Fact:
    """A sentence or block to be put into the haystack. `needed` is the part the answer depends on, if any."""

    text: str
    needed: str = ""


@dataclasses.dataclass(frozen=True)
class Draft:
    """One task instance without its haystack: `intro`, haystack holding `facts`, `question`, then prefix and answer."""

    question: str
    prefix: str
    answer: str
    intro: str = ""
    facts: tuple[Fact, ...] = ()
    """In the order in which they must appear."""
    chat: bool = True
    """Whether a user would send it as a message; else it is a text to be continued."""
    needed: str = ""
    """For local tasks: the part of the question that holds the answer."""


Maker = Callable[[random.Random, str], Draft]
"""Draws a task instance for a split; equal generator states give equal drafts."""
