"""An answer as an HTTP response: whole, or as server-sent events; a client that leaves ends it."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from fluxc.serve.ask import Ask
from fluxc.serve.errors import ApiError
from fluxc.serve.forms import Choice, Envelope
from fluxc.serve.running import Delta
from fluxc.serve.service import Service, fields_of

LEFT = 499
"""Status noted for a client that was gone before its answer; nobody reads it."""
DONE = b"data: [DONE]\n\n"


class Answering:
    """One request on its way to its answer."""

    def __init__(
        self, service: Service, request: Request, asks: Sequence[Ask], envelope: Envelope, session: str | None = None
    ) -> None:
        self._service, self._request, self._asks, self._envelope = service, request, asks, envelope
        self._session = session
        self._choices = [Choice(ask.index) for ask in asks]
        self._fields: dict[str, Any] = request.scope.get("fluxc", {})
        self._fields.update(fields_of(asks, service.settings))

    async def whole(self) -> Response:
        """The complete answer as JSON; raises ApiError."""
        collect = asyncio.create_task(self._collect())
        gone = asyncio.create_task(_gone(self._request))
        try:
            await asyncio.wait((collect, gone), return_when=asyncio.FIRST_COMPLETED)
            return JSONResponse(await collect) if collect.done() else Response(status_code=LEFT)
        finally:
            for task in (collect, gone):
                task.cancel()
            await asyncio.gather(collect, gone, return_exceptions=True)

    async def _collect(self) -> dict[str, Any]:
        async with self._service.answers(self._asks, self._session) as deltas:
            async for delta in deltas:
                self._take(delta)
        return self._envelope.whole(self._choices, self._usage())

    async def stream(self, usage: bool) -> Response:
        """The answer as events; raises ApiError for what is known before the first of them."""
        stack = contextlib.AsyncExitStack()
        try:
            deltas = await stack.enter_async_context(self._service.answers(self._asks, self._session))
        except BaseException:
            await stack.aclose()
            raise
        return EventStream(self._events(deltas, usage), stack)

    async def _events(self, deltas: AsyncIterator[Delta], usage: bool) -> AsyncIterator[bytes]:
        for ask in self._asks:
            opening = self._envelope.first(ask.index)
            if opening:
                yield _event(opening)
        try:
            async for delta in deltas:
                chunk = self._chunk(delta)
                if chunk:
                    yield _event(chunk)
        except Exception as fault:
            yield _event(self._failed(fault).body)
            return
        if usage:
            yield _event(self._envelope.counts(self._usage()))
        yield DONE

    def _failed(self, fault: Exception) -> ApiError:
        known = self._service.known(fault)
        self._fields["error"] = known.code
        return known

    def _take(self, delta: Delta) -> Choice:
        choice = self._choices[delta.index]
        choice.text += delta.text
        choice.pieces += delta.pieces
        if delta.finish:
            choice.finish, choice.result = delta.finish, delta.result
            self._note(choice)
        return choice

    def _chunk(self, delta: Delta) -> dict[str, Any] | None:
        """A chunk for what is new, None where it shows nothing."""
        whole = self._take(delta)
        wanted = self._asks[delta.index].logprobs is not None and delta.pieces
        if not (delta.text or delta.finish or wanted):
            return None
        begun = len(whole.text) - len(delta.text)
        part = Choice(delta.index, delta.text, list(delta.pieces), delta.finish, delta.result, begun)
        return self._envelope.part(part)

    def _note(self, choice: Choice) -> None:
        result = choice.result
        if result is not None:
            self._fields["tokens"] = self._fields.get("tokens", 0) + len(choice.pieces)
            self._fields.update(
                prompt_tokens=result.prompt_tokens,
                sparse_ratio=round(result.sparse_ratio, 4),
                first_token=round(result.timings.first_token, 4),
                finish=choice.finish,
            )

    def _usage(self) -> dict[str, Any]:
        """Counts as OpenAI's: each prompt once, whatever n."""
        prompts = {
            ask.row: choice.result.prompt_tokens
            for ask, choice in zip(self._asks, self._choices, strict=True)
            if choice.result is not None
        }
        prompt, answer = sum(prompts.values()), sum(len(choice.pieces) for choice in self._choices)
        return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


class EventStream(StreamingResponse):
    """Server-sent events whose end, whoever brings it about, leaves `stack`."""

    def __init__(self, events: AsyncIterator[bytes], stack: contextlib.AsyncExitStack) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._stack = stack

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._stack.aclose()


async def _gone(request: Request) -> None:
    """Returns when the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=True, separators=(",", ":")).encode() + b"\n\n"
