"""Making a symbolic size of a program a constant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from fluxc.ir.graph import Draft


def fix_size(draft: Draft, node: Node, axis: int, size: int) -> None:
    """Make the size of an input's axis a constant: in all inputs, all values computed from them, and the ranges."""
    symbol = node.meta["val"].shape[axis]
    if not isinstance(symbol, torch.SymInt):
        return
    expr = symbol.node.expr
    draft.range_constraints.pop(expr, None)
    for placeholder in draft.placeholders():
        placeholder.meta["val"] = _with_size(draft, placeholder.meta["val"], expr, size)
    values = [placeholder.meta["val"] for placeholder in draft.placeholders()]
    draft.module.recompile()
    FakeTensorProp(draft.module, draft.fake_mode).propagate_dont_convert_inputs(*values)
    _inline_constant_sizes(draft)


def _with_size(draft: Draft, val: Any, expr: Any, size: int) -> Any:
    if not isinstance(val, torch.Tensor) or all(_expr(dim) != expr for dim in val.shape):
        return val
    shape = [size if _expr(dim) == expr else dim for dim in val.shape]
    with draft.fake_mode:
        return torch.empty(shape, dtype=val.dtype, device=val.device)


def _inline_constant_sizes(draft: Draft) -> None:
    for node in list(draft.graph.nodes):
        if node.op == "call_function" and isinstance(node.meta.get("val"), int):
            for user in list(node.users):
                user.args, user.kwargs = map_arg((user.args, user.kwargs), _constant_of(node))
            draft.graph.erase_node(node)


def _constant_of(size: Node) -> Callable[[Node], Any]:
    return lambda node: size.meta["val"] if node is size else node


def _expr(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size
