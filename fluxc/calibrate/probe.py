"""Watching a routed program while it runs: pooled queries, and the first-order need of every layer.

The need of a layer on a prompt is `<dL/do, SA - FA>`: to first order, what the loss on the answer gains when the
layer's attention output o goes from full to sparse. It is taken at the dense point, half-way and at the all-sparse
point, and averaged: one forward and one backward each, for all layers at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from fluxc.ir.graph import graph_modules, is_call


@dataclasses.dataclass
class Recording:
    """What one run left behind, by the `layer` attribute of the attention: need in nats, pooled queries fp32 [B,D]."""

    needs: dict[int, float] = dataclasses.field(default_factory=dict)
    pooled: list[Tensor] = dataclasses.field(default_factory=list)


def watch(module: torch.nn.Module, recording: Recording, alpha: float | None) -> None:
    """Rewire a private copy of a routed program so that running it fills `recording`.

    With `alpha` None the program runs as it is and only pooled queries are recorded. Else every routable attention
    returns FA + alpha * (SA - FA), whatever its route, and backward records its need.
    """
    attention = None if alpha is None else _mixed_attention(recording, alpha)
    pool = _recording_pool(recording)
    for gm in [child for child in module.modules() if isinstance(child, GraphModule)]:
        _rewire(gm, torch.ops.fluxc.router_pool, pool)
        if attention:
            _rewire(gm, torch.ops.fluxc.routed_attention, attention)


def _rewire(module: GraphModule, target: Any, replacement: Callable[..., Tensor]) -> None:
    changed = False
    for gm in graph_modules(module):
        for node in gm.graph.nodes:
            if is_call(node, target):
                node.target = replacement
                changed = True
        if changed:
            gm.recompile()


def _recording_pool(recording: Recording) -> Callable[..., Tensor]:
    def router_pool(q: Tensor, prompt_lens: Tensor, **sizes: Any) -> Tensor:
        pooled = torch.ops.fluxc.router_pool(q.detach(), prompt_lens, **sizes)
        recording.pooled.append(pooled.float().cpu())
        return pooled

    return router_pool


def _mixed_attention(recording: Recording, alpha: float) -> Callable[..., Tensor]:
    def mixed_attention(q: Tensor, k: Tensor, v: Tensor, route: Tensor, prompt_lens: Tensor, **attrs: Any) -> Tensor:
        def branch(full: bool) -> Tensor:
            return torch.ops.fluxc.routed_attention(q, k, v, torch.full_like(route, full), prompt_lens, **attrs)

        if not torch.is_grad_enabled():
            return _mixed(branch, alpha)
        out, step = _mix(branch, alpha)
        if not out.requires_grad:
            out = out.detach().requires_grad_()
        out.register_hook(lambda grad: recording.needs.__setitem__(attrs["layer"], _dot(grad, step)))
        return out

    return mixed_attention


def _mixed(branch: Callable[[bool], Tensor], alpha: float) -> Tensor:
    if 0.0 < alpha < 1.0:
        return torch.lerp(branch(True), branch(False), alpha)
    return branch(alpha == 0.0)


def _mix(branch: Callable[[bool], Tensor], alpha: float) -> tuple[Tensor, Tensor]:
    """The mixed output, and SA - FA without a graph. At the end points only the branch in use is differentiated."""
    if 0.0 < alpha < 1.0:
        full, sparse = branch(True), branch(False)
        return torch.lerp(full, sparse, alpha), (sparse - full).detach()
    used = branch(alpha == 0.0)
    with torch.no_grad():
        other = branch(alpha == 1.0)
    return used, (other - used.detach()) if alpha == 0.0 else (used.detach() - other)


def _dot(grad: Tensor, step: Tensor) -> float:
    return float((grad.double() * step.double()).sum())
