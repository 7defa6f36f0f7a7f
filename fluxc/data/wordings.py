"""The sentences of the generated tasks. Each split has its own, so that a router cannot learn the exact words.

The answer's prefix repeats the words of the fact as far as the value: a small model then answers by copying.
"""

from __future__ import annotations

import random
from typing import NamedTuple

from fluxc.data.prompt import CALIBRATION, HELDOUT


class Wording(NamedTuple):
    """Format strings; the fields in braces are filled in by the task."""

    fact: str
    question: str
    prefix: str
    answer: str = " {value}"
    open: str = ""
    """Before a block of facts."""
    close: str = ""
    """After a block of facts."""
    link: str = ""
    """How one key gets its value from another."""


INTROS = {
    CALIBRATION: ("", "Read the following text.\n\n", "Here is a document. A question about it follows.\n\n"),
    HELDOUT: ("", "Read this text carefully.\n\n", "There is a question at the end of this text.\n\n"),
}

ASKS = {
    CALIBRATION: ("{question}", "Question: {question}", "Now answer this question. {question}"),
    HELDOUT: ("{question}", "Based on the text above: {question}", "A question about the text: {question}"),
}

NUMBERS = {
    CALIBRATION: (
        Wording(
            "The secret number of the {key} is {value}.",
            "What is the secret number of the {key}?",
            "The secret number of the {key} is",
        ),
        Wording(
            "The access code for the {key} is {value}.",
            "Which access code does the {key} have?",
            "The access code for the {key} is",
        ),
        Wording(
            "The special magic number for the {key} is {value}.",
            "What is the special magic number for the {key}?",
            "The special magic number for the {key} is",
        ),
    ),
    HELDOUT: (
        Wording(
            "The hidden number of the {key} is {value}.",
            "What is the hidden number of the {key}?",
            "The hidden number of the {key} is",
        ),
        Wording(
            "The serial number of the {key} is {value}.",
            "Which serial number does the {key} have?",
            "The serial number of the {key} is",
        ),
        Wording(
            "The private pass code for the {key} is {value}.",
            "What is the private pass code for the {key}?",
            "The private pass code for the {key} is",
        ),
    ),
}

KEY_VALUES = {
    CALIBRATION: (
        Wording('"{key}": {value},', 'What is the value of "{key}"?', '"{key}":', open="records = {\n", close="\n}"),
        Wording("{key}: {value}", "Which value is listed for {key}?", "{key}:", open="Table of values:\n"),
    ),
    HELDOUT: (
        Wording('"{key}": {value},', 'What value does "{key}" have?', '"{key}":', open="settings = {\n", close="\n}"),
        Wording("{key} = {value}", "Which value is given for {key}?", "{key} =", open="[values]\n"),
    ),
}

# These prefixes ask for a number: after the words of the link itself a small model would repeat the link.
VARIABLES = {
    CALIBRATION: (
        Wording(
            "VAR {key} = {value}",
            "What is the value of VAR {key}?",
            "As a number, the value of VAR {key} is",
            link="VAR {key} = VAR {other}",
        ),
        Wording(
            "The value of {key} is {value}.",
            "What is the value of {key}?",
            "As a number, the value of {key} is",
            link="The value of {key} is the value of {other}.",
        ),
    ),
    HELDOUT: (
        Wording(
            "LET {key} = {value}",
            "What is the value of {key}?",
            "As a number, the value of {key} is",
            link="LET {key} = {other}",
        ),
        Wording(
            "The amount of {key} is {value}.",
            "What is the amount of {key}?",
            "As a number, the amount of {key} is",
            link="The amount of {key} is the amount of {other}.",
        ),
    ),
}


class Hops(NamedTuple):
    """Two facts that must be joined to answer. The answer goes through both: the place, then its city."""

    first: str
    second: str
    question: str
    prefix: str
    answer: str


HOPS = {
    CALIBRATION: (
        Hops(
            "{name} works at the {place} in the city.",
            "You find the {place} in the city of {city}.",
            "In which city does {name} work?",
            "{name} works at the",
            " {place} in the city of {city}",
        ),
        Hops(
            "{name} is the manager of the {place} in the town.",
            "There is the {place} in the town of {city}.",
            "In which town does {name} work as a manager?",
            "{name} is the manager of the",
            " {place} in the town of {city}",
        ),
    ),
    HELDOUT: (
        Hops(
            "{name} studies at the {place} in the city.",
            "People visit the {place} in the city of {city}.",
            "In which city does {name} study?",
            "{name} studies at the",
            " {place} in the city of {city}",
        ),
        Hops(
            "{name} is the owner of the {place} in the town.",
            "They built the {place} in the town of {city}.",
            "In which town is the place that {name} owns?",
            "{name} is the owner of the",
            " {place} in the town of {city}",
        ),
    ),
}

LEADS = {
    CALIBRATION: ("Forget the text above.", "The text above does not matter.", "Now something else."),
    HELDOUT: ("Ignore the text above.", "The text above is not needed.", "Here is a new topic."),
}

LOCAL_NUMBERS = {
    CALIBRATION: (
        Wording("The {key} costs {value} coins.", "How much does the {key} cost?", "The {key} costs"),
        Wording("The phone number of the {key} is {value}.", "What is its number?", "The phone number of the {key} is"),
    ),
    HELDOUT: (
        Wording("The {key} weighs {value} grams.", "How heavy is the {key}?", "The {key} weighs"),
        Wording("The order number of the {key} is {value}.", "What is it?", "The order number of the {key} is"),
    ),
}


def intro(rng: random.Random, split: str) -> str:
    """What stands before the haystack; may be empty."""
    return rng.choice(INTROS[split])


def ask(rng: random.Random, split: str, question: str) -> str:
    """The question with one of the phrases that lead to it."""
    return rng.choice(ASKS[split]).format(question=question)
