"""What routers are trained on: generated prompts, a JSONL file, or a folder of Hugging Face `datasets`."""

from __future__ import annotations

import collections
import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fluxc.calibrate.prompts import fitting_prompts, valid_lengths
from fluxc.data import CALIBRATION, HELDOUT, TokenizedPrompt, tokenize_jsonl
from fluxc.data.jsonl import tokenize_rows
from fluxc.errors import DataError
from fluxc.options import canonical_digest
from fluxc.plan import Plan
from fluxc.progress import Progress
from fluxc.train.options import TrainOptions

LEAST = 8
"""Prompts below which there is nothing to hold out."""
CURVE, VERIFIED = 54, 27
"""Prompts at most on which thresholds are found, and on which the result is verified. Neither is trained on."""
LENGTHS = (16, 24, 32)
"""Lengths of generated prompts, in sixteenths of the shortest valid one."""
UNBALANCED = 2.0
"""Times as many prompts of one task as of another that are worth a warning: routing may collapse (METHOD section 1)."""


@dataclasses.dataclass(frozen=True)
class TrainData:
    """train: the routers learn from them; curve: thresholds are found on them; heldout: the result is verified."""

    train: list[TokenizedPrompt]
    curve: list[TokenizedPrompt]
    heldout: list[TokenizedPrompt]
    origin: str
    """"generated", or the name of the user's file or folder."""

    def digest(self) -> str:
        """Equal data, equal digest: what a checkpoint belongs to."""
        return canonical_digest([[p.input_ids, p.prompt_len, p.task] for p in (*self.train, *self.curve)])


def training_data(
    options: TrainOptions, path: str | Path | None, tokenizer: Any, plan: Plan, progress: Progress
) -> TrainData:
    """The user's prompts where a file or folder is given, else generated ones.

    Raises DataError for data that cannot be read, hold too little, or a prompt that scores nothing.
    """
    context = plan.model.context
    if path is None:
        found = _generated(options, tokenizer, plan)
    else:
        read = _folder if Path(path).is_dir() else tokenize_jsonl
        found = _dealt(read(Path(path), tokenizer, context), options.seed, Path(path).name)
    _check(found)
    for warning in balance_warnings(found.train):
        progress.note(warning)
    return found


def _generated(options: TrainOptions, tokenizer: Any, plan: Plan) -> TrainData:
    context, layer = plan.model.context, plan.layers[0]
    sizes = (layer.sink, layer.window)
    lengths = [options.length] if options.length else valid_lengths(*sizes, LENGTHS)
    lengths = sorted({min(context, length) for length in lengths})

    def some(count: int, split: str, offset: int) -> list[TokenizedPrompt]:
        return fitting_prompts(count, tokenizer, lengths, options.seed + offset, split, sizes)

    # Seeds far from calibration's: other prompts of the same kind.
    held = min(VERIFIED, options.prompts)
    return TrainData(
        some(options.prompts, CALIBRATION, 1000),
        some(min(CURVE, options.prompts), CALIBRATION, 2000),
        some(held, HELDOUT, 3000),
        "generated",
    )


def _folder(path: Path, tokenizer: Any, context: int) -> list[TokenizedPrompt]:
    try:
        from datasets import load_from_disk
    except ImportError as cause:
        raise DataError(
            f"{path} is a folder, and reading one needs the package datasets", hint="pip install 'fluxc[train]'"
        ) from cause
    try:
        rows = load_from_disk(str(path))
    except (OSError, ValueError) as cause:
        raise DataError(f"{path} is no folder that datasets.save_to_disk wrote", hint=str(cause)) from cause
    if isinstance(rows, dict):
        raise DataError(f"{path} holds several splits: {', '.join(rows)}", hint=f"name one: {path / next(iter(rows))}")
    return tokenize_rows(((f"{path}, row {n}", dict(row)) for n, row in enumerate(rows)), tokenizer, context)


def _dealt(prompts: list[TokenizedPrompt], seed: int, origin: str) -> TrainData:
    if len(prompts) < LEAST:
        raise DataError(f"{origin} holds {len(prompts)} prompts", hint=f"training needs at least {LEAST}, better 300")
    shuffled = list(prompts)
    random.Random(seed).shuffle(shuffled)
    held, curve = (min(most, max(2, len(prompts) // share)) for most, share in ((VERIFIED, 10), (CURVE, 6)))
    return TrainData(shuffled[held + curve :], shuffled[held : held + curve], shuffled[:held], origin)


def _check(data: TrainData) -> None:
    for prompt in (*data.train, *data.curve, *data.heldout):
        if prompt.answer_len < 1:
            raise DataError(f"a {prompt.task} prompt of {data.origin} scores no token", hint="give it an answer")


def balance_warnings(prompts: Sequence[TokenizedPrompt]) -> list[str]:
    """One line for data in which some task is rare: [] for balanced ones."""
    counts = collections.Counter(prompt.task for prompt in prompts)
    most, least = max(counts, key=counts.__getitem__), min(counts, key=counts.__getitem__)
    if counts[most] <= UNBALANCED * counts[least]:
        return []
    return [
        f"unbalanced tasks: {counts[most]} prompts of {most}, {counts[least]} of {least}; "
        "routing may become the same for all"
    ]
