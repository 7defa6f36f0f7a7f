"""The prompt generator: seeded, balanced over tasks and lengths, built to a target number of tokens."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from typing import Any

from fluxc.data import corpus, local, reasoning, retrieval, ruler
from fluxc.data.assemble import assemble
from fluxc.data.draft import Maker
from fluxc.data.haystack import Hay, Texts, take
from fluxc.data.prompt import SPLITS, TEXT, Prompt, Span, TokenizedPrompt
from fluxc.data.tokenizing import tokenize
from fluxc.data.validity import FACTS_FAR, minimum_length, validate
from fluxc.errors import DataError

TOLERANCE = 0.02
ATTEMPTS = 8
SCORED_SHARE = 6
"""Of a continuation, one token in this many is scored: 1,000 of 6,000."""
SCORED_MOST = 1000
MAKERS: dict[str, Maker] = {
    "needle": retrieval.needle,
    "multi-needle": retrieval.multi_needle,
    "kv": retrieval.kv,
    "variable-tracking": retrieval.variable_tracking,
    "multi-hop": retrieval.multi_hop,
    "local": local.local,
    "few-shot": local.few_shot,
    "multi-value": ruler.multi_value,
    "multi-query": ruler.multi_query,
    "common-words": ruler.common_words,
    "questions": ruler.questions,
    "far-sum": reasoning.far_sum,
    "steps": reasoning.steps,
}
KNOWN = (*MAKERS, *TEXT)


@dataclasses.dataclass(frozen=True)
class _Cell:
    """What one prompt has to be; `seed` names its random stream."""

    task: str
    length: int
    split: str
    sink: int
    window: int
    seed: str
    number: int
    texts: Texts


def generate(
    tasks: Sequence[str],
    count: int,
    tokenizer: Any,
    lengths: Sequence[int],
    seed: int,
    split: str,
    sink: int,
    window: int,
    *,
    chat: bool = True,
    texts: Texts = corpus,
) -> list[TokenizedPrompt]:
    """`count` prompts, tasks taking turns and each task going through the lengths.

    A prompt with its answer has at most its length in tokens, and at least 98 % of it. Prompt number i is the same
    whatever `count` is. Retrieval and local prompts are valid for `sink` and `window` (see `validate`); text
    prompts score their last sixth, 1,000 tokens at most. `chat` uses the chat template for tasks that ask something.
    `texts`: where haystacks and continuations come from, the packaged corpus by default.
    Raises DataError for an unknown task or split, or when a length leaves no room for a valid prompt.
    """
    _check(tasks, lengths, split, sink, window)
    prompts = []
    for index in range(count):
        task, length = tasks[index % len(tasks)], lengths[index // len(tasks) % len(lengths)]
        cell = _Cell(task, length, split, sink, window, f"{seed}/{split}/{index}/{task}/{length}", seed, texts)
        prompts.append(_build(cell, tokenizer, chat))
    return prompts


def _check(tasks: Sequence[str], lengths: Sequence[int], split: str, sink: int, window: int) -> None:
    unknown = [task for task in tasks if task not in KNOWN]
    if unknown or not tasks:
        raise DataError(
            f"unknown task {', '.join(unknown) or '(none given)'}", hint=f"the tasks are {', '.join(KNOWN)}"
        )
    if split not in SPLITS:
        raise DataError(f"unknown split {split}", hint=f"the splits are {', '.join(SPLITS)}")
    if not lengths:
        raise DataError("no prompt length was given", hint="give at least one")
    shortest = minimum_length(sink, window)
    if min(lengths) < shortest and set(tasks) & set(FACTS_FAR):
        raise DataError(
            f"a retrieval prompt of {min(lengths)} tokens cannot be valid with sink {sink} and window {window}",
            hint=f"ask for at least {shortest} tokens, or for a smaller window",
        )


def _build(cell: _Cell, tokenizer: Any, chat: bool) -> TokenizedPrompt:
    """Build, count, and build again with a corrected haystack until the length fits and the prompt is valid."""
    wanted, room, why = cell.length, int(TOLERANCE * cell.length), ""
    make = _continuation if cell.task in TEXT else _question
    for attempt in range(ATTEMPTS):
        prompt = make(cell, random.Random(f"{cell.seed}/{attempt}"), tokenizer, wanted)
        if prompt is None:
            why = "the haystack has no place for its facts"
            continue
        built = tokenize(dataclasses.replace(prompt, seed=cell.number, length=cell.length), tokenizer, chat)
        missing = cell.length - len(built)
        if not 0 <= missing <= room:
            wanted, why = wanted + missing - room // 4, f"it came out {len(built)} tokens long"
            continue
        why = validate(built, cell.sink, cell.window)
        if not why:
            return built
    raise DataError(
        f"no {cell.task} prompt of {cell.length} tokens fits sink {cell.sink} and window {cell.window}: {why}",
        hint="ask for longer prompts, or for a larger window if the task is local or few-shot",
    )


def _continuation(cell: _Cell, rng: random.Random, tokenizer: Any, wanted: int) -> Prompt:
    hay = take(rng, tokenizer, cell.split, cell.task, wanted, one_source=True, texts=cell.texts)
    return Prompt(cell.task, hay.text, scored=min(cell.length // SCORED_SHARE, SCORED_MOST))


def _question(cell: _Cell, rng: random.Random, tokenizer: Any, wanted: int) -> Prompt | None:
    # The draft keeps its own stream: only the haystack changes from one attempt to the next.
    draft = MAKERS[cell.task](random.Random(cell.seed), cell.split)
    hay = take(rng, tokenizer, cell.split, "prose", wanted, texts=cell.texts)
    return assemble(rng, cell.task, draft, hay.text, _reach(hay, cell))


def _reach(hay: Hay, cell: _Cell) -> Span:
    """Characters of the haystack past the sink and before the window of what follows the haystack."""
    # One token more on each side: a fact's first and last token may swallow a neighbour.
    first, last = cell.sink + 1, len(hay.starts) - cell.window - 1
    return (hay.starts[first], hay.starts[last]) if first < last else (0, -1)
