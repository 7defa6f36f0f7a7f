"""The suites: which tasks they ask, how they are scored, and which lengths fit a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fluxc.data import FAR, HELDOUT, LOCAL, REASONING, RETRIEVAL, TEXT, TokenizedPrompt, generate, minimum_length
from fluxc.data.haystack import Texts
from fluxc.errors import OptionError

EXACT = (
    "exact: every token of the answer is the likeliest one under teacher forcing, so greedy decoding writes exactly "
    "this answer; loss: mean negative log-likelihood of the answer's tokens, nats"
)
PERPLEXITY = "loss: mean negative log-likelihood of the last sixth of the text (1,000 tokens at most), nats"
GENERATED = (
    "512 greedy tokens after the prompt, ends of text ignored; agree: share of them before the first that differs from "
    "the dense answer; loss: mean negative log-likelihood that dense gives to the answer, nats; fresh: share of its "
    "4-grams that are new in it"
)


@dataclasses.dataclass(frozen=True)
class Suite:
    """Tasks that take turns, and the rule they are scored by. `shares`: default lengths, in sixteenths of the shortest
    valid prompt of a model. `generates`: answers are written by the engine, not teacher-forced."""

    tasks: tuple[str, ...]
    rule: str
    shares: tuple[int, ...] = (18, 28)
    generates: bool = False


SUITES = {
    "retrieval": Suite((*RETRIEVAL, *FAR), EXACT),
    "needle": Suite(("needle",), EXACT),
    "text": Suite(TEXT, PERPLEXITY),
    "local": Suite(LOCAL, EXACT),
    "reasoning": Suite(REASONING, EXACT),
    "long-answer": Suite(("prose",), GENERATED, shares=(18,), generates=True),
}
DEFAULT = ("retrieval", "text", "local")
USER = "user"
"""The suite of a JSONL file of the user."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What prompts are built for: a model's sink, window and context in tokens (0: not known)."""

    sink: int
    window: int
    context: int

    @property
    def shortest(self) -> int:
        """Tokens of the shortest valid prompt."""
        return minimum_length(self.sink, self.window)


def check_suites(names: Sequence[str]) -> None:
    """Raise OptionError, with the list, for a suite that is not known."""
    for name in names:
        if name not in SUITES:
            raise OptionError(f"there is no suite {name!r}", hint=f"the suites are {', '.join(SUITES)}")


def lengths_of(name: str, sizes: Sizes, asked: Sequence[int] = ()) -> tuple[int, ...]:
    """Prompt lengths of a suite in tokens: those asked for, else shares of the shortest valid one within the context.

    Raises OptionError, with the lengths that fit, where the context or sink and window leave no room.
    """
    shortest, room = sizes.shortest, sizes.context - (512 if SUITES[name].generates else 0)
    known = sizes.context > 0
    fits = f"{shortest} to {room} tokens" if known else f"at least {shortest} tokens"
    if known and room < shortest:
        raise OptionError(
            f"the suite {name} needs prompts of at least {shortest} tokens with sink {sizes.sink} and window "
            f"{sizes.window}, and a context of {sizes.context} has room for {max(room, 0)}",
            hint="no length fits; a plan with a smaller window does",
        )
    for length in asked:
        if length < shortest or (known and length > room):
            raise OptionError(
                f"the suite {name} cannot have prompts of {length} tokens with a context of {sizes.context}",
                hint=f"lengths that fit: {fits}",
            )
    defaults = (shortest * share // 16 for share in SUITES[name].shares)
    return tuple(dict.fromkeys(asked or (min(length, room) if known else length for length in defaults)))


def prompts_of(
    name: str, tokenizer: Any, sizes: Sizes, lengths: Sequence[int], count: int, seed: int, texts: Texts
) -> list[TokenizedPrompt]:
    """`count` prompts of a suite, from held-out texts and wordings; tasks take turns and each goes through the lengths.

    Raises DataError where a task finds no room.
    """
    tasks = SUITES[name].tasks
    return generate(tasks, count, tokenizer, lengths, seed, HELDOUT, sizes.sink, sizes.window, texts=texts)


def user_prompts(path: Path, tokenizer: Any, context: int) -> list[TokenizedPrompt]:
    """The prompts of a JSONL file; raises DataError, naming the line, for one that is broken or too long."""
    from fluxc.data import tokenize_jsonl

    return tokenize_jsonl(path, tokenizer, context or 1 << 62)
