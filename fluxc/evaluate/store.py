"""Samples on disk: one small file for each prompt and routing, so that nothing is computed twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fluxc.atomic import atomic_file
from fluxc.options import canonical_digest

VERSION = 1
"""Raised when the same prompt and routing would be scored differently."""


class Store:
    """A folder of samples by key. Processes that share it see each other's samples; None as folder keeps nothing.

    `known`: samples to begin with, by key.
    """

    def __init__(self, folder: Path | None, digest: str, known: dict[str, Any] | None = None) -> None:
        self.folder, self._digest = folder, digest
        self.known: dict[str, Any] = dict(known or {})

    def key(self, *parts: Any) -> str:
        """The name of a sample that depends on `parts` (plain values) and on the model."""
        return canonical_digest([VERSION, self._digest, *parts])[:32]

    def get(self, key: str) -> Any:
        """The sample, None where it is not there. A file that is cut off counts as not there."""
        if key not in self.known and self.folder:
            try:
                self.known[key] = json.loads((self.folder / f"{key}.json").read_text())
            except (OSError, ValueError):
                return None
        return self.known.get(key)

    def put(self, key: str, value: Any) -> None:
        """Keep a sample (plain values)."""
        self.known[key] = value
        if self.folder:
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic_file(self.folder / f"{key}.json", force=True) as temporary:
                temporary.write_text(json.dumps(value))
