"""Fake values again after an edit changed a shape or a layout somewhere above."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.fx import Node
from torch.utils import _pytree as pytree

from fluxc.ir.graph import Draft


def renew(draft: Draft, edited: Iterable[Node]) -> set[Node]:
    """Recompute the values of all that follows `edited`, each way as far as something changes.

    Returns the nodes whose shape or strides changed, `edited` included. An op that cannot take its new arguments
    raises what it raises (RuntimeError, ValueError).
    """
    changed = set(edited)
    for node in draft.graph.nodes:
        if node.op == "call_function" and changed.intersection(node.all_input_nodes):
            before = _layout(node)
            if _layout(draft.refresh(node)) != before:
                changed.add(node)
    return changed


def _layout(node: Node) -> list[Any]:
    vals = pytree.tree_leaves(node.meta.get("val"))
    return [f"{tuple(v.shape)} {v.stride()}" if isinstance(v, torch.Tensor) else str(v) for v in vals]
