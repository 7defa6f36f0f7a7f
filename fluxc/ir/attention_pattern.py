"""Recognising an attention in somebody else's graph: SDPA, or softmax(scale * QK^T + mask)V written out."""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import torch
from torch.fx import Node

from fluxc.ir.attention_product import (
    BHSD,
    CASTS,
    NotThisFormError,
    Operand,
    check_rank,
    is_product,
    op_name,
    product,
    weighted_sum,
)
from fluxc.ir.evaluate import Evaluator, NotEvaluableError, depends_on
from fluxc.ir.graph import Draft, argument, is_call
from fluxc.ir.mask_proof import Mask
from fluxc.ir.roles import Roles

aten = torch.ops.aten
_SDPA = aten.scaled_dot_product_attention
_FLASH_CPU = aten._scaled_dot_product_flash_attention_for_cpu


@dataclasses.dataclass(frozen=True)
class Found:
    """One attention: out = softmax(softcap(scale * q k^T) + masks) v. `out` has axes `out_axes`."""

    out: Node
    q: Operand
    k: Operand
    v: Operand
    scale: float
    softcap: float = 0.0
    masks: tuple[Mask, ...] = ()
    is_causal: bool = False
    out_axes: str = BHSD


def candidates(draft: Draft, roles: Roles) -> list[Node]:
    """Nodes that may be the heart of an attention, in graph order: SDPA calls, and softmaxes over the sequence."""
    return [node for node in draft.graph.nodes if _is_sdpa(node) or _is_row_softmax(node, roles)]


def read_attention(draft: Draft, roles: Roles, heart: Node) -> Found:
    """The attention around `heart`; raises NotThisFormError with the reason."""
    return _read_sdpa(heart) if _is_sdpa(heart) else _read_explicit(draft, roles, heart)


def _is_sdpa(node: Node) -> bool:
    return is_call(node, _SDPA) or is_call(node, _FLASH_CPU)


def _is_row_softmax(node: Node, roles: Roles) -> bool:
    """A softmax along the last axis of something that has the sequence as its last axis."""
    if not (is_call(node, aten.softmax) or is_call(node, aten._softmax)):
        return False
    shape = node.meta["val"].shape
    return len(shape) >= 3 and _is_length(shape[-1], roles)


def _is_length(size: Any, roles: Roles) -> bool:
    return isinstance(size, torch.SymInt) and roles.length in size.node.expr.free_symbols


def _read_sdpa(node: Node) -> Found:
    q, k, v = (argument(node, name) for name in ("query", "key", "value"))
    check_rank(q, k, v)
    if argument(node, "dropout_p"):
        raise NotThisFormError("it has dropout")
    scale, mask = argument(node, "scale"), argument(node, "attn_mask")
    out = node if is_call(node, _SDPA) else _first_result(node)
    return Found(
        out=out,
        q=Operand(q),
        k=Operand(k),
        v=Operand(v),
        scale=float(q.meta["val"].shape[-1] ** -0.5 if scale is None else scale),
        masks=() if mask is None else (Mask(mask),),
        is_causal=bool(argument(node, "is_causal")),
    )


def _first_result(node: Node) -> Node:
    users = [user for user in node.users if user.target is operator.getitem and user.args[1] == 0]
    if len(users) != 1 or len(node.users) != 1:
        raise NotThisFormError("its log-sum-exp is used too")
    return users[0]


def _read_explicit(draft: Draft, roles: Roles, softmax: Node) -> Found:
    if argument(softmax, "dim") not in (-1, softmax.meta["val"].dim() - 1):
        raise NotThisFormError("its softmax is not over the keys")
    scores = _Scores(draft, roles).read(softmax.args[0])  # type: ignore[arg-type]
    q, k = product(scores.product)
    out, v, out_axes = weighted_sum(softmax)
    q, k, v = (Operand(_without_upcast(operand.node), operand.axes) for operand in (q, k, v))
    return Found(out, q, k, v, scores.scale, scores.softcap, tuple(scores.masks), False, out_axes)


