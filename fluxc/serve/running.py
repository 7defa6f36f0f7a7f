"""Answers while they are computed: their text with stop strings cut off, and how they ended."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Callable, Sequence

from fluxc.engine.handle import Handle
from fluxc.engine.result import Generation, Piece
from fluxc.serve.ask import Ask
from fluxc.serve.stops import StopWatch


@dataclasses.dataclass(frozen=True)
class Delta:
    """What came new of one answer: text (perhaps ""), its tokens, and at the end the reason and the engine's result."""

    index: int
    text: str
    pieces: tuple[Piece, ...] = ()
    finish: str | None = None
    result: Generation | None = None


class Running:
    """One answer of the engine. `tokens`: so far, those of a stop string included; `text`: what was handed out."""

    def __init__(self, ask: Ask, handle: Handle) -> None:
        self.ask, self.handle = ask, handle
        self.tokens = 0
        self._watch = StopWatch(ask.stops)

    async def deltas(self) -> AsyncIterator[Delta]:
        """Each Delta as it comes; the last one has the end. Raises what made the answer fail."""
        index = self.ask.index
        async for piece in self.handle:
            self.tokens += 1
            text = self._watch.add(piece.text)
            if self._watch.hit:
                self.handle.cancel()
                yield Delta(index, text, (piece,))
                break
            yield Delta(index, text, (piece,))
        async for _ in self.handle:
            pass
        result = self.handle.result()
        finish = "stop" if self._watch.hit else result.finish_reason
        yield Delta(index, self._watch.rest(), finish=finish, result=result)


@contextlib.asynccontextmanager
async def merged(answers: Sequence[Running]) -> AsyncIterator[AsyncIterator[Delta]]:
    """The deltas of all answers in the order they come. Whoever leaves early cancels what still runs."""
    news: asyncio.Queue[Delta | BaseException | None] = asyncio.Queue()
    tasks = [asyncio.create_task(_forward(answer, news.put_nowait)) for answer in answers]
    try:
        yield _read(news, len(answers))
    finally:
        for answer in answers:
            answer.handle.cancel()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _forward(answer: Running, put: Callable[[Delta | BaseException | None], None]) -> None:
    try:
        async for delta in answer.deltas():
            put(delta)
        put(None)
    except Exception as fault:
        put(fault)


async def _read(news: asyncio.Queue[Delta | BaseException | None], running: int) -> AsyncIterator[Delta]:
    while running:
        found = await news.get()
        if isinstance(found, BaseException):
            raise found
        if found is None:
            running -= 1
        else:
            yield found
