"""Which prompts a calibration uses: the generator's, or the user's."""

from __future__ import annotations

import dataclasses
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fluxc.calibrate.options import EFFORTS, CalibrateOptions
from fluxc.capture.result import Capture
from fluxc.data import (
    CALIBRATION,
    HELDOUT,
    TASKS,
    TokenizedPrompt,
    generate,
    minimum_length,
    tokenize_jsonl,
)
from fluxc.errors import DataError

SHORT = 640
"""Tokens of a prompt that only shows queries to the routers; the share of a valid prompt's length if that is less."""


@dataclasses.dataclass(frozen=True)
class PromptSets:
    """measured: their needs are measured; pooled: only their pooled queries are used; heldout: verification."""

    measured: list[TokenizedPrompt]
    pooled: list[TokenizedPrompt]
    heldout: list[TokenizedPrompt]
    origin: str
    """"generated", or the user's file name."""


def generated_prompts(options: CalibrateOptions, tokenizer: Any, context: int) -> PromptSets:
    """Prompts of the packaged generator; the held-out ones come from other texts and other wordings."""
    sink, window = options.sizes(context)
    effort = EFFORTS[options.effort]
    lengths = [min(context, length) for length in valid_lengths(sink, window, effort.lengths)]

    def some(count: int, lengths: Sequence[int], split: str, offset: int, sizes: tuple[int, int]) -> list[Any]:
        return fitting_prompts(count, tokenizer, lengths, options.seed + offset, split, sizes)

    small = (4, min(SHORT, lengths[0]) // 6)
    short = max(min(SHORT, lengths[0] // 2), minimum_length(*small))
    return PromptSets(
        measured=some(effort.measured, lengths, CALIBRATION, 0, (sink, window)),
        # Built for small sizes, so that they can be short: nothing about their needs is used.
        pooled=some(effort.pooled, [short], CALIBRATION, 1, small),
        heldout=some(effort.heldout, lengths, HELDOUT, 2, (sink, window)),
        origin="generated",
    )


def fitting_prompts(
    count: int, tokenizer: Any, lengths: Sequence[int], seed: int, split: str, sizes: tuple[int, int]
) -> list[TokenizedPrompt]:
    """`count` prompts, tasks taking turns. Tasks that do not fit are left out: a few examples and a tiny window, say.

    Raises DataError where no task fits.
    """
    by_task, refused = [], None
    for task in TASKS:
        try:
            by_task.append(generate([task], -(-count // len(TASKS)), tokenizer, lengths, seed, split, *sizes))
        except DataError as error:
            refused = error
    if refused and not by_task:
        raise refused
    return [prompt for turn in zip(*by_task, strict=True) for prompt in turn][:count]


def valid_lengths(sink: int, window: int, sixteenths: Sequence[int]) -> list[int]:
    """Prompt lengths as shares of the shortest valid one, in tokens."""
    shortest = minimum_length(sink, window)
    return [shortest * share // 16 for share in sixteenths]


def user_prompts(path: str | Path, options: CalibrateOptions, tokenizer: Any, context: int) -> PromptSets:
    """The prompts of a JSONL file, shuffled by seed and dealt out as the effort asks, held-out ones first.

    Raises DataError for a bad line, a prompt past the context, or fewer than four prompts.
    """
    prompts = tokenize_jsonl(path, tokenizer, context)
    if len(prompts) < 4:
        raise DataError(f"{path} holds {len(prompts)} prompts", hint="calibration needs at least 4, better 30")
    random.Random(options.seed).shuffle(prompts)
    effort = EFFORTS[options.effort]
    held = min(effort.heldout, len(prompts) // 3)
    rest = prompts[held:]
    measured = rest[: effort.measured]
    return PromptSets(measured, rest[effort.measured :][: effort.pooled], prompts[:held], Path(path).name)


def prompt_sets(options: CalibrateOptions, path: str | Path | None, tokenizer: Any, context: int) -> PromptSets:
    """The user's prompts where a file is given, else generated ones."""
    if path is not None:
        return user_prompts(path, options, tokenizer, context)
    return generated_prompts(options, tokenizer, context)


def load_tokenizer(captured: Capture) -> Any:
    """The captured model's tokenizer, from its files alone. Raises DataError where it has none."""
    from transformers import AutoTokenizer

    if not captured.tokenizer_files:
        raise DataError(
            "the model has no tokenizer",
            hint="put its tokenizer.json into the model's folder, or call fluxc.transform(..., tokenizer=...)",
        )
    with tempfile.TemporaryDirectory() as folder:
        for name, content in captured.tokenizer_files.items():
            (Path(folder) / name).write_bytes(content)
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
