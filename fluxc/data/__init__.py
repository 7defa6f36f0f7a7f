"""Prompts to calibrate and to evaluate on: the packaged corpus, the seeded generator, the user's JSONL.

Nothing here needs torch: tokenized prompts are lists of ids, batches are made where they are run.
"""

from __future__ import annotations

from fluxc.data import corpus
from fluxc.data.generator import generate
from fluxc.data.jsonl import read_jsonl, tokenize_jsonl
from fluxc.data.prompt import (
    CALIBRATION,
    FAR,
    HELDOUT,
    LOCAL,
    REASONING,
    RETRIEVAL,
    SPLITS,
    TASKS,
    TEXT,
    USER_TASK,
    Prompt,
    TokenizedPrompt,
    group_of,
)
from fluxc.data.tokenizing import tokenize
from fluxc.data.validity import minimum_length, validate

__all__ = [
    "CALIBRATION",
    "FAR",
    "HELDOUT",
    "LOCAL",
    "REASONING",
    "RETRIEVAL",
    "SPLITS",
    "TASKS",
    "TEXT",
    "USER_TASK",
    "Prompt",
    "TokenizedPrompt",
    "corpus",
    "generate",
    "group_of",
    "minimum_length",
    "read_jsonl",
    "tokenize",
    "tokenize_jsonl",
    "validate",
]
