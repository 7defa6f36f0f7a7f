"""What a program says of its attention layers: all that the KV pool and the scheduler need to know of a model."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class LayerShape:
    """One attention layer. Layers are numbered a = 0..A-1 in graph order, routable ones and others alike.

    `layer`: its index in the model. `routable`: it has a router; `row` is then its row in `route_bias`, `routes` and
    `scores`, else None. `window`: tokens of a window of its own, 0 for none; a layer with one is cached as a ring
    without sink. `kv_heads` and `head_dim` (of keys and of values) are the same in all layers of a program.
    """

    layer: int
    routable: bool
    row: int | None
    kv_heads: int
    head_dim: int
    window: int
