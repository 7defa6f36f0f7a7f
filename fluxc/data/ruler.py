"""Further retrieval tasks, asked in evaluation alone: several values, several keys, common words, documents.

Calibration does not use them, so they also show how routing fares on kinds of questions it was not fitted to. The
tasks follow the categories of RULER (arXiv 2404.06654); the texts, wordings and numbers are fluxc's own.
"""

from __future__ import annotations

import random

from fluxc.data import wordings
from fluxc.data.draft import Draft, Fact
from fluxc.data.words import COMPANIES, FIRST_NAMES, NOUNS, PLACES, half, number, word_pairs

VALUES = 3
COMMON = (8, 5)
"""How often the two words occur that are asked for; all others occur once."""
RARE = 8
LISTS = 5
JOBS = ("baker", "carpenter", "doctor", "farmer", "lawyer", "painter", "pilot", "singer", "teacher", "tailor")


def multi_value(rng: random.Random, split: str) -> Draft:
    """Several 7-digit numbers under one word pair, all asked, in the order of the text."""
    key, *others = word_pairs(rng, split, 2)
    values = [number(rng) for _ in range(VALUES)]
    facts = [_needed(f"One of the hidden numbers of the {key} is {value}.") for value in values]
    noise = Fact(f"One of the hidden numbers of the {others[0]} is {number(rng)}.")
    facts.insert(rng.randint(0, len(facts)), noise)
    return Draft(
        intro=wordings.intro(rng, split),
        facts=tuple(facts),
        question=wordings.ask(rng, split, f"What are all hidden numbers of the {key}, in the order of the text?"),
        prefix=f"All hidden numbers of the {key} are",
        answer=" " + ", ".join(values),
    )


def multi_query(rng: random.Random, split: str) -> Draft:
    """7-digit numbers under four word pairs, two of them asked."""
    pairs = [(key, number(rng)) for key in word_pairs(rng, split, 4)]
    asked = rng.sample(pairs, 2)
    facts = [Fact(text, text if pair in asked else "") for pair in pairs if (text := _hidden(*pair))]
    first, second = (key for key, _ in asked)
    return Draft(
        intro=wordings.intro(rng, split),
        facts=tuple(facts),
        question=wordings.ask(rng, split, f"What are the hidden numbers of the {first} and of the {second}?"),
        prefix=f"The hidden numbers of the {first} and of the {second} are",
        answer=" {} and {}".format(*(value for _, value in asked)),
    )


def common_words(rng: random.Random, split: str) -> Draft:
    """Word lists all over the text; the two words that occur most often are asked, the most common one first."""
    first, second, *rest = rng.sample(half(NOUNS, split), 2 + RARE)
    words = [first] * COMMON[0] + [second] * COMMON[1] + rest
    rng.shuffle(words)
    lists = [", ".join(words[at::LISTS]) for at in range(LISTS)]
    return Draft(
        intro=wordings.intro(rng, split),
        facts=tuple(_needed(f"Word list: {part}.") for part in lists),
        question=wordings.ask(rng, split, "Which two words are the most common ones in the word lists?"),
        prefix="The two most common words in the word lists are",
        answer=f" {first} and {second}",
    )


def questions(rng: random.Random, split: str) -> Draft:
    """Short documents about four persons, of the same form; one thing about one person is asked."""
    names = rng.sample(half(FIRST_NAMES, split), 4)
    cities = rng.sample(half(PLACES, split), 4)
    jobs, places = rng.sample(JOBS, 4), rng.sample(half(COMPANIES, split), 4)
    asked = rng.randrange(4)
    facts = [
        Fact(text, text if index == asked else "")
        for index, four in enumerate(zip(names, cities, jobs, places, strict=True))
        if (text := "{0} was born in {1}. {0} is a {2} and works at the {3}.".format(*four))
    ]
    name = names[asked]
    question, prefix, answer = rng.choice(
        (
            (f"Where was {name} born?", f"{name} was born in", f" {cities[asked]}"),
            (f"What is the profession of {name}?", f"{name} is a", f" {jobs[asked]}"),
            (f"Where does {name} work?", f"{name} works at the", f" {places[asked]}"),
        )
    )
    return Draft(
        intro=wordings.intro(rng, split),
        facts=tuple(facts),
        question=wordings.ask(rng, split, question),
        prefix=prefix,
        answer=answer,
    )


def _hidden(key: str, value: str) -> str:
    return f"The hidden number of the {key} is {value}."


def _needed(text: str) -> Fact:
    return Fact(text, text)
