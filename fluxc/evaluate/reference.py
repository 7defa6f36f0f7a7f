"""`python -m fluxc.evaluate.reference MODEL`: dense single-needle cells against a committed table.

The table holds, for each prompt, the loss and whether it was answered; any machine can score the first prompts of each
length and must find the same. With `--transformers` they are scored by transformers' own model instead of a captured
program: then the two share the prompts and the rule, and nothing of how logits are computed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fluxc.cli.app import run as run_frame
from fluxc.cli.command import command
from fluxc.cli.screen import Screen
from fluxc.errors import DataError, SelfCheckError

if TYPE_CHECKING:
    from fluxc.data import TokenizedPrompt
    from fluxc.progress import Progress

LENGTHS = (2500, 4000)
SINK, WINDOW = 64, 1024
SEED = 1000
COUNT = 6
TOLERANCE = 0.02
"""Nats by which a prompt's loss may differ: the table was made with TF32 products."""
Row = dict[str, Any]


@command(
    "reference",
    examples="""
    python -m fluxc.evaluate.reference smollm2 --table bench/results/eval-reference.json
    python -m fluxc.evaluate.reference smollm2 --transformers --table bench/results/eval-reference.json
    """,
)
@click.argument("model", metavar="MODEL")
@click.option("--table", type=click.Path(path_type=Path), required=True, help="The reference table, JSON.")
@click.option("--count", type=click.IntRange(1), default=COUNT, show_default=True, help="Prompts of each length.")
@click.option("--transformers", "source", is_flag=True, help="Score with transformers' own model.")
@click.option("--from-quality", type=click.Path(path_type=Path), help="Write the table from rows of this result.")
def reference(screen: Screen, model: str, table: Path, count: int, source: bool, from_quality: Path | None) -> None:
    """Score MODEL, dense, on the prompts of the reference table and compare prompt by prompt and cell by cell."""
    if from_quality:
        table.write_text(json.dumps(table_of(json.loads(from_quality.read_text())), indent=1) + "\n")
        return
    expected = _table(table)
    progress = screen.progress()
    tokenizer, score = _by_transformers(model, progress) if source else _by_fluxc(model, progress)
    prompts = needles(tokenizer, count)
    progress.start("single needles, dense", len(prompts))
    found: list[Row] = []
    for prompt in prompts:
        found.append(score(prompt))
        check(found, expected)
        progress.note(_words(found[-1]))
        progress.advance()
    screen.show(*(_line(cell) for cell in cells(found)), f"as in {table}")
    screen.result({"model": model, "rows": found, "cells": cells(found)})


def needles(tokenizer: Any, count: int) -> list[TokenizedPrompt]:
    """`count` prompts of each length, taking turns."""
    from fluxc.data import HELDOUT, generate

    return generate(["needle"], count * len(LENGTHS), tokenizer, LENGTHS, SEED, HELDOUT, SINK, WINDOW)


def table_of(quality: dict[str, Any]) -> dict[str, Any]:
    """The table from the dense needles of a result of `fluxc.bench.quality` on the same prompts."""
    dense = [row for row in quality["suites"]["needle"] if row["system"] == "dense"]
    rows = [{name: row[name] for name in ("tokens", "loss", "exact")} for row in dense]
    rows = [{"length": LENGTHS[at % len(LENGTHS)], **row} for at, row in enumerate(rows)]
    conditions = {name: quality["conditions"][name] for name in ("model", "dtype", "device", "seed", "sink", "window")}
    return {"conditions": conditions, "cells": cells(rows), "rows": rows}


def cells(rows: Sequence[Row]) -> list[Row]:
    """For each length: prompts, how many were answered exactly, mean loss."""
    found = []
    for length in dict.fromkeys(row["length"] for row in rows):
        of_length = [row for row in rows if row["length"] == length]
        loss = sum(row["loss"] for row in of_length) / len(of_length)
        found.append(
            {"length": length, "prompts": len(of_length), "exact": sum(r["exact"] for r in of_length), "loss": loss}
        )
    return found


def check(found: Sequence[Row], expected: Sequence[Row]) -> None:
    """Raise SelfCheckError, naming the prompt, for the first that differs from the table."""
    for number, (mine, theirs) in enumerate(zip(found, expected, strict=False)):
        same = all(mine[name] == theirs[name] for name in ("length", "tokens", "exact"))
        if not same or abs(mine["loss"] - theirs["loss"]) > TOLERANCE:
            raise SelfCheckError(f"needle {number} differs from the reference: {_words(mine)}, not {_words(theirs)}")


def _table(path: Path) -> list[Row]:
    try:
        return list(json.loads(path.read_text())["rows"])
    except (OSError, ValueError, KeyError) as cause:
        raise DataError(f"{path} is no reference table", hint="bench/results/eval-reference.json is one") from cause


def _words(row: Row) -> str:
    return f"{row['tokens']} tokens, {'exact' if row['exact'] else 'not exact'}, loss {row['loss']:.4f}"


def _line(cell: Row) -> str:
    return f"{cell['length']} tokens: {cell['exact']} of {cell['prompts']} exact, loss {cell['loss']:.4f}"


def _row(prompt: TokenizedPrompt, loss: float, exact: bool) -> Row:
    length = prompt.prompt.length if prompt.prompt else 0
    return {"length": length, "tokens": len(prompt), "loss": loss, "exact": exact}


def _by_fluxc(model: str, progress: Progress) -> tuple[Any, Callable[[TokenizedPrompt], Row]]:
    import torch

    from fluxc.evaluate.oracle import all_full
    from fluxc.evaluate.subjects import open_subject

    subject = open_subject(model, "cuda" if torch.cuda.is_available() else "cpu", progress)

    def score(prompt: TokenizedPrompt) -> Row:
        found = subject.outcomes(prompt, all_full(subject.layers)[:, None])[0]
        return _row(prompt, found.loss, found.exact)

    return subject.tokenizer, score


def _by_transformers(model: str, progress: Progress) -> tuple[Any, Callable[[TokenizedPrompt], Row]]:
    import torch
    from torch.nn import functional as F

    from fluxc.capture import sources

    progress.start("loading the model")
    location = sources.locate(model)
    loaded, tokenizer = sources.load_model(location), sources.load_tokenizer(location, progress.note)

    @torch.no_grad()
    def score(prompt: TokenizedPrompt) -> Row:
        keep = torch.tensor(prompt.logits_at)
        logits = loaded(torch.tensor([prompt.input_ids]), use_cache=False, logits_to_keep=keep).logits[0].float()
        target = torch.tensor(prompt.answer_ids)
        return _row(prompt, float(F.cross_entropy(logits, target)), bool((logits.argmax(-1) == target).all()))

    return tokenizer, score


if __name__ == "__main__":
    sys.exit(run_frame(command=reference, name="python -m fluxc.evaluate.reference"))
