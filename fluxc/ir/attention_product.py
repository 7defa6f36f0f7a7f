"""The two products of an attention: q with k, and the probabilities with v."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.fx import Node

from fluxc.ir.graph import argument, is_call

aten = torch.ops.aten
CASTS = (aten.to, aten._to_copy, aten.type_as, aten.contiguous, aten.clone, aten.alias, aten.detach)
BHSD = "bhsd"


class NotThisFormError(Exception):
    """Why a candidate is not an attention fluxc reads; the text names the node where it stopped."""


@dataclasses.dataclass(frozen=True)
class Operand:
    """A tensor and the order of its axes, of b batch, h head, s sequence, d width."""

    node: Node
    axes: str = BHSD


def check_rank(*operands: Node) -> None:
    """Raise NotThisFormError for an operand that has not four axes."""
    for operand in operands:
        if operand.meta["val"].dim() != 4:
            raise NotThisFormError(f"{operand.name} has {operand.meta['val'].dim()} axes, not [B,H,S,D]")


def is_product(node: Node) -> bool:
    """Whether a node multiplies matrices, in a form fluxc reads or not."""
    return any(is_call(node, op) for op in (aten.matmul, aten.bmm, aten.mm, aten.baddbmm, aten.einsum))


def product(node: Node) -> tuple[Operand, Operand]:
    """q and k of the product of scores, rows of queries and columns of keys; raises NotThisFormError."""
    if is_call(node, aten.einsum):
        (left, right), (queries, keys, scores) = _einsum(node)
        names = dict(zip(scores, "bhqk", strict=True))
        first, second = (_axes(names, "d", term) for term in (queries, keys))
        if sorted(first) != sorted("bhqd") or sorted(second) != sorted("bhkd"):
            raise NotThisFormError(f"{node.name} is the einsum {node.args[0]!r}")
        return Operand(left, first.replace("q", "s")), Operand(right, second.replace("k", "s"))
    left, right = _matmul(node)
    return Operand(left), Operand(right, "bhds")


def weighted_sum(softmax: Node) -> tuple[Node, Operand, str]:
    """From the probabilities on to their product with v: the product, v, and the axes of the product."""
    probabilities, node = _last_probabilities(softmax)
    if is_call(node, aten.einsum):
        (left, right), (rows, values, out) = _einsum(node)
        names = dict(zip(rows, "bhqk", strict=True))
        second, third = (_axes(names, "d", term) for term in (values, out))
        if left is not probabilities or sorted(second) != sorted("bhkd") or sorted(third) != sorted("bhqd"):
            raise NotThisFormError(f"{node.name} is the einsum {node.args[0]!r}")
        return node, Operand(right, second.replace("k", "s")), third.replace("q", "s")
    left, right = _matmul(node)
    if left is not probabilities:
        raise NotThisFormError(f"{node.name} multiplies the probabilities from the right")
    return node, Operand(right), BHSD


def _matmul(node: Node) -> tuple[Node, Node]:
    if not is_call(node, aten.matmul) or node.meta["val"].dim() != 4:
        raise NotThisFormError(f"{node.name} ({op_name(node)}) is no product of [B,H,S,D] tensors")
    left, right = node.args
    check_rank(left, right)  # type: ignore[arg-type]
    return left, right  # type: ignore[return-value]


def _einsum(node: Node) -> tuple[tuple[Node, Node], list[str]]:
    """The operands, and the letters of both and of the output."""
    terms = str(node.args[0]).replace(" ", "").replace("->", ",").split(",")
    if len(terms) != 3 or any(len(term) != 4 or not term.isalpha() for term in terms):
        raise NotThisFormError(f"{node.name} is the einsum {node.args[0]!r}")
    operands: Any = node.args[1]
    left, right = operands
    return (left, right), terms


def _axes(names: dict[str, str], other: str, term: str) -> str:
    return "".join(names.get(letter, other) for letter in term)


def _last_probabilities(softmax: Node) -> tuple[Node, Node]:
    """The probabilities after dropout that is off and casts, and the product that reads them."""
    node = softmax
    while True:
        users = list(node.users)
        if len(users) != 1:
            raise NotThisFormError(f"its probabilities {node.name} are used {len(users)} times")
        if is_product(users[0]):
            return node, users[0]
        if not _passes_through(users[0]):
            raise NotThisFormError(f"its probabilities go through {users[0].name} ({op_name(users[0])})")
        node = users[0]


def _passes_through(node: Node) -> bool:
    if is_call(node, aten.dropout):
        return argument(node, "train") is False or argument(node, "p") == 0
    return any(is_call(node, cast) for cast in CASTS)


def op_name(node: Node) -> str:
    """What a node calls, for messages."""
    return str(getattr(node.target, "overloadpacket", node.target))
