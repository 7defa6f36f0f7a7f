"""Making a symbolic size of a program a constant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from fluxc.ir.graph import Draft


def fix_size(draft: Draft, node: Node, axis: int, size: int) -> None:
    """Make the size of an input's axis a constant: in all inputs, all values computed from them, and the ranges."""
    symbol = node.meta["val"].shape[axis]
    if not isinstance(symbol, torch.SymInt):
        return
    expr = symbol.node.expr
    draft.range_constraints.pop(expr, None)
    fixed = _Fixed(draft.fake_mode, expr, size)
    for other in draft.graph.nodes:
        if "val" in other.meta:
            other.meta["val"] = pytree.tree_map(fixed.value, other.meta["val"])
    _inline_constant_sizes(draft)


class _Fixed:
    """Puts a number for a symbol in fake values; a value without the symbol stays the object it is."""

    def __init__(self, fake_mode: Any, symbol: Any, size: int) -> None:
        self._fake_mode, self._symbol, self._size = fake_mode, symbol, size

    def value(self, val: Any) -> Any:
        if isinstance(val, torch.SymInt):
            return self._integer(val)
        if not isinstance(val, torch.Tensor) or not any(map(self._varies, (*val.shape, *val.stride()))):
            return val
        shape, stride = map(self._integer, val.shape), map(self._integer, val.stride())
        with self._fake_mode:
            return torch.empty_strided(tuple(shape), tuple(stride), dtype=val.dtype, device=val.device)

    def _varies(self, size: Any) -> bool:
        return isinstance(size, torch.SymInt) and self._symbol in size.node.expr.free_symbols

    def _integer(self, size: Any) -> Any:
        if not self._varies(size):
            return size
        expr = size.node.expr.subs(self._symbol, self._size)
        return int(expr) if expr.is_number else self._fake_mode.shape_env.create_symintnode(expr, hint=None)


def _inline_constant_sizes(draft: Draft) -> None:
    for node in list(draft.graph.nodes):
        if node.op == "call_function" and isinstance(node.meta.get("val"), int):
            for user in list(node.users):
                user.args, user.kwargs = map_arg((user.args, user.kwargs), _constant_of(node))
            draft.graph.erase_node(node)


def _constant_of(size: Node) -> Callable[[Node], Any]:
    return lambda node: size.meta["val"] if node is size else node
