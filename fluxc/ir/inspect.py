"""What `fluxc inspect` lists: every attention of a program, its sizes, and what can be routed."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.export.exported_program import ExportedProgram
from torch.fx import Node

from fluxc import kernels
from fluxc.ir.nodes import argument, calls, is_call, module_path
from fluxc.ir.rope import Dependence, query_before_rope

_SETTINGS = ("kind", "sink", "window", "last", "decode_full", "block", "threshold", "full_kind")


@dataclasses.dataclass(frozen=True)
class AttentionRecord:
    """One attention of a program that is in captured, scored or routed form.

    layer: its index in the model; node: its name in the graph; path: where it was traced; heads, kv_heads, head_dim
    and value_dim: sizes; window: its own window in tokens, 0 for none; softcap: 0 for none; sink_logits: whether it
    has them; routed: whether it is `routed_attention` already, then `sparse` holds its settings; routable: whether a
    router may choose for it, else `reason` says why not; query_found: whether the queries before RoPE were found (or
    there is no RoPE), `query` says where.
    """

    layer: int
    node: str
    path: str
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    window: int
    softcap: float
    sink_logits: bool
    routed: bool
    sparse: dict[str, Any] | None
    routable: bool
    reason: str
    query_found: bool
    query: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)


def inspect_program(program: ExportedProgram) -> list[AttentionRecord]:
    """A record for each attention in graph order; [] where the program has none in fluxc's form."""
    kernels.register()
    dependence = Dependence(program.graph)
    attentions = [*calls(program, torch.ops.fluxc.attention), *calls(program, torch.ops.fluxc.routed_attention)]
    return [_record(node, dependence) for node in sorted(attentions, key=dependence.order.__getitem__)]


def _record(node: Node, dependence: Dependence) -> AttentionRecord:
    q, k, v = (argument(node, name).meta["val"] for name in "qkv")
    routed = is_call(node, torch.ops.fluxc.routed_attention)
    window = 0 if routed else argument(node, "window")
    query = query_before_rope(node, dependence)
    return AttentionRecord(
        layer=argument(node, "layer"),
        node=node.name,
        path=module_path(node),
        heads=int(q.shape[1]),
        kv_heads=int(k.shape[1]),
        head_dim=int(q.shape[3]),
        value_dim=int(v.shape[3]),
        window=window,
        softcap=argument(node, "softcap"),
        sink_logits=argument(node, "sink_logits") is not None,
        routed=routed,
        sparse=_sparse(node) if routed else None,
        routable=not window,
        reason=f"has a window of its own, {window} tokens" if window else "",
        query_found=query.found,
        query=query.reason,
    )


def _sparse(node: Node) -> dict[str, Any]:
    return {name: argument(node, name) for name in _SETTINGS}
