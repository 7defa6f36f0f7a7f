"""The outermost layer of the app: request ids, API keys, draining, one log line and one count a request."""

from __future__ import annotations

import time
import uuid
from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any

from fluxc.serve.answering import LEFT
from fluxc.serve.errors import ApiError, draining
from fluxc.serve.gate import Gate
from fluxc.serve.keys import ApiKeys
from fluxc.serve.logs import log
from fluxc.serve.metrics import Metrics

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

API = "/v1/"
WATCHING = ("/health", "/metrics")
"""Asked every few seconds by those who watch a server: counted, not logged."""


class Front:
    """ASGI middleware around everything. Handlers may add fields to the log line through `scope["fluxc"]`."""

    def __init__(self, app: ASGIApp, gate: Gate, keys: ApiKeys, metrics: Metrics) -> None:
        self._app, self._gate, self._keys, self._metrics = app, gate, keys, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.perf_counter(), [LEFT]
        fields: MutableMapping[str, Any] = {"request": f"req_{uuid.uuid4().hex}"}
        scope["fluxc"] = fields

        async def send_on(message: Message) -> None:
            if message["type"] == "http.response.start":
                status[0] = message["status"]
                message = {**message, "headers": [*message["headers"], (b"x-request-id", fields["request"].encode())]}
            await send(message)

        try:
            await self._answer(scope, receive, send_on)
        finally:
            self._note(scope, status[0], time.perf_counter() - start)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self._admit(scope)
        except ApiError as fault:
            await fault.response()(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _admit(self, scope: Scope) -> None:
        if not scope["path"].startswith(API):
            return
        given = {name: value for name, value in scope["headers"] if name == b"authorization"}
        if not self._keys.admits(given.get(b"authorization", b"").decode("latin-1")):
            text = "the API key is missing or not known"
            raise ApiError(401, text, kind="authentication_error", code="invalid_api_key")
        if self._gate.draining:
            raise draining()

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        route = scope.get("route")
        # The route, not the path: clients must not be able to make new series of the counter.
        path = getattr(route, "path", "other")
        self._metrics.request(path, status)
        if scope["path"] not in WATCHING:
            fields = {"status": status, "seconds": round(seconds, 4), **scope["fluxc"]}
            log("request", method=scope["method"], path=path, **fields)
