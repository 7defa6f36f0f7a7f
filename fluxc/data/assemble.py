"""Puts a draft into a haystack: where the facts go, and what is written around them."""

from __future__ import annotations

import random

from fluxc.data.draft import Draft, Fact
from fluxc.data.haystack import breaks
from fluxc.data.prompt import Prompt, Span


def assemble(rng: random.Random, task: str, draft: Draft, hay: str, within: Span) -> Prompt | None:
    """The complete prompt, or None when the haystack has too few places for the facts within these characters."""
    places = breaks(hay, *within, len(draft.facts))
    if len(places) < len(draft.facts):
        return None
    chosen = sorted(rng.sample(places, len(draft.facts)))
    body, spans = _insert(hay, chosen, draft.facts, len(draft.intro))
    start = len(draft.intro) + len(body) + 2
    text = f"{draft.intro}{body}\n\n{draft.question}"
    if draft.needed:
        spans = (_find(draft.question, draft.needed, start),)
    return Prompt(
        task=task, text=text, answer=draft.answer, chat=draft.chat, prefix=draft.prefix, facts=spans, question=start
    )


def _insert(hay: str, places: list[int], facts: tuple[Fact, ...], shift: int) -> tuple[str, tuple[Span, ...]]:
    """The haystack with each fact at its place, and the spans of what is needed, moved by `shift`."""
    parts, spans, done, length = [], [], 0, shift
    for place, fact in zip(places, facts, strict=True):
        before = hay[done:place]
        # A fact gets the white space of its place on both sides: a paragraph of its own between paragraphs.
        gap = before[len(before.rstrip()) :]
        if fact.needed:
            spans.append(_find(fact.text, fact.needed, length + len(before)))
        parts += [before, fact.text, gap]
        length += len(before) + len(fact.text) + len(gap)
        done = place
    return "".join(parts) + hay[done:], tuple(spans)


def _find(text: str, part: str, shift: int) -> Span:
    at = text.index(part) + shift
    return at, at + len(part)
