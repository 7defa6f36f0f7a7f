"""Finding the queries before RoPE, whatever form the rotation takes.

RoPE is where values that depend on positions alone (cos and sin tables) meet a value that depends on the tokens. The
queries before it are the nearest single value that everything in the rotation comes from: a choke point with no
positions behind it. That covers rotate-half, interleaved, partial and split-half forms in either axis order, and sits
after any q-norm, without a pattern per family.

Projections end the walk: positions that were added to the embeddings (OPT, GPT-2) lie behind them, so such a layer,
like one without any positions (NoPE), has no rotation to undo.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.fx import Graph, Node

from fluxc.ir.graph import argument, is_call

TOKENS, POSITIONS = "input_ids", "position_ids"
_PROJECTIONS = ("linear", "addmm", "mm", "bmm", "baddbmm", "matmul", "einsum", "embedding", "gather", "index_select")


@dataclasses.dataclass(frozen=True)
class Query:
    """Where the router reads. `found`: `node` is before RoPE, or there is no RoPE; else it is q itself.

    `layout` is the order of the axes of `node`: "BHSD" or "BSHD". `reason` says how it was found, or why not.
    """

    node: Node
    layout: str
    found: bool
    reason: str


class Dependence:
    """Which nodes depend on tokens, and which on positions; sizes depend on neither. `order` is graph order."""

    def __init__(self, graph: Graph) -> None:
        self.order = {node: index for index, node in enumerate(graph.nodes)}
        self._tokens: set[Node] = set()
        self._positions: set[Node] = set()
        for node in graph.nodes:
            if not is_call(node, torch.ops.aten.sym_size):
                self._add(node)

    def on_tokens(self, node: Node) -> bool:
        """Whether the node's values depend on the tokens."""
        return node in self._tokens

    def on_positions_alone(self, node: Node) -> bool:
        """Whether the node's values depend on positions and not on tokens (a cos or sin table, say)."""
        return node in self._positions and node not in self._tokens

    def _add(self, node: Node) -> None:
        inputs = node.all_input_nodes
        if node.name == TOKENS or any(i in self._tokens for i in inputs):
            self._tokens.add(node)
        is_source = node.name == POSITIONS or is_call(node, torch.ops.aten.arange)
        if is_source or any(i in self._positions for i in inputs):
            self._positions.add(node)


def query_before_rope(attention: Node, dependence: Dependence) -> Query:
    """The queries of an attention node before RoPE and after any q-norm; q itself where they cannot be told."""
    q: Node = argument(attention, "q")
    rotated = _rotated(q, dependence)
    if q not in rotated:
        return Query(q, "BHSD", True, "no rotary embedding")
    chokes = choke_points(q, lambda node: _sources(node, dependence), dependence.order)
    before = [node for node in chokes if node not in rotated]
    if not before:
        return Query(q, "BHSD", False, "the rotated queries come from more than one value")
    source = next((node for node in before if _layout(node, q)), None)
    if source is None:
        return Query(q, "BHSD", False, f"the value before RoPE, {before[0].name}, is not shaped like the queries")
    return Query(source, _layout(source, q), True, f"{source.name} is q before RoPE")


def choke_points(start: Node, sources: Callable[[Node], list[Node]], order: dict[Node, int]) -> Iterator[Node]:
    """Nodes that every path backwards from `start` passes, nearest first; a path ends where `sources` is empty."""
    queue = [(-order[start], start)]
    pending, ended = {start}, False
    while queue and not ended:
        _, node = heapq.heappop(queue)
        if len(pending) == 1:
            yield node
        pending.discard(node)
        inputs = sources(node)
        ended = not inputs
        for item in inputs:
            if item not in pending:
                pending.add(item)
                heapq.heappush(queue, (-order[item], item))


def _sources(node: Node, dependence: Dependence) -> list[Node]:
    """The inputs of a node that carry tokens; none for a projection, which ends the walk."""
    if _is_projection(node) and not _mixes_positions(node, dependence):
        return []
    return [item for item in node.all_input_nodes if dependence.on_tokens(item)]


def _is_projection(node: Node) -> bool:
    target: Any = node.target
    namespace = getattr(target, "namespace", "")
    return node.op == "placeholder" or namespace == "fluxc" or getattr(target, "_opname", "") in _PROJECTIONS


def _mixes_positions(node: Node, dependence: Dependence) -> bool:
    return any(dependence.on_positions_alone(item) for item in node.all_input_nodes)


def _rotated(q: Node, dependence: Dependence) -> set[Node]:
    """Nodes between the projections and q that positions have entered."""
    region: list[Node] = []
    seen, stack = {q}, [q]
    while stack:
        node = stack.pop()
        region.append(node)
        new = [item for item in _sources(node, dependence) if item not in seen]
        seen.update(new)
        stack.extend(new)
    rotated: set[Node] = set()
    for node in sorted(region, key=dependence.order.__getitem__):
        behind = any(item in rotated for item in _sources(node, dependence))
        if behind or (dependence.on_tokens(node) and _mixes_positions(node, dependence)):
            rotated.add(node)
    return rotated


def _layout(source: Node, q: Node) -> str:
    shape, goal = _dims(source), _dims(q)
    if shape == goal:
        return "BHSD"
    return "BSHD" if shape == [goal[0], goal[2], goal[1], goal[3]] else ""


def _dims(node: Node) -> list[str]:
    return [str(dim) for dim in getattr(node.meta["val"], "shape", ())]
