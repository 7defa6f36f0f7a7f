"""Small plans and layer shapes for tests of the engine. Only tests import this."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from fluxc.engine.shapes import LayerShape
from fluxc.model_info import AttentionInfo, ModelInfo
from fluxc.plan import CurvePoint, LayerPlan, Plan

HEADS = 2
KV_HEADS = 1
HEAD_DIM = 4
CONTEXT = 512
Ring = tuple[int, int]


def toy_plan(
    rings: Sequence[Ring | int],
    decode: Literal["sparse", "full"] = "sparse",
    context: int = CONTEXT,
    **changes: Any,
) -> Plan:
    """A plan with one attention an item: (sink, window) of a routable one, or an int, a window of its own."""
    windows = [0 if isinstance(ring, tuple) else ring for ring in rings]
    attentions = tuple(
        AttentionInfo(i, HEADS, KV_HEADS, HEAD_DIM, HEAD_DIM, window) for i, window in enumerate(windows)
    )
    info = ModelInfo("toy", context, "float32", "ab" * 32, attentions)
    layers = tuple(LayerPlan(i, "streaming", *ring) for i, ring in enumerate(rings) if isinstance(ring, tuple))
    curve = tuple(CurvePoint(at, (bias,) * len(layers)) for at, bias in ((0.01, -20.0), (0.99, 20.0)))
    values: dict[str, Any] = {"budget": 0.5, **changes}
    return Plan(info, 4, decode, layers, curve, **values)


def shapes_of(plan: Plan) -> tuple[LayerShape, ...]:
    """The layers a program of the plan's model says it has."""
    rows = {layer.layer: row for row, layer in enumerate(plan.layers)}
    return tuple(
        LayerShape(a.layer, a.routable, rows.get(a.layer), a.kv_heads, a.key_dim, a.window)
        for a in plan.model.attentions
    )
