"""Which decoder layer each node of a flat program belongs to.

Stages are numbered: 0 the prologue, 1..L the layers, L + 1 the epilogue. They come from the module paths of the trace
(`model.layers.3.mlp`), or, where a program has none, from the values that everything passes between two attentions.
Either way no node stands before one of its inputs.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from fluxc.errors import InternalError
from fluxc.ir.graph import is_call, module_path, walk_back
from fluxc.ir.rope import Dependence, choke_points

ATTENTIONS = ("attention", "routed_attention", "streaming_attention", "triangle_attention", "block_attention")


def attention_nodes(graph: Graph) -> list[Node]:
    """Nodes that attend, one for each layer, in graph order; a cond counts as the attention it holds.

    Where both branches of a layer run (softened programs), the first of them stands for it.
    """
    ops = [getattr(torch.ops.fluxc, name) for name in ATTENTIONS if hasattr(torch.ops.fluxc, name)]
    ops.append(torch.ops.higher_order.cond)
    found = [node for node in graph.nodes if any(is_call(node, op) for op in ops)]
    firsts: dict[Any, Node] = {}
    for node in found:
        firsts.setdefault(node.kwargs.get("layer", node), node)
    return list(firsts.values())


def layer_stages(graph: Graph, attentions: Sequence[Node] | None = None) -> dict[Node, int]:
    """The stage of every call node. Raises InternalError where the layers cannot be told apart.

    `attentions`: one node of each layer, in order, where they are not what `attention_nodes` finds.
    """
    attentions = attention_nodes(graph) if attentions is None else list(attentions)
    if not attentions:
        raise InternalError("the program has no attention, so it has no layers")
    dependence = Dependence(graph)
    prefixes = layer_paths(attentions)
    stages = _by_path(graph, prefixes) if prefixes else _by_choke_points(graph, attentions, dependence)
    _sink(graph, stages, dependence)
    found = [stages[node] for node in attentions]
    if found != list(range(1, len(attentions) + 1)):
        raise InternalError(f"layers cannot be told apart: the attentions stand in stages {found}")
    return stages


def layer_paths(attentions: Sequence[Node]) -> list[str]:
    """The module path of each attention's decoder layer, [] where paths do not tell the layers apart.

    The layer is the outermost numbered module that differs between all attentions.
    """
    numbered = [_numbered_prefixes(module_path(node)) for node in attentions]
    for depth in range(min(map(len, numbered), default=0)):
        prefixes = [paths[depth] for paths in numbered]
        if len(set(prefixes)) == len(prefixes):
            return prefixes
    return []


def _numbered_prefixes(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[: index + 1]) for index, part in enumerate(parts) if part.isdigit()]


def _by_path(graph: Graph, prefixes: list[str]) -> dict[Node, int]:
    """Nodes traced in a layer go there; others after the layers unless a layer needs them."""
    stage_of = {prefix: index for index, prefix in enumerate(prefixes, 1)}
    labels = {node: _label(node, stage_of) for node in graph.nodes}
    feeds: set[Node] = set()
    for node in reversed(graph.nodes):
        if any(labels[user] or user in feeds for user in node.users):
            feeds.add(node)
    stages: dict[Node, int] = {}
    for node in _calls(graph):
        lowest = _lowest(node, stages)
        is_last = not labels[node] and node not in feeds and bool(node.users)
        stages[node] = len(prefixes) + 1 if is_last else max(lowest, labels[node])
    return stages


def _label(node: Node, stage_of: dict[str, int]) -> int:
    return next((stage_of[p] for p in _numbered_prefixes(module_path(node)) if p in stage_of), 0)


def _by_choke_points(graph: Graph, attentions: list[Node], dependence: Dependence) -> dict[Node, int]:
    """A layer starts after the last value before its attention that everything passes (the residual stream)."""
    logits = graph.output_node().all_input_nodes[0]
    starts = _cuts(logits, attentions, dependence)
    cuts = {item: index for index, cut in enumerate(starts, 1) for item in (cut, *_results(cut))}
    computed = set(walk_back(logits, lambda node: False))
    stages: dict[Node, int] = {}
    for node in _calls(graph):
        after = [cuts[item] for item in node.all_input_nodes if item in cuts and cuts.get(node) != cuts[item]]
        is_last = node not in computed and bool(node.users)  # routes and scores, stacked
        stages[node] = len(starts) if is_last else max([_lowest(node, stages), *after])
    return stages


def _results(cut: Node) -> list[Node]:
    """The values of a cut with several, all of which its own stage hands out."""
    return [user for user in cut.users if user.target is operator.getitem]


def _cuts(logits: Node, attentions: list[Node], dependence: Dependence) -> list[Node]:
    """Where each layer starts, and where the last one ends."""
    order = dependence.order
    chokes = list(choke_points(logits, lambda n: [i for i in n.all_input_nodes if dependence.on_tokens(i)], order))
    chokes.reverse()
    starts = [sum(order[choke] < order[node] for choke in chokes) - 1 for node in attentions]
    if min(starts) < 0 or len(set(starts)) < len(starts):
        raise InternalError("layers cannot be told apart: more than one value runs between two attentions")
    return [chokes[index] for index in starts] + [chokes[_end(chokes, starts)]]


def _end(chokes: list[Node], starts: list[int]) -> int:
    """The last layer ends as many choke points after its start as the layer before it; a lone one at its last sum."""
    if len(starts) > 1:
        return min(starts[-1] + starts[-1] - starts[-2], len(chokes) - 1)
    sums = [i for i, node in enumerate(chokes) if i > starts[-1] and is_call(node, torch.ops.aten.add)]
    return max(sums, default=len(chokes) - 1)


def _sink(graph: Graph, stages: dict[Node, int], dependence: Dependence) -> None:
    """Move what depends on no token next to its only user stage, so that inputs are read where they are needed."""
    for node in reversed(_calls(graph)):
        users = {stages[user] for user in node.users if user in stages}
        if len(users) == 1 and not dependence.on_tokens(node) and not any(u.op == "output" for u in node.users):
            stages[node] = users.pop()


def _calls(graph: Graph) -> list[Node]:
    return [node for node in graph.nodes if node.op == "call_function"]


def _lowest(node: Node, stages: dict[Node, int]) -> int:
    return max(itertools.chain([0], (stages[item] for item in node.all_input_nodes if item in stages)))
