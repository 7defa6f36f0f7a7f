"""The word puzzles of the few-shot task; each split has its own."""

from __future__ import annotations

from typing import NamedTuple

from fluxc.data.prompt import CALIBRATION, HELDOUT


class Shots(NamedTuple):
    """A word puzzle: solved pairs, written one a line."""

    line: str
    pairs: tuple[tuple[str, str], ...]
    examples: int = 6


def _pairs(text: str) -> tuple[tuple[str, str], ...]:
    return tuple((left, right) for left, right in (item.split() for item in text.split(",")))


CAPITALS = _pairs("""
France Paris, Italy Rome, Spain Madrid, Germany Berlin, Japan Tokyo, China Beijing, Egypt Cairo, Greece Athens,
Austria Vienna, Portugal Lisbon, Ireland Dublin, Norway Oslo, Sweden Stockholm, Russia Moscow, Poland Warsaw, Cuba
Havana, Peru Lima, Thailand Bangkok, Hungary Budapest, Finland Helsinki, Denmark Copenhagen, England London, Belgium
Brussels, Kenya Nairobi
""")

KINDS = _pairs("""
dog animal, red color, apple fruit, cat animal, blue color, banana fruit, horse animal, green color, orange fruit,
cow animal, yellow color, grape fruit, lion animal, purple color, pear fruit, tiger animal, black color, peach
fruit, sheep animal, white color, cherry fruit, wolf animal, pink color, lemon fruit, rabbit animal, brown color,
mango fruit, bear animal, gray color, plum fruit
""")

OPPOSITES = _pairs("""
hot cold, big small, up down, day night, happy sad, fast slow, open closed, black white, good bad, rich poor, wet
dry, hard soft, old new, light dark, high low, left right, true false, full empty, strong weak, early late, first
last, inside outside, love hate, win lose
""")

PLURALS = _pairs("""
cat cats, house houses, tree trees, child children, book books, man men, box boxes, city cities, car cars, woman
women, bird birds, dog dogs, bus buses, baby babies, hand hands, foot feet, river rivers, tooth teeth, friend
friends, letter letters, road roads, dish dishes, song songs, game games
""")

FEW_SHOT = {
    CALIBRATION: (Shots("{word} -> {answer}", KINDS), Shots("The capital of {word} is {answer}", CAPITALS)),
    HELDOUT: (Shots("{word} => {answer}", OPPOSITES), Shots("one {word}, two {answer}", PLURALS)),
}
