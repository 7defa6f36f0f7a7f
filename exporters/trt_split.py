"""The host's choice between an engine with all layers full and one with all sparse. Imports neither torch nor numpy."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

Prefill = Callable[[bool], dict[str, Any]]


def choose(prefill: Prefill, route_bias: Any) -> dict[str, Any]:
    """Results of `prefill(all full?)` for a request; `routes` in them are all True or all False.

    Forced routes are obeyed. Else the routers vote, as they score in the sparse run: every layer runs full where at
    least half of them ask for it, and the prompt is then computed a second time.
    """
    forced = _forced(route_bias)
    if forced is not None:
        return _uniform(prefill(forced), forced)
    found = prefill(False)
    wanted = [score + bias > 0 for score, bias in zip(_flat(found["scores"]), _flat(route_bias), strict=True)]
    full = sum(wanted) * 2 >= len(wanted)
    return _uniform(prefill(True) if full else found, full)


@dataclasses.dataclass(frozen=True)
class SplitPhases:
    """`parity.Phases` of two prefills and one decode."""

    full: Any
    sparse: Any

    def prefill(self, input_ids: Any, route_bias: Any, logits_at: Any, *rest: Any) -> dict[str, Any]:
        """See `parity.Phases.prefill`."""
        return choose(lambda full: self._of(full).prefill(input_ids, route_bias, logits_at, *rest), route_bias)

    def decode(self, *args: Any) -> Any:
        """See `parity.Phases.decode`."""
        return self.sparse.decode(*args)

    def close(self, phase: str) -> None:
        """See `parity.Phases.close`."""
        for each in (self.full, self.sparse):
            each.close(phase)

    def _of(self, full: bool) -> Any:
        return self.full if full else self.sparse


@dataclasses.dataclass(frozen=True)
class SplitSessions(SplitPhases):
    """The same of `OnnxSessions`, whose arguments stand in another order."""

    def prefill(self, input_ids: Any, prompt_lens: Any, route_bias: Any, logits_at: Any) -> dict[str, Any]:  # type: ignore[override]
        """See `OnnxSessions.prefill`."""
        return choose(lambda full: self._of(full).prefill(input_ids, prompt_lens, route_bias, logits_at), route_bias)


def _uniform(found: dict[str, Any], full: bool) -> dict[str, Any]:
    return {**found, "routes": found["routes"] | True if full else found["routes"] & False}


def _forced(route_bias: Any) -> bool | None:
    values = set(_flat(route_bias))
    return None if len(values) != 1 else {math.inf: True, -math.inf: False}.get(values.pop())


def _flat(values: Any) -> list[float]:
    return [float(value) for value in values.reshape(-1)]
