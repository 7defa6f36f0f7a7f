"""Local tasks: everything the answer needs stands in the question itself, after a long irrelevant text."""

from __future__ import annotations

import random

from fluxc.data import wordings
from fluxc.data.draft import Draft
from fluxc.data.shots import FEW_SHOT
from fluxc.data.wordings import LEADS, LOCAL_NUMBERS
from fluxc.data.words import number, word_pairs


def local(rng: random.Random, split: str) -> Draft:
    """A question that states its own facts: two numbers, one asked."""
    wording = rng.choice(LOCAL_NUMBERS[split])
    pairs = [(key, number(rng)) for key in word_pairs(rng, split, 2)]
    key, value = rng.choice(pairs)
    facts = [wording.fact.format(key=k, value=v) for k, v in pairs]
    needed = " ".join(facts)
    return Draft(
        intro=wordings.intro(rng, split),
        question=f"{rng.choice(LEADS[split])} {needed} {wording.question.format(key=key)}",
        prefix=wording.prefix.format(key=key),
        answer=wording.answer.format(value=value),
        needed=needed,
    )


def few_shot(rng: random.Random, split: str) -> Draft:
    """Solved examples of a word puzzle right before the query; the answer is one word or number."""
    shots = rng.choice(FEW_SHOT[split])
    *solved, (word, answer) = rng.sample(shots.pairs, shots.examples + 1)
    needed = "\n".join(shots.line.format(word=a, answer=b) for a, b in solved)
    return Draft(
        intro=wordings.intro(rng, split),
        question=f"{rng.choice(LEADS[split])}\n{needed}",
        prefix=shots.line.format(word=word, answer="").rstrip(),
        chat=False,
        answer=f" {answer}",
        needed=needed,
    )
