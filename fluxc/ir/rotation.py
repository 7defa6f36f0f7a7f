"""Finding rotate-half RoPE: the one form that the fused op computes. `rope.py` finds queries before any form of it."""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import torch
from torch.fx import Node

from fluxc.ir.nodes import is_call
from fluxc.ir.norms import factors, uncast

aten = torch.ops.aten
_END = 2**62  # slices to the end of an axis have a larger one


@dataclasses.dataclass(frozen=True)
class Rotation:
    """`x` [B,H,S,D] whose first R columns turn by cos and sin, [B,1,S,R] or [B,S,R] before an unsqueeze."""

    x: Node
    cos: Node
    sin: Node


def rotation_of(node: Node) -> Rotation | None:
    """The rotation that ends at `node`, of all columns or of the first ones; None for any other node.

    add(mul(%x, %cos), mul(cat([neg(%x[R/2:]), %x[:R/2]], -1), %sin)), then cat with the columns that stay
    """
    parts: Any = node.args[0] if is_call(node, aten.cat) and _is_last(node, 1) else ()
    if len(parts) == 2:
        return _partial(_whole(parts[0]), columns_of(parts[1]))
    return _whole(node)


def is_same(one: Any, other: Any) -> bool:
    """Whether two values are one node, or calls of one op with the same arguments."""
    if not isinstance(one, Node) or not isinstance(other, Node):
        if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
            return len(one) == len(other) and all(map(is_same, one, other))
        return type(one) is type(other) and bool(one == other)
    if one is other or one.op != "call_function":
        return one is other
    return one.target is other.target and one.kwargs == other.kwargs and is_same(one.args, other.args)


def columns_of(node: Node) -> tuple[Node, int, int] | None:
    """(x, first, end) where `node` is columns first to end of x; None for any other node."""
    if is_call(node, aten.slice) and len(node.args) == 4 and _is_last(node, 1):
        x, _, first, end = node.args
        return x, int(first), min(int(end), _width(x))  # type: ignore[return-value, arg-type]
    if node.target is not operator.getitem:
        return None
    parts: Any = node.args[0]
    if not any(is_call(parts, op) for op in (aten.chunk, aten.split, aten.split_with_sizes)) or not _is_last(parts, 2):
        return None
    index: Any = node.args[1]
    sizes = [int(part.shape[-1]) for part in parts.meta["val"]]
    first = sum(sizes[:index])
    return parts.args[0], first, first + sizes[index]


def _whole(node: Node) -> Rotation | None:
    if not is_call(node, aten.add.Tensor) or node.kwargs or not all(isinstance(arg, Node) for arg in node.args):
        return None
    one, other = node.args
    for straight, crossed in ((one, other), (other, one)):
        for half, sin in factors(crossed):  # type: ignore[arg-type]
            x = _half_turned(half)
            cos = [factor for value, factor in factors(straight) if x and is_same(value, x)]  # type: ignore[arg-type]
            if x and cos:
                return Rotation(x, cos[0], sin)
    return None


def _half_turned(node: Node) -> Node | None:
    """x where `node` is cat([-x[R/2:], x[:R/2]], -1)."""
    parts: Any = node.args[0] if is_call(node, aten.cat) and _is_last(node, 1) else ()
    if len(parts) != 2 or not is_call(parts[0], aten.neg):
        return None
    upper, lower = columns_of(parts[0].args[0]), columns_of(parts[1])
    if not upper or not lower or not is_same(upper[0], lower[0]):
        return None
    width = _width(lower[0])
    return lower[0] if (lower[1:], upper[1:]) == ((0, width // 2), (width // 2, width)) else None


def _partial(turned: Rotation | None, rest: tuple[Node, int, int] | None) -> Rotation | None:
    """The rotation of the columns before `rest`, as one of the value that both are columns of."""
    if turned is None or rest is None:
        return None
    part = (turned.x, 0, _width(turned.x)) if is_same(turned.x, rest[0]) else columns_of(turned.x)
    if part is None or not is_same(part[0], rest[0]):
        return None
    is_all = part[1] == 0 and part[2] == rest[1] and rest[2] == _width(rest[0])
    return Rotation(part[0], turned.cos, turned.sin) if is_all else None


def _is_last(node: Node, at: int) -> bool:
    """Whether the axis of a call, its argument `at`, is the last one."""
    value: Any = node.meta["val"]
    rank = (value[0] if isinstance(value, (list, tuple)) else value).dim()
    return len(node.args) > at and node.args[at] in (-1, rank - 1)


def _width(node: Any) -> int:
    return int(node.meta["val"].shape[-1])


def table_of(node: Node) -> Node:
    """The table [B,S,R] that `node` [B,1,S,R] is made of by an unsqueeze, `node` itself where there is none."""
    source = uncast(node) if uncast(node).meta["val"].dtype == node.meta["val"].dtype else node
    is_unsqueezed = is_call(source, aten.unsqueeze) and source.args[1] in (1, -3)
    return source.args[0] if is_unsqueezed else source  # type: ignore[return-value]
