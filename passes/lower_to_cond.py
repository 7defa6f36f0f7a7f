"""Pass `lower-to-cond`: turns each routed attention of a one-request program into `torch.cond`."""

from __future__ import annotations

import dataclasses
import operator
from typing import Any, ClassVar

import torch
from torch.fx import Graph, GraphModule, Node

from fluxc import kernels
from fluxc.errors import PlanError
from fluxc.ir.graph import Draft, argument, is_call
from fluxc.ir.pass_base import Note, Pass
from fluxc.ir.sizes import fix_size
from fluxc.passes.apply_plan import settings_of

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class LowerToCond(Pass):
    """Replace each routed attention by a cond over the full and the sparse op, with the batch fixed to 1.

    A cond takes one decision, so a batch of several requests has no place in such a program: the signature's batch
    becomes 1, and the predicate is a reshape of `route` to a scalar, which fails on any other batch.

    1. Streaming: the sparse op is `streaming_attention`.
    2. Triangle, or dense rows after the prompt: it is `triangle_attention`, which also reads `prompt_lens`.
    3. A tensor that is used twice (keys that are values) is passed once.

        %out = routed_attention(%q, %k, %v, %route, %prompt_lens, ...)
     =>
        %take_full = view(%route, [])
        %cond = cond(%take_full, full_0, sparse_0, [%q, %k, %v])
        %out  = getitem(%cond, 0)
    """

    name: ClassVar[str] = "lower-to-cond"
    runs_after: ClassVar[tuple[str, ...]] = ("route-attention", "apply-plan")
    stage: ClassVar[str | None] = "lowered"

    def rewrite(self, draft: Draft, notes: list[Note]) -> int:
        """Returns the number of attentions lowered."""
        kernels.register()
        nodes = [node for node in draft.graph.nodes if is_call(node, torch.ops.fluxc.routed_attention)]
        if nodes:
            fix_size(draft, draft.user_input("input_ids"), 0, 1)
        for node in nodes:
            _lower(draft, node)
        return len(nodes)


def _lower(draft: Draft, node: Node) -> None:
    full, sparse = full_call(node), sparse_call(node)
    operands = list(dict.fromkeys(i for _, args, kwargs in (full, sparse) for i in _nodes(args, kwargs)))  # case 3
    layer = argument(node, "layer")
    with draft.inserting_before(node):
        take_full = draft.call(aten.view.default, (argument(node, "route"), []), name="take_full")
        branches = [
            draft.get_attr(f"{name}_{layer}", _branch(operands, *call))
            for name, call in (("full", full), ("sparse", sparse))
        ]
        cond = draft.graph.call_function(torch.ops.higher_order.cond, (take_full, *branches, tuple(operands)))
        cond.meta["val"] = (node.meta["val"],)
        out = draft.call(operator.getitem, (cond, 0), name="routed")
    node.replace_all_uses_with(out)
    draft.graph.erase_node(node)


def full_call(node: Node) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Op, arguments and keywords of the full branch of a routed attention; raises PlanError for the full kind block."""
    if argument(node, "full_kind") == "block":
        raise PlanError(
            f"layer {argument(node, 'layer')} has the full kind block, which has no single op to lower or train to",
            hint="Transform with --full-kind dense",
        )
    return torch.ops.fluxc.attention.default, _qkv(node), _common(node)


def sparse_call(node: Node) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Op, arguments and keywords of the sparse branch of a routed attention; raises PlanError for the kind block."""
    settings = settings_of(node)
    if settings.kind == "block":
        raise PlanError(
            f"layer {argument(node, 'layer')} has the sparse kind block, which has no single op to lower or train to",
            hint="Transform with --sparse-kind streaming or triangle",
        )
    kwargs = {**_common(node), "sink": settings.sink, "window": settings.window}
    if settings.kind == "streaming" and not settings.decode_full:  # case 1
        return torch.ops.fluxc.streaming_attention.default, _qkv(node), kwargs
    kwargs |= {"last": settings.last, "decode_full": settings.decode_full}  # case 2
    return torch.ops.fluxc.triangle_attention.default, (*_qkv(node), argument(node, "prompt_lens")), kwargs


def _qkv(node: Node) -> tuple[Any, ...]:
    return tuple(argument(node, name) for name in "qkv")


def _common(node: Node) -> dict[str, Any]:
    return {name: argument(node, name) for name in ("scale", "layer", "softcap", "sink_logits")}


def _nodes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Node]:
    return [value for value in (*args, *kwargs.values()) if isinstance(value, Node)]


def _branch(operands: list[Node], target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> GraphModule:
    """One branch: the op on the operands, a tuple of one fresh contiguous tensor out."""
    graph = Graph()
    inside: dict[Any, Node] = {}
    for operand in operands:
        inside[operand] = graph.placeholder(operand.name)
        inside[operand].meta["val"] = operand.meta["val"]
    args, kwargs = torch.fx.node.map_arg((args, kwargs), inside.__getitem__)
    call = graph.create_node("call_function", target, args, kwargs, name=target._opname)
    call.meta["val"] = _fake_result(call)
    graph.output((call,))
    return GraphModule({}, graph)


def _fake_result(call: Node) -> torch.Tensor:
    args, kwargs = torch.fx.node.map_arg((call.args, call.kwargs), lambda node: node.meta["val"])
    with call.all_input_nodes[0].meta["val"].fake_mode:
        return call.target(*args, **kwargs)  # type: ignore[operator]
