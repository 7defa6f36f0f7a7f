"""How a program is run from compiled pieces: which piece, in which order, on which values. Imports no torch.

    prologue(input_ids, position_ids)                       -> embedding, cos, sin
    layer_00(embedding, cos, sin, ..., route_bias[0])       -> k_0, v_0, route, hidden     weights of layer 0
    layer_00(hidden, cos, sin, ..., route_bias[1])          -> ...                         weights of layer 1
    epilogue(hidden, logits_at, ...)                        -> logits, routes, scores

Layers that are alike are one piece, called with each layer's weights: compile time does not grow with the depth.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from fluxc.errors import ArchiveError

_ROW = re.compile(r"(.+)\[(\d+)\]")


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of `piece`. Values have names; `enters` may say `name[3]`, row 3 of a value.

    `weights`: for each constant of the piece, its name in the engine's weights.
    """

    piece: str
    enters: tuple[str, ...]
    leaves: tuple[str, ...]
    weights: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One program: `inputs` by name, `outputs` from name to value, `calls` in order.

    A prefill also names `route_0`, `route_1`, ... bool[1]: the route of each routable layer, as soon as it is known.
    """

    inputs: tuple[str, ...]
    outputs: Mapping[str, str]
    calls: tuple[Call, ...]

    @property
    def pieces(self) -> tuple[str, ...]:
        """The distinct pieces, in the order they are first called."""
        return tuple(dict.fromkeys(call.piece for call in self.calls))

    def last_uses(self) -> dict[str, int]:
        """The number of the last call that takes each value."""
        last: dict[str, int] = {}
        for number, call in enumerate(self.calls):
            last |= dict.fromkeys((row_of(name)[0] for name in call.enters), number)
        return last

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the manifest."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """The recipe of a manifest; raises ArchiveError where something is missing."""
        try:
            calls = tuple(
                Call(call["piece"], tuple(call["enters"]), tuple(call["leaves"]), dict(call["weights"]))
                for call in values["calls"]
            )
            return cls(tuple(values["inputs"]), dict(values["outputs"]), calls)
        except (KeyError, TypeError, ValueError) as cause:
            raise ArchiveError(f"the manifest describes no AOTI program: {cause!r}") from cause


def row_of(name: str) -> tuple[str, int | None]:
    """`slots[3]` as ("slots", 3), `slots` as ("slots", None)."""
    found = _ROW.fullmatch(name)
    return (found[1], int(found[2])) if found else (name, None)
