"""Clients of a load: so many at a time, or arrivals that wait for nobody; what each saw, and when."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import httpx

from fluxc.bench.load_requests import CHAT, Ask

PATIENCE = 600.0
_RETRIED = 429
_PIECE = 0.2
"""Seconds that stand for a piece where a client leaves an answer that comes whole."""


@dataclasses.dataclass
class Seen:
    """What one client saw. `status` 0: no answer; seconds from sending; `error`: the message of an error."""

    ask: Ask
    status: int = 0
    text: str = ""
    error: str = ""
    finish: str | None = None
    first: float | None = None
    total: float = 0.0
    tokens: int = 0
    sparse_ratio: float | None = None
    prompt_tokens: int = 0
    retries: int = 0

    @property
    def per_token(self) -> float | None:
        """Mean seconds of the tokens after the first."""
        return None if self.first is None or self.tokens < 2 else (self.total - self.first) / (self.tokens - 1)


class Load:
    """Sends requests to a server at `url`."""

    def __init__(self, url: str, advance: Callable[[], None] = lambda: None) -> None:
        self._url, self._advance = url, advance

    async def closed(self, asks: Sequence[Ask], clients: int) -> list[Seen]:
        """`clients` of them at a time, each with its next request as soon as the last one is answered."""
        waiting, seen = list(reversed(asks)), []

        async def work(client: httpx.AsyncClient) -> None:
            while waiting:
                seen.append(await self.send(client, waiting.pop()))
                self._advance()

        async with self._client() as client:
            await asyncio.gather(*(work(client) for _ in range(clients)))
        return seen

    async def opened(self, asks: Sequence[Ask], rate: float, seed: int = 0) -> list[Seen]:
        """Arrivals at `rate` a second on average (Poisson), whether or not the server keeps up."""
        draw, tasks = random.Random(seed), []

        async def one(client: httpx.AsyncClient, ask: Ask) -> Seen:
            found = await self.send(client, ask)
            self._advance()
            return found

        async with self._client() as client:
            for ask in asks:
                tasks.append(asyncio.create_task(one(client, ask)))
                await asyncio.sleep(draw.expovariate(rate))
            return list(await asyncio.gather(*tasks))

    def _client(self) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        return httpx.AsyncClient(base_url=self._url, timeout=PATIENCE, limits=limits)

    async def send(self, client: httpx.AsyncClient, ask: Ask) -> Seen:
        """One request to its end; a full queue is asked again when it said so."""
        seen, start = Seen(ask), time.perf_counter()
        while True:
            wait = await self._attempt(client, seen, start)
            seen.total = time.perf_counter() - start
            if wait is None:
                return seen
            seen.retries += 1
            await asyncio.sleep(wait)

    async def _attempt(self, client: httpx.AsyncClient, seen: Seen, start: float) -> float | None:
        """Seconds to wait before another attempt, None where there is to be none."""
        content = seen.ask.content if isinstance(seen.ask.content, bytes) else json.dumps(seen.ask.content).encode()
        headers = {"content-type": "application/json"}
        leaves = seen.ask.kind == "cancel" and not seen.ask.streams
        try:
            async with (
                asyncio.timeout(_PIECE * (1 + seen.ask.after) if leaves else None),
                client.stream("POST", seen.ask.path, content=content, headers=headers) as response,
            ):
                seen.status = response.status_code
                if response.status_code == _RETRIED and seen.ask.kind != "malformed":
                    return float(response.headers.get("retry-after", 1))
                await _read(response, seen, start)
        except TimeoutError:
            seen.error = "left"
        except httpx.HTTPError as fault:
            seen.status, seen.error = 0, f"{type(fault).__name__}: {fault}"
        return None


async def _read(response: httpx.Response, seen: Seen, start: float) -> None:
    if seen.status == 200 and seen.ask.streams:
        await _read_events(response, seen, start)
    else:
        _read_whole(json.loads(await response.aread()), seen, start)


async def _read_events(response: httpx.Response, seen: Seen, start: float) -> None:
    pieces = 0
    async for line in response.aiter_lines():
        if not line.startswith("data: ") or line == "data: [DONE]":
            continue
        if seen.ask.kind == "cancel" and pieces >= seen.ask.after:
            return
        value = json.loads(line.removeprefix("data: "))
        if "error" in value:
            seen.status, seen.error = 0, value["error"]["message"]
            return
        pieces += _take(value, seen, start)


def _take(value: dict[str, Any], seen: Seen, start: float) -> int:
    """One event; 1 where it brought text."""
    choice = value["choices"][0]
    text = choice["delta"].get("content") or "" if seen.ask.path == CHAT else choice["text"]
    seen.text += text
    if text and seen.first is None:
        seen.first = time.perf_counter() - start
    seen.tokens += 1 if text else 0
    seen.finish = choice["finish_reason"] or seen.finish
    seen.sparse_ratio = value.get("fluxc", {}).get("sparse_ratio", seen.sparse_ratio)
    return 1 if text else 0


def _read_whole(value: dict[str, Any], seen: Seen, start: float) -> None:
    if "error" in value:
        seen.error = value["error"]["message"]
        return
    choice = value["choices"][0]
    seen.text = choice["message"]["content"] if seen.ask.path == CHAT else choice["text"]
    seen.finish, seen.tokens = choice["finish_reason"], value["usage"]["completion_tokens"]
    seen.sparse_ratio, seen.prompt_tokens = value["fluxc"]["sparse_ratio"], value["usage"]["prompt_tokens"]
