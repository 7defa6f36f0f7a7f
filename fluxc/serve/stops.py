"""Stop strings: the answer ends before the first of them, whose text the client never sees."""

from __future__ import annotations

from collections.abc import Sequence


class StopWatch:
    """Lets text through as far as no stop string can begin in it any more. `hit`: one of them appeared."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.hit = False

    def add(self, text: str) -> str:
        """What of the text so far can be handed out, beyond what was."""
        if self.hit:
            return ""
        self._held += text
        found = [at for at in (self._held.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.hit = True
            return self._take(min(found))
        return self._take(len(self._held) - self._begun())

    def rest(self) -> str:
        """What was held back, once no more text comes."""
        return "" if self.hit else self._take(len(self._held))

    def _begun(self) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        ends = (self._held[-count:] for count in range(min(longest, len(self._held)), 0, -1))
        return next((len(end) for end in ends if any(stop.startswith(end) for stop in self._stops)), 0)

    def _take(self, count: int) -> str:
        taken, self._held = self._held[:count], self._held[count:]
        return taken
