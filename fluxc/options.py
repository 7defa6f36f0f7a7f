"""Options are frozen dataclasses: unknown keys are rejected, every field has a default, and each set has a digest."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any, Self

from fluxc.errors import OptionError


@dataclasses.dataclass(frozen=True)
class Options:
    """Base of all option sets. Subclasses add fields and check their ranges in `__post_init__`."""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Build the options from a mapping; raises OptionError for a key this set does not have."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise OptionError(f"unknown option {unknown[0]!r}", hint=f"{cls.__name__} knows {', '.join(sorted(known))}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The options as plain JSON-ready values."""
        return dataclasses.asdict(self)

    def digest(self) -> str:
        """Hexadecimal SHA-256 of the canonical JSON form: equal options, equal digest."""
        return canonical_digest(self.to_dict())


def canonical_digest(value: Any) -> str:
    """Hexadecimal SHA-256 of `value` as canonical JSON (sorted keys, no spaces)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
