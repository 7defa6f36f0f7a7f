"""The host's choice between an engine with all layers full and one with all sparse. Imports neither torch nor numpy."""

from __future__ import annotations

import dataclasses
import math
from typing import Any


@dataclasses.dataclass(frozen=True)
class SplitPhases:
    """`parity.Phases` of two prefills: forced routes are obeyed; else the routers of the sparse one vote.

    Every layer of a request runs full where at least half of the routers ask for it, and the prompt is then computed a
    second time. A `route_bias` that forces some layers only counts as that many votes.
    """

    full: Any
    sparse: Any

    def prefill(self, input_ids: Any, route_bias: Any, logits_at: Any, *rest: Any) -> dict[str, Any]:
        """See `parity.Phases.prefill`; routes are all True or all False."""
        forced = _forced(route_bias)
        if forced is not None:
            return self._run(forced, input_ids, route_bias, logits_at, *rest)
        found = self._run(False, input_ids, route_bias, logits_at, *rest)
        wanted = [score + bias > 0 for score, bias in zip(_flat(found["scores"]), _flat(route_bias), strict=True)]
        if sum(wanted) * 2 < len(wanted):
            return found
        return self._run(True, input_ids, route_bias, logits_at, *rest)

    def decode(self, *args: Any) -> Any:
        """See `parity.Phases.decode`."""
        return self.sparse.decode(*args)

    def _run(self, full: bool, *inputs: Any) -> dict[str, Any]:
        found: dict[str, Any] = (self.full if full else self.sparse).prefill(*inputs)
        found["routes"] = found["routes"] | True if full else found["routes"] & False
        return found


def _forced(route_bias: Any) -> bool | None:
    values = set(_flat(route_bias))
    return {frozenset((math.inf,)): True, frozenset((-math.inf,)): False}.get(frozenset(values))


def _flat(values: Any) -> list[float]:
    return [float(value) for value in values.reshape(-1)]
