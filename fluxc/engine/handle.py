"""What a caller holds of a running request: its pieces as they come, its result, and the way to stop it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Self

from fluxc.engine.result import Generation, Piece
from fluxc.errors import InternalError


class Handle:
    """Iterate over it (`for`, or `async for`) to get each Piece as it comes; `result()` waits for the whole answer.

    Leaving a `with` or `async with` block cancels a request that is still running. Safe to use from any thread, by one
    reader at a time. `engine` lives at least as long as the handle.
    """

    def __init__(self) -> None:
        self.engine: object = None
        self._news = threading.Condition()
        self._pieces: list[Piece] = []
        self._read = 0
        self._result: Generation | None = None
        self._fault: BaseException | None = None
        self._wake: list[Callable[[], None]] = []
        self.cancelled = False

    @property
    def done(self) -> bool:
        """Whether the answer is complete, was cancelled, or failed."""
        return self._result is not None or self._fault is not None

    def cancel(self) -> None:
        """Stop the request: its pages are free before the next token of any other. What it has so far is its result."""
        self.cancelled = True

    def result(self, timeout: float | None = None) -> Generation:
        """Wait for the end, at most `timeout` seconds; raises TimeoutError, or what made the request fail."""
        with self._news:
            if not self._news.wait_for(lambda: self.done, timeout):
                raise TimeoutError(f"no result within {timeout} seconds")
        return self._outcome()

    def _outcome(self) -> Generation:
        if self._fault is not None:
            raise self._fault
        if self._result is None:
            raise InternalError("a result was read before it was there")
        return self._result

    def put(self, piece: Piece) -> None:
        """The engine's side: one more piece."""
        with self._news:
            self._pieces.append(piece)
            self._announce()

    def finish(self, outcome: Generation | BaseException) -> None:
        """The engine's side: the end."""
        with self._news:
            if isinstance(outcome, Generation):
                self._result = outcome
            else:
                self._fault = outcome
            self._announce()

    def _announce(self) -> None:
        self._news.notify_all()
        wake, self._wake = self._wake, []
        for call in wake:
            # A loop that is closed has no reader left.
            with contextlib.suppress(RuntimeError):
                call()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Piece:
        with self._news:
            self._news.wait_for(lambda: self.done or self._read < len(self._pieces))
        return self._next(StopIteration)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Piece:
        while not self._ready_or(self._waker()):
            await self._event.wait()
        return self._next(StopAsyncIteration)

    def _waker(self) -> Callable[[], None]:
        self._event = asyncio.Event()
        loop, event = asyncio.get_running_loop(), self._event

        def wake() -> None:
            loop.call_soon_threadsafe(event.set)

        return wake

    def _ready_or(self, wake: Callable[[], None]) -> bool:
        """Whether there is something to read; else `wake` is called once there is."""
        with self._news:
            ready = self.done or self._read < len(self._pieces)
            if not ready:
                self._wake = [wake]
            return ready

    def _next(self, end: type[Exception]) -> Piece:
        if self._read == len(self._pieces):
            self._outcome()
            raise end
        self._read += 1
        return self._pieces[self._read - 1]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._leave()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._leave()

    def _leave(self) -> None:
        if not self.done:
            self.cancel()
