"""The user's own prompts: one JSON object a line with `prompt`, and if known `answer` and `task`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fluxc.data.prompt import USER_TASK, Prompt, TokenizedPrompt
from fluxc.data.tokenizing import tokenize
from fluxc.errors import DataError

KEYS = ("prompt", "answer", "task")
SCORED = 128
"""Tokens scored at the end of a prompt that comes without an answer."""


def read_jsonl(path: str | Path) -> list[Prompt]:
    """The prompts of a file, in order; empty lines are skipped.

    With an answer the prompt is put into the chat template and the answer is scored; without one the prompt is taken
    as it is and its last 128 tokens are scored. Raises DataError with the file and the line for anything else.
    """
    return [prompt for _, prompt in _numbered(Path(path))]


def tokenize_jsonl(path: str | Path, tokenizer: Any, context: int, chat: bool = True) -> list[TokenizedPrompt]:
    """As `read_jsonl`, tokenized. Raises DataError for a prompt that with its answer has more than `context` tokens."""
    return _fitting(_numbered(Path(path)), tokenizer, context, chat)


def tokenize_rows(
    rows: Iterable[tuple[str, dict[str, Any]]], tokenizer: Any, context: int, chat: bool = True
) -> list[TokenizedPrompt]:
    """As `tokenize_jsonl`, of rows that were read already; each comes with its name for error messages."""
    return _fitting([(where, prompt_of(entry, where)) for where, entry in rows], tokenizer, context, chat)


def _fitting(prompts: list[tuple[str, Prompt]], tokenizer: Any, context: int, chat: bool) -> list[TokenizedPrompt]:
    out = []
    for where, prompt in prompts:
        built = tokenize(prompt, tokenizer, chat)
        if len(built) > context:
            raise DataError(
                f"{where}: the prompt and its answer have {len(built)} tokens, more than the model's {context}",
                hint="shorten it or leave it out",
            )
        out.append(built)
    return out


def _numbered(path: Path) -> list[tuple[str, Prompt]]:
    found = [(where, prompt_of(_object(line, where), where)) for where, line in _lines(path) if line.strip()]
    if not found:
        raise DataError(f"{path} holds no prompts", hint='each line is an object such as {"prompt": "..."}')
    return found


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Each line with its name for error messages. Only a newline ends a line: JSON strings may hold U+2028."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start})", hint="save it as UTF-8") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}", hint="give the path of a JSONL file") from error
    for number, line in enumerate(text.split("\n"), start=1):
        yield f"{path}, line {number}", line


def prompt_of(entry: dict[str, Any], where: str) -> Prompt:
    """The prompt of one object; `where` names it in the DataError raised for one that cannot be used."""
    _check_keys(entry, where)
    answer = entry.get("answer") or ""
    return Prompt(
        task=entry.get("task") or USER_TASK,
        text=entry["prompt"],
        answer=answer,
        chat=bool(answer),
        scored=0 if answer else SCORED,
    )


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        reason = getattr(error, "msg", "nested too deep")
        raise DataError(f"{where}: not valid JSON ({reason})", hint="each line holds one JSON object") from error
    if not isinstance(entry, dict):
        raise DataError(f"{where}: a JSON {type(entry).__name__}, not an object", hint='write {"prompt": "..."}')
    return entry


def _check_keys(entry: dict[str, Any], where: str) -> None:
    unknown = sorted(set(entry) - set(KEYS))
    if unknown:
        raise DataError(f"{where}: unknown key {unknown[0]!r}", hint=f"the keys are {', '.join(KEYS)}")
    if "prompt" not in entry:
        raise DataError(f"{where}: the key 'prompt' is missing", hint="every line needs a prompt")
    for key, value in entry.items():
        if not isinstance(value, str) and not (value is None and key != "prompt"):
            raise DataError(f"{where}: {key!r} is not a string", hint="put it in quotes")
    if not entry["prompt"].strip():
        raise DataError(f"{where}: the prompt is empty", hint="every line needs a prompt")