def _without_upcast(node: Node) -> Node:
    """The value before a cast to fp32: the op sums in fp32 at least, whatever its inputs."""
    if is_call(node, aten.to) or is_call(node, aten._to_copy):
        source: Any = node.args[0]
        if node.meta["val"].dtype == torch.float32 and source.meta["val"].dtype in (torch.bfloat16, torch.float16):
            return source
    return node


@dataclasses.dataclass
class _Scores:
    """Walks from the softmax back to the product of q and k, reading scale, soft cap and masks on the way."""

    draft: Draft
    roles: Roles
    factor: float = 1.0
    softcap: float = 0.0
    masks: list[Mask] = dataclasses.field(default_factory=list)

    def read(self, node: Node) -> _Scores:
        """Walk from `node`; raises NotThisFormError at the first call that is none of these."""
        while not is_product(node):
            node = self._step(node)
        self.product = node
        return self

    @property
    def scale(self) -> float:
        """Of q k^T, before the soft cap."""
        return self.factor * self.softcap if self.softcap else self.factor

    def _step(self, node: Node) -> Node:
        if any(is_call(node, cast) for cast in CASTS):
            return node.args[0]  # type: ignore[return-value]
        if is_call(node, aten.mul) or is_call(node, aten.div):
            return self._scaled(node)
        if is_call(node, aten.tanh) and not self.softcap:
            self.softcap, self.factor = self.factor, 1.0
            return node.args[0]  # type: ignore[return-value]
        if self.softcap and self._is_masking(node):
            raise NotThisFormError(f"{node.name} masks before the soft cap")
        if is_call(node, aten.add):
            return self._added(node)
        if is_call(node, aten.masked_fill):
            return self._filled(node)
        if is_call(node, aten.where):
            return self._chosen(node)
        raise NotThisFormError(f"its scores go through {node.name} ({op_name(node)})")

    def _is_masking(self, node: Node) -> bool:
        return any(is_call(node, op) for op in (aten.add, aten.masked_fill, aten.where))

    def _scaled(self, node: Node) -> Node:
        left, right = node.args[:2]
        if is_call(node, aten.mul) and not self._is_scores(left):
            left, right = right, left
        number = self._number(right, node)
        self.factor = self.factor * number if is_call(node, aten.mul) else self.factor / number
        return left  # type: ignore[return-value]

    def _added(self, node: Node) -> Node:
        left, right = node.args[:2]
        if argument(node, "alpha") != 1 or not isinstance(right, Node) or not isinstance(left, Node):
            raise NotThisFormError(f"{node.name} adds a number to the scores")
        if not self._is_scores(left):
            left, right = right, left
        self.masks.append(Mask(right))
        return left

    def _filled(self, node: Node) -> Node:
        scores, condition, value = node.args[:3]
        self._check_low(value, node)
        self.masks.append(Mask(condition, inverted=True))  # type: ignore[arg-type]
        return scores  # type: ignore[return-value]

    def _chosen(self, node: Node) -> Node:
        condition, yes, no = node.args[:3]
        inverted = not self._is_scores(yes)
        self._check_low(yes if inverted else no, node)
        self.masks.append(Mask(condition, inverted))  # type: ignore[arg-type]
        return no if inverted else yes  # type: ignore[return-value]

    def _is_scores(self, value: Any) -> bool:
        return isinstance(value, Node) and depends_on(value, [self.roles.tokens])

    def _check_low(self, value: Any, node: Node) -> None:
        if self._number(value, node) > -1e4:
            raise NotThisFormError(f"{node.name} puts {value} where a key is not seen")

    def _number(self, value: Any, node: Node) -> float:
        if not isinstance(value, Node):
            return float(value)
        try:
            tensor = Evaluator(self.draft, {})(value)
            return float(tensor)
        except (NotEvaluableError, RuntimeError, ValueError, TypeError) as error:
            raise NotThisFormError(f"{node.name} scales or fills with something that is no constant") from error
