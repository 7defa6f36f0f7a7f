"""What the routes share: one engine, who may use it, and how an answer is started, streamed and counted."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import uuid
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fluxc.engine.conversation import Conversation
from fluxc.engine.engine import Engine
from fluxc.engine.handle import Handle
from fluxc.errors import DataError, UserError
from fluxc.serve.ask import Ask
from fluxc.serve.errors import ApiError, draining, internal, of_user
from fluxc.serve.gate import Gate
from fluxc.serve.logs import log
from fluxc.serve.metrics import Metrics
from fluxc.serve.options import ServeOptions
from fluxc.serve.running import Delta, Running, merged
from fluxc.serve.sessions import Sessions, new_messages


class Service:
    """One engine behind HTTP. Used by one event loop."""

    def __init__(self, engine: Engine, settings: ServeOptions) -> None:
        self.engine, self.settings = engine, settings
        # Tells replicas behind one address apart.
        self.id = uuid.uuid4().hex[:12]
        self.gate = Gate(settings.capacity, settings.max_batch)
        self.metrics = Metrics(engine)
        self.sessions = Sessions(engine, settings.conversations)
        self._running: set[Handle] = set()
        # One thread: tokenizers are not meant to be used by several, and a long text must not hold up the event loop.
        self._intake = concurrent.futures.ThreadPoolExecutor(1, "fluxc-intake")

    def drain(self) -> None:
        """Take no more requests; those that run go on."""
        self.gate.draining = True

    def abort(self) -> None:
        """End what still runs; its clients are told to ask again."""
        self.drain()
        for handle in self._running:
            handle.cancel()

    def close(self) -> None:
        """End everything, the engine too."""
        self.abort()
        self._intake.shutdown()
        self.engine.close()

    def text_of(self, token: int) -> str:
        """The text of one token."""
        return str(self.engine.tokenizer.decode([token])) if self.engine.tokenizer is not None else ""

    @asynccontextmanager
    async def answers(self, asks: Sequence[Ask], session: str | None = None) -> AsyncIterator[AsyncIterator[Delta]]:
        """The deltas of all answers; leaving early cancels them. Raises ApiError for what cannot be asked."""
        with self.gate.room(len(asks)):
            async with self.sessions.turn(session) as conversation:
                handles = await self._submitted(asks, conversation)
                self._running.update(handles)
                try:
                    running = [Running(ask, handle) for ask, handle in zip(asks, handles, strict=True)]
                    async with merged(running) as deltas:
                        yield self._counted(deltas)
                finally:
                    self._left(handles)

    async def _submitted(self, asks: Sequence[Ask], conversation: Conversation | None) -> list[Handle]:
        loop = asyncio.get_running_loop()
        work = loop.run_in_executor(self._intake, self._submit, asks, conversation)
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            work.add_done_callback(lambda done: _cancel(() if done.exception() else done.result()))
            raise
        except UserError as fault:
            raise self.known(fault) from fault

    def _submit(self, asks: Sequence[Ask], conversation: Conversation | None) -> list[Handle]:
        handles: list[Handle] = []
        try:
            for ask in asks:
                handles.append(self._submit_one(ask, conversation))
        except BaseException:
            _cancel(handles)
            raise
        return handles

    def _submit_one(self, ask: Ask, conversation: Conversation | None) -> Handle:
        if conversation is None:
            return self.engine.submit(ask.prompt, **ask.options)
        new = new_messages(conversation, ask.prompt)
        if new is not None:
            kept = {name: value for name, value in ask.options.items() if name != "budget"}
            try:
                return self.engine.submit(new, conversation=conversation, **kept)
            except DataError as fault:
                # Templates that render earlier turns anew: the whole conversation is computed again.
                log("session computed anew", reason=fault.message)
        conversation.close()
        return self.engine.submit(ask.prompt, conversation=conversation, **ask.options)

    async def _counted(self, deltas: AsyncIterator[Delta]) -> AsyncIterator[Delta]:
        try:
            async for delta in deltas:
                for _ in delta.pieces:
                    self.metrics.token()
                if delta.result is not None:
                    self._ended(delta)
                yield delta
        except Exception as fault:
            self.metrics.ended("failed")
            raise self.known(fault) from fault

    def _ended(self, delta: Delta) -> None:
        """Note an answer's end; one that nobody here cancelled, and is, was ended by `abort`."""
        if delta.result is None or delta.finish == "cancelled":
            raise draining()
        self.metrics.ended(delta.finish or "")
        self.metrics.answered(delta.result)
        self.gate.took(delta.result.timings.prefill + delta.result.timings.decode)

    def _left(self, handles: Sequence[Handle]) -> None:
        self._running.difference_update(handles)
        for handle in handles:
            if not handle.done:
                self.metrics.ended("cancelled")

    def known(self, fault: Exception) -> ApiError:
        """The fault as clients are told of it."""
        if isinstance(fault, ApiError):
            return fault
        if self.gate.draining:
            return draining()
        if isinstance(fault, UserError):
            return of_user(fault)
        log("failed", level=logging.ERROR, exc_info=fault)
        return internal()


def fields_of(asks: Sequence[Ask], settings: ServeOptions) -> dict[str, Any]:
    """What the log says of a request: counts, and the prompts where that was asked for."""
    fields: dict[str, Any] = {"answers": len(asks)}
    return {**fields, "prompts": [ask.prompt for ask in asks]} if settings.log_prompts else fields


def _cancel(handles: Iterable[Handle]) -> None:
    for handle in handles:
        handle.cancel()
