"""Tasks whose answer has to be worked out: from numbers far away, and by steps that the question itself shows."""

from __future__ import annotations

import random

from fluxc.data import wordings
from fluxc.data.draft import Draft, Fact
from fluxc.data.words import word_pairs

EXAMPLES = 5


def far_sum(rng: random.Random, split: str) -> Draft:
    """Two amounts that stand apart in a long text; their sum is asked, beside an amount that has no part in it."""
    keys = word_pairs(rng, split, 3)
    amounts = [rng.randint(11, 49) for _ in keys]
    facts = [
        Fact(text, text if index < 2 else "")
        for index, (key, amount) in enumerate(zip(keys, amounts, strict=True))
        if (text := f"The {key} holds {amount} coins.")
    ]
    rng.shuffle(facts)
    a, b = amounts[:2]
    return Draft(
        intro=wordings.intro(rng, split),
        facts=tuple(facts),
        question=wordings.ask(rng, split, f"How many coins do the {keys[0]} and the {keys[1]} hold together?"),
        prefix="Together they hold",
        answer=f" {a} + {b} = {a + b}",
    )


def steps(rng: random.Random, split: str) -> Draft:
    """Worked examples of sums in two steps right before the query; the steps and the result are scored."""
    *solved, query = [_sum(rng) for _ in range(EXAMPLES + 1)]
    needed = "\n".join(_asked(*numbers) + _worked(*numbers) for numbers in solved)
    return Draft(
        intro=wordings.intro(rng, split),
        question=f"{rng.choice(wordings.LEADS[split])}\n{needed}",
        prefix=_asked(*query),
        chat=False,
        answer=_worked(*query),
        needed=needed,
    )


def _sum(rng: random.Random) -> tuple[int, int, int]:
    return rng.randint(5, 9), rng.randint(1, 9), rng.randint(1, 5)


def _asked(start: int, more: int, less: int) -> str:
    return f"Start with {start}, add {more}, take away {less}:"


def _worked(start: int, more: int, less: int) -> str:
    return f" {start} + {more} = {start + more}, {start + more} - {less} = {start + more - less}"
