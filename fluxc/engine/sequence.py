"""The tokens of one request or conversation, and how many of them stand in the cache."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from fluxc.engine.geometry import Geometry
from fluxc.engine.pool import Holding


@dataclasses.dataclass(eq=False)
class TokenSequence:
    """Tokens under one set of routes.

    `tokens`: all known ones. `prompt`: how many of them chose the routes. `bias`: route_bias, one a routable layer.
    `dense`: the prompt runs the program without routers. routes bool[L] and scores f32[L] (None where no router ran)
    are the host's, known once the prompt was computed. `cached`: tokens whose keys and values stand in the pages of
    `holding`; 0 also where the pages were given up and everything has to be computed again. `peak`: most bytes of KV at
    a time, those of a layer in transit included.
    """

    tokens: list[int]
    prompt: int
    bias: list[float]
    dense: bool
    holding: Holding | None = None
    geometry: Geometry | None = None
    routes: Any = None
    scores: Any = None
    cached: int = 0
    peak: int = 0

    @property
    def pending(self) -> int:
        """Tokens that are not in the cache yet."""
        return len(self.tokens) - self.cached

    @property
    def decodable(self) -> bool:
        """Whether one decode step is all that is left to do."""
        return self.cached > 0 and self.pending == 1

    def settle(self, routes: Any, scores: Any, geometry: Geometry) -> None:
        """Keep the routes that the prompt chose; a later prefill of the same tokens is forced to them."""
        self.geometry = geometry
        if self.routes is None:
            self.routes, self.scores = routes, scores
            self.bias = [math.inf if route else -math.inf for route in self.routes.tolist()]

    def route_bias(self) -> np.ndarray:
        """f32[L,1]."""
        return np.array(self.bias, np.float32)[:, None]
