"""Undoing the repetition of key and value heads (grouped-query attention), proven by evaluation."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from fluxc.ir.attention_product import BHSD, Operand
from fluxc.ir.evaluate import Evaluator, NotEvaluableError
from fluxc.ir.graph import Draft, is_call
from fluxc.ir.roles import Roles

aten = torch.ops.aten
# Ops that only move or copy values.
_MOVES = (
    aten.slice, aten.unsqueeze, aten.squeeze, aten.expand, aten.reshape, aten.view, aten._unsafe_view, aten.contiguous,
    aten.clone, aten.transpose, aten.permute, aten.repeat_interleave, aten.repeat, aten.flatten, aten.unflatten,
    aten.numpy_T, aten.mT, aten.t, aten.swapaxes,
)  # fmt: skip
_SOURCE_AXES = (BHSD, "bshd")
_BATCH, _LENGTH = 2, 3


def unrepeated(draft: Draft, roles: Roles, operand: Operand) -> Operand:
    """The keys or values with the fewest heads that `operand` is a repetition of; itself if it is none.

    Head h of the operand is head h // n of the result, n the number of repetitions, which is checked on numbers.
    """
    best = operand
    for node in _moved(operand.node)[1:]:
        for axes in _SOURCE_AXES:
            found = Operand(node, axes)
            if _rank(found) < _rank(best) and _repeats(draft, roles, found, operand):
                best = found
    return best


def heads(operand: Operand) -> int:
    """Number of heads."""
    return operand.node.meta["val"].shape[operand.axes.index("h")]


def _rank(operand: Operand) -> tuple[int, bool]:
    """Fewer heads are better, then an order of axes that needs no transpose."""
    size = heads(operand) if operand.node.meta["val"].dim() == 4 else None
    return (size if isinstance(size, int) else 2**31, operand.axes != BHSD)


def _moved(node: Node) -> list[Node]:
    """`node` and what it was made from by moving values only."""
    chain = [node]
    while any(is_call(chain[-1], op) for op in _MOVES):
        chain.append(chain[-1].args[0])  # type: ignore[arg-type]
    return chain


def _repeats(draft: Draft, roles: Roles, source: Operand, target: Operand) -> bool:
    """Whether target == source with each head repeated, on a tensor whose values are all different."""
    sizes = roles.sizes(_BATCH, _LENGTH)
    try:
        shape = Evaluator(draft, sizes).shape(source.node)
        values = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
        result = Evaluator(draft, sizes, {source.node: values})(target.node)
    except (NotEvaluableError, RuntimeError, TypeError):
        return False
    few, many = _ordered(values, source.axes), _ordered(result, target.axes)
    if few.shape[:1] + few.shape[2:] != many.shape[:1] + many.shape[2:] or many.shape[1] % few.shape[1]:
        return False
    return torch.equal(few.repeat_interleave(many.shape[1] // few.shape[1], 1), many)


def _ordered(tensor: Tensor, axes: str) -> Tensor:
    return tensor.permute([axes.index(axis) for axis in BHSD])
