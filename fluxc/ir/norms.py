"""Finding RMS norms, as one op or as the arithmetic that models write them in."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fluxc.ir.nodes import is_call

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class RmsNorm:
    """`node` is RMSNorm of `x` over its last axis, rounded to x's dtype and then multiplied by `weight`."""

    node: Node
    x: Node
    weight: Node
    eps: float

    @property
    def refusal(self) -> str | None:
        """Why an op that multiplies by a weight [W] of x's dtype cannot compute this norm, or None if it can."""
        wide, weight = _val(self.x), _val(self.weight)
        if self.weight.op != "placeholder":
            return f"the norm's weight is computed, by {self.weight.name}"
        if weight.dtype != wide.dtype or _val(self.node).dtype != wide.dtype:
            return f"the norm is multiplied in another dtype than {wide.dtype}"
        return None if weight.shape == wide.shape[-1:] else "the norm's weight is no row"


def rms_norm_of(node: Node) -> RmsNorm | None:
    """The RMS norm that ends at `node`, None for any other node.

    Sums in fp32 at least; what is multiplied by a weight of x's dtype was rounded to that dtype before.
    """
    if is_call(node, aten.rms_norm):
        return _as_op(node)
    for weight, normed in factors(node):
        found = _scaled(uncast(normed)) if _val(weight).dim() == 1 else None
        if found:
            return RmsNorm(node, found[0], weight, found[1]) if _is_rounded(found[0], normed, weight) else None
    return None


def factors(node: Node) -> list[tuple[Node, Node]]:
    """Both orders of the two values that `node` multiplies; [] for other nodes."""
    values = node.args[:2] if is_call(node, aten.mul.Tensor) else ()
    if len(values) < 2 or not all(isinstance(v, Node) and isinstance(_val(v), Tensor) for v in values):
        return []
    first, second = values
    return [(first, second), (second, first)]  # type: ignore[list-item]


def uncast(node: Node) -> Node:
    """What `node` casts, `node` itself where it is no cast."""
    is_cast = is_call(node, aten.to) or is_call(node, aten.type_as) or is_call(node, aten._to_copy)
    return node.args[0] if is_cast else node  # type: ignore[return-value]


def _as_op(node: Node) -> RmsNorm | None:
    x, sizes, *rest = (*node.args, None, None)[:4]
    weight, eps = rest
    if not isinstance(weight, Node) or not isinstance(eps, float) or len(sizes) != 1:  # type: ignore[arg-type]
        return None
    return RmsNorm(node, x, weight, eps)  # type: ignore[arg-type]


def _scaled(node: Node) -> tuple[Node, float] | None:
    """(x, eps) where `node` is x * rsqrt(mean(x^2) + eps), x widened."""
    for wide, factor in factors(node):
        eps = _eps(factor, wide)
        if eps is not None and _val(wide).dtype in (torch.float32, torch.float64):
            return uncast(wide), eps
    return None


def _eps(factor: Node, wide: Node) -> float | None:
    total: Any = factor.args[0] if is_call(factor, aten.rsqrt) else None
    if not is_call(total, aten.add) or not isinstance(total.args[1], (int, float)):
        return None
    mean: Any = total.args[0]
    is_mean = is_call(mean, aten.mean.dim) and list(mean.args[1]) == [-1] and mean.args[2:] == (True,)
    return float(total.args[1]) if is_mean and _is_square(mean.args[0], wide) else None


def _is_square(node: Any, x: Node) -> bool:
    if is_call(node, aten.pow.Tensor_Scalar):
        return node.args == (x, 2)
    return (is_call(node, aten.square) or is_call(node, aten.mul.Tensor)) and all(arg is x for arg in node.args)


def _is_rounded(x: Node, normed: Node, weight: Node) -> bool:
    """Whether a weight of x's dtype meets a norm of that dtype; other weights are for `refusal` to tell."""
    return _val(weight).dtype != _val(x).dtype or _val(normed).dtype == _val(x).dtype


def _val(node: Node) -> Any:
    return node.meta.get("val")
