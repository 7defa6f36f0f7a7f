"""Rows of a benchmark on disk as they are made, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class KeptRows:
    """Rows in a JSONL file that grows by a line a row; its first line says what the rows depend on.

    A file of other conditions is started again, and a last line that an interruption cut short is dropped. Without a
    path, rows are kept in memory only.
    """

    def __init__(self, path: Path | None, conditions: dict[str, Any]) -> None:
        self.path = path
        self._rows: dict[tuple[str, ...], dict[str, Any]] = {}
        head = json.dumps(conditions, sort_keys=True)
        lines = _complete_lines(path)
        if lines and lines[0] == head:
            for row in map(json.loads, lines[1:]):
                self._rows[_key(row)] = row
        if path:
            path.write_text("".join(line + "\n" for line in [head, *(json.dumps(row) for row in self._rows.values())]))

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, suite: str, prompt: int, system: str) -> dict[str, Any] | None:
        """The row of a system on a prompt, if it has been made."""
        return self._rows.get((suite, str(prompt), system))

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Keep rows; each has `suite`, `prompt` and `system`."""
        for row in rows:
            self._rows[_key(row)] = row
            if self.path:
                with self.path.open("a") as file:
                    file.write(json.dumps(row) + "\n")

    def remove(self) -> None:
        """Forget the file: the result holds the rows."""
        if self.path:
            self.path.unlink(missing_ok=True)


def _key(row: dict[str, Any]) -> tuple[str, ...]:
    return row["suite"], str(row["prompt"]), row["system"]


def _complete_lines(path: Path | None) -> list[str]:
    if path is None or not path.exists():
        return []
    return [line[:-1] for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
