"""Retrieval tasks: the answer stands far from the question."""

from __future__ import annotations

import random

from fluxc.data import wordings
from fluxc.data.draft import Draft, Fact
from fluxc.data.wordings import Wording
from fluxc.data.words import COMPANIES, FIRST_NAMES, PLACES, half, number, word_pairs


def needle(rng: random.Random, split: str) -> Draft:
    """One 7-digit number under a word pair."""
    return _numbers(rng, split, keys=1)


def multi_needle(rng: random.Random, split: str) -> Draft:
    """Several 7-digit numbers under different word pairs, one asked."""
    return _numbers(rng, split, keys=rng.randint(2, 4))


def _numbers(rng: random.Random, split: str, keys: int) -> Draft:
    wording = rng.choice(wordings.NUMBERS[split])
    pairs = [(key, number(rng)) for key in word_pairs(rng, split, keys)]
    asked = rng.choice(pairs)
    facts = tuple(_fact(wording, pair, needed=pair == asked) for pair in pairs)
    return _asking(rng, split, wording, facts, *asked)


def kv(rng: random.Random, split: str) -> Draft:
    """A list of keys and 7-digit values in one block, one key asked."""
    wording = rng.choice(wordings.KEY_VALUES[split])
    pairs = [("_".join(key.split()), number(rng)) for key in word_pairs(rng, split, rng.randint(3, 6))]
    asked = rng.choice(pairs)
    lines = [_fact(wording, pair, needed=False).text for pair in pairs]
    block = wording.open + "\n".join(lines) + wording.close
    return _asking(rng, split, wording, (Fact(block, needed=lines[pairs.index(asked)]),), *asked)


def variable_tracking(rng: random.Random, split: str) -> Draft:
    """A variable whose 7-digit value is that of another one, beside a variable that has nothing to do with them."""
    wording = rng.choice(wordings.VARIABLES[split])
    source, asked, other = (pair.split()[1] for pair in word_pairs(rng, split, 3))
    value = number(rng)
    link = wording.link.format(key=asked, other=source)
    chain = [_fact(wording, (source, value), needed=True), Fact(link, needed=link)]
    chain.insert(rng.randint(0, len(chain)), _fact(wording, (other, number(rng)), needed=False))
    return _asking(rng, split, wording, tuple(chain), asked, value)


def multi_hop(rng: random.Random, split: str) -> Draft:
    """Two persons, the places they belong to and the cities of those; the city of one person is asked."""
    wording = rng.choice(wordings.HOPS[split])
    names, cities = rng.sample(half(FIRST_NAMES, split), 2), rng.sample(half(PLACES, split), 2)
    places = [f"{pair.split()[1]} {rng.choice(COMPANIES)}".title() for pair in word_pairs(rng, split, 2)]
    facts = []
    for name, place, city in zip(names, places, cities, strict=True):
        pair = (wording.first.format(name=name, place=place), wording.second.format(place=place, city=city))
        facts += [Fact(text, needed=text if name == names[0] else "") for text in pair]
    rng.shuffle(facts)
    return Draft(
        intro=wordings.intro(rng, split),
        facts=tuple(facts),
        question=wordings.ask(rng, split, wording.question.format(name=names[0])),
        prefix=wording.prefix.format(name=names[0]),
        answer=wording.answer.format(place=places[0], city=cities[0]),
    )


def _fact(wording: Wording, pair: tuple[str, str], needed: bool) -> Fact:
    text = wording.fact.format(key=pair[0], value=pair[1])
    return Fact(text, needed=text if needed else "")


def _asking(rng: random.Random, split: str, wording: Wording, facts: tuple[Fact, ...], key: str, value: str) -> Draft:
    return Draft(
        intro=wordings.intro(rng, split),
        facts=facts,
        question=wordings.ask(rng, split, wording.question.format(key=key)),
        prefix=wording.prefix.format(key=key),
        answer=wording.answer.format(value=value),
    )
