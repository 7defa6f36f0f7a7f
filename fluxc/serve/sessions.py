"""Kept conversations by the client's session key: a further turn costs its own tokens alone."""

from __future__ import annotations

import asyncio
import collections
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fluxc.engine.conversation import Conversation
from fluxc.engine.engine import Engine
from fluxc.serve.errors import ApiError

_PATIENCE = 2.0
_POLL = 0.01


class Sessions:
    """At most `most` conversations, the longest unused forgotten first. Used by one event loop."""

    def __init__(self, engine: Engine, most: int) -> None:
        self._engine, self._most = engine, most
        self._kept: collections.OrderedDict[str, Conversation] = collections.OrderedDict()
        self._busy: set[str] = set()

    def __len__(self) -> int:
        return len(self._kept)

    @asynccontextmanager
    async def turn(self, key: str | None) -> AsyncIterator[Conversation | None]:
        """The conversation of a session for one turn; None without a key.

        Raises ApiError, 409, where another turn of it is running: OpenAI's clients ask again.
        """
        if key is None or not self._most:
            yield None
            return
        if key in self._busy:
            raise _busy()
        self._busy.add(key)
        try:
            conversation = self._kept.setdefault(key, self._engine.conversation())
            await _free(conversation)
            self._kept.move_to_end(key)
            yield conversation
        finally:
            self._busy.discard(key)
            self._forget()

    def _forget(self) -> None:
        """A conversation that nothing holds gives its pages back by itself."""
        for key in [key for key in self._kept if key not in self._busy][: max(len(self._kept) - self._most, 0)]:
            del self._kept[key]


def new_messages(conversation: Conversation, messages: list[dict[str, str]]) -> list[dict[str, str]] | None:
    """Those that follow what was said so far; None where the client tells another story, or there is none yet."""
    known: list[dict[str, Any]] = conversation.messages
    follows = bool(known) and len(messages) > len(known) and messages[: len(known)] == known
    return messages[len(known) :] if follows else None


async def _free(conversation: Conversation) -> None:
    """A cancelled turn ends with the engine's next step."""
    for _ in range(int(_PATIENCE / _POLL)):
        if not conversation.running:
            return
        await asyncio.sleep(_POLL)
    raise _busy()


def _busy() -> ApiError:
    return ApiError(409, "the session's last turn is still running", param="session", code="session_busy")
