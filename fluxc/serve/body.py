"""Limits on what may come in: size, nesting and slowness of a request's body, checked before anything parses it."""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING

from fluxc.serve.errors import ApiError

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)
_BRACKET = re.compile(rb"[\[\]{}]")


class BodyLimits:
    """ASGI middleware that reads a body whole, or answers 413, 400 or 408 in place of the app."""

    def __init__(self, app: ASGIApp, most_bytes: int, most_depth: int, seconds: float) -> None:
        self._app, self._bytes, self._depth, self._seconds = app, most_bytes, most_depth, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on with its body in one piece."""
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self._app(scope, receive, send)
            return
        try:
            body = await asyncio.wait_for(self._read(scope, receive), self._seconds)
            check_depth(body, self._depth)
        except TimeoutError:
            fault = ApiError(408, f"the body did not arrive within {self._seconds:g} s", code="request_timeout")
            await fault.response()(scope, receive, send)
        except ApiError as fault:
            await fault.response()(scope, receive, send)
        except ConnectionError:
            return
        else:
            await self._app(scope, _replay(body, receive), send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes:
        self._check(_announced(scope))
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ConnectionError("the client left before its request was complete")
            body += message.get("body", b"")
            self._check(len(body))
            if not message.get("more_body"):
                return bytes(body)

    def _check(self, size: int) -> None:
        if size > self._bytes:
            raise ApiError(413, f"a body of more than {self._bytes:,} bytes is not taken", code="body_too_large")


def check_depth(body: bytes, most: int) -> None:
    """Raise ApiError for JSON nested deeper than `most`; parsers would run out of stack."""
    depth = 0
    for found in _BRACKET.finditer(_STRING.sub(b"", body)):
        depth += 1 if found[0] in b"[{" else -1
        if depth > most:
            raise ApiError(400, f"JSON nested deeper than {most} is not taken", code="json_too_deep")


def _announced(scope: Scope) -> int:
    values = [value for name, value in scope["headers"] if name == b"content-length"]
    return int(values[0]) if values and values[0].isdigit() else 0


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body once more, and then whatever the client does."""
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> Message:
        return waiting.pop() if waiting else await receive()

    return next_message
