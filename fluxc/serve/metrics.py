"""What Prometheus is told at `/metrics`."""

from __future__ import annotations

import asyncio
import collections
import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from fluxc.engine.engine import Engine
from fluxc.engine.result import Generation

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
SHARES = tuple(share / 10 for share in range(11))
PACE_SECONDS = 10.0


class Metrics:
    """Counters of one server, in a registry of their own; gauges ask the engine when they are read."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._requests = self._counter("requests", "HTTP requests by path and status", "path", "status")
        self._answers = self._counter("answers", "Answers by how they ended", "finish")
        self._tokens = self._counter("tokens", "Tokens of prompts and of answers", "kind")
        self._dense = self._counter("crossover_dense", "Prompts below the crossover, which ran dense")
        self._first = self._histogram("time_to_first_token_seconds", "From submission to the first token", SECONDS)
        self._each = self._histogram("time_per_token_seconds", "Mean time of an answer's further tokens", SECONDS)
        self._ratio = self._histogram("sparse_ratio", "Share of an answer's layers on sparse attention", SHARES)
        self._pace = Pace()
        self._gauges(engine)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"fluxc_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"fluxc_{name}", text, buckets=buckets, registry=self.registry)

    def _gauges(self, engine: Engine) -> None:
        values = {
            "running": ("Answers being computed", lambda: engine.status.running),
            "queue": ("Answers that wait", lambda: engine.status.waiting),
            "kv_used_bytes": ("KV memory in use, kept conversations included", lambda: engine.status.kv_used),
            "kv_kept_bytes": ("KV memory of kept conversations", lambda: engine.status.kv_kept),
            "kv_free_bytes": ("KV memory that is free", lambda: engine.status.kv_free),
            "tokens_per_second": ("Tokens of answers in the last seconds", self._pace.per_second),
            "crossover_tokens": ("Prompts below this length run dense", lambda: engine.crossover(engine.plan.budget)),
            "tasks": ("Tasks of the event loop", lambda: len(asyncio.all_tasks())),
        }
        for name, (text, value) in values.items():
            Gauge(f"fluxc_{name}", text, registry=self.registry).set_function(value)

    def request(self, path: str, status: int) -> None:
        """A request was answered."""
        self._requests.labels(path, str(status)).inc()

    def token(self) -> None:
        """A token was handed out."""
        self._tokens.labels("answer").inc()
        self._pace.add()

    def ended(self, finish: str) -> None:
        """An answer ended: stop, length, cancelled or failed."""
        self._answers.labels(finish).inc()

    def answered(self, result: Generation) -> None:
        """What an answer took."""
        self._tokens.labels("prompt").inc(result.prompt_tokens)
        self._first.observe(result.timings.first_token)
        self._ratio.observe(result.sparse_ratio)
        if result.timings.per_token:
            self._each.observe(result.timings.decode / len(result.timings.per_token))
        if result.scores is None:
            self._dense.inc()

    def text(self) -> bytes:
        """The page."""
        return generate_latest(self.registry)


class Pace:
    """Tokens a second over the last PACE_SECONDS, counted by the second."""

    def __init__(self) -> None:
        self._counts: collections.deque[list[float]] = collections.deque()

    def add(self) -> None:
        """One more token, now."""
        now = time.monotonic()
        if self._counts and now - self._counts[-1][0] < 1:
            self._counts[-1][1] += 1
        else:
            self._counts.append([now, 1])
        self._forget(now)

    def per_second(self) -> float:
        """The mean over the window."""
        self._forget(time.monotonic())
        return sum(count for _, count in self._counts) / PACE_SECONDS

    def _forget(self, now: float) -> None:
        while self._counts and now - self._counts[0][0] > PACE_SECONDS:
            self._counts.popleft()
