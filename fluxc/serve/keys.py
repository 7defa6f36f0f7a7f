"""API keys: read from a file, compared in constant time."""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
from collections.abc import Iterable
from pathlib import Path
from typing import Self

from fluxc.errors import OptionError


@dataclasses.dataclass(frozen=True)
class ApiKeys:
    """Known keys, as SHA-256 digests; without any, every request is let in."""

    digests: tuple[bytes, ...] = ()

    @classmethod
    def of(cls, keys: Iterable[str]) -> Self:
        """The keys themselves."""
        return cls(tuple(_digest(key) for key in keys))

    @classmethod
    def read(cls, path: str) -> Self:
        """One key a line of the file; "" for no keys. Raises OptionError for a file that holds none."""
        if not path:
            return cls()
        try:
            lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as cause:
            raise OptionError(f"the file of API keys {path} cannot be read: {cause}") from cause
        keys = [line for line in lines if line and not line.startswith("#")]
        if not keys:
            raise OptionError(f"the file of API keys {path} holds no key", hint="one key a line")
        return cls.of(keys)

    def admits(self, authorization: str) -> bool:
        """Whether an Authorization header carries a known key. Every known key is compared, in constant time."""
        if not self.digests:
            return True
        scheme, _, key = authorization.partition(" ")
        given = _digest(key.strip())
        matches = [hmac.compare_digest(given, known) for known in self.digests]
        return scheme.lower() == "bearer" and any(matches)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
