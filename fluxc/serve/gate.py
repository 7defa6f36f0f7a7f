"""How many answers run and wait, and who is turned away."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

from fluxc.serve.errors import ApiError, draining, overloaded

LONGEST_WAIT = 60
_SMOOTHING = 0.1


class Gate:
    """Lets in up to `capacity` answers at a time, of which `batch` are computed together. Used by one event loop."""

    def __init__(self, capacity: int, batch: int) -> None:
        self.capacity, self.batch = capacity, batch
        self.inside = 0
        self.draining = False
        self._seconds = 1.0

    @property
    def retry_after(self) -> int:
        """Seconds after which there will probably be room: what waits now, at the pace of the last answers."""
        waiting = max(self.inside - self.batch, 1)
        return min(max(math.ceil(waiting * self._seconds / self.batch), 1), LONGEST_WAIT)

    @contextmanager
    def room(self, answers: int) -> Iterator[None]:
        """Room for that many answers; raises ApiError: 503 draining, 429 full, 400 for more than ever fit."""
        self.check(answers)
        self.inside += answers
        try:
            yield
        finally:
            self.inside -= answers

    def check(self, answers: int) -> None:
        """Raise what `room` would raise."""
        if self.draining:
            raise draining()
        if answers > self.capacity:
            raise ApiError(400, f"{answers} answers at a time are more than this server's {self.capacity}", param="n")
        if self.inside + answers > self.capacity:
            raise overloaded(self.retry_after)

    def took(self, seconds: float) -> None:
        """Take note of how long an answer was computed."""
        self._seconds += _SMOOTHING * (seconds - self._seconds)
