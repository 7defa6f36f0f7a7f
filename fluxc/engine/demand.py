"""How many pages a request may need, before and after its routes are known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from fluxc.engine.geometry import Geometry
from fluxc.engine.shapes import LayerShape
from fluxc.kernels.schemas import PAGE
from fluxc.plan import Plan

if TYPE_CHECKING:
    import numpy as np
    import torch

Admission = Literal["worst", "expected"]


def page_bytes(layers: Sequence[LayerShape], dtype: torch.dtype | np.dtype[Any]) -> int:
    """Bytes of one page: keys and values of PAGE tokens of one layer."""
    return 2 * layers[0].kv_heads * PAGE * layers[0].head_dim * dtype.itemsize


def pages(layers: Sequence[LayerShape], plan: Plan, routes: Sequence[bool], tokens: int) -> int:
    """Pages of a request of `tokens` tokens under `routes`."""
    return int(Geometry.of(layers, plan, routes).pages(tokens).sum())


def worst_pages(layers: Sequence[LayerShape], plan: Plan, bias: Sequence[float], tokens: int) -> int:
    """Pages if every layer whose bias does not rule it out is full."""
    return pages(layers, plan, [value != -math.inf for value in bias], tokens)


def expected_pages(
    layers: Sequence[LayerShape], plan: Plan, bias: Sequence[float], tokens: int, full_share: float
) -> int:
    """Pages if `full_share` of the layers that the bias leaves open are full."""
    worst = worst_pages(layers, plan, bias, tokens)
    best = pages(layers, plan, [value == math.inf for value in bias], tokens)
    return best + math.ceil(full_share * (worst - best))
