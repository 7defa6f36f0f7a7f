"""Pass `inline-regions`: put the body of every set-grad and autocast-off region into the graph around it.

1. `wrap_with_set_grad_enabled(flag, body, *args)`: inlined. The regions of language models hold integer work and
   tables made of positions, through which no gradient flows.
2. `wrap_with_autocast(device, dtype, enabled=False, cache, body, *args)`: inlined.
3. The same with enabled=True: refused, because the body would compute in other dtypes outside the region.

    before: cos_sin = wrap_with_set_grad_enabled(False, submod_1, position_ids); cos = cos_sin[0]
    after:  emb = mul(position_ids, ...); cos = emb.cos()
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node

from fluxc.errors import CaptureError
from fluxc.ir.graph import Draft
from fluxc.ir.pass_base import Note, Pass

_SET_GRAD = "wrap_with_set_grad_enabled"
_AUTOCAST = "wrap_with_autocast"


@dataclasses.dataclass(frozen=True)
class InlineRegions(Pass):
    """Inline set-grad and autocast-off regions; raises CaptureError for a region with autocast on."""

    name: ClassVar[str] = "inline-regions"

    def rewrite(self, draft: Draft, notes: list[Note]) -> int:
        """Inline until none is left, so that nested regions are found too."""
        count = 0
        while region := next((node for node in draft.graph.nodes if _kind(node)), None):
            body, args = _parts(region)
            notes.append(Note(region.name, True, f"{_kind(region)} inlined"))
            _inline(draft, region, body, args)
            count += 1
        return count


def _kind(node: Node) -> str:
    """The region operator's name, "" for other nodes."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.HigherOrderOperator):
        return ""
    name = node.target._name
    return name if name in (_SET_GRAD, _AUTOCAST) else ""


def _parts(region: Node) -> tuple[Node, tuple[Any, ...]]:
    if _kind(region) == _SET_GRAD:  # case 1
        return region.args[1], region.args[2:]  # type: ignore[return-value]
    device, dtype, enabled, _cache, body, *args = region.args
    if enabled:  # case 3
        raise CaptureError(
            f"node {region.name} runs under torch.autocast on {device} in {dtype}",
            hint="capture the model without autocast and set its dtype with --dtype",
        )
    return body, tuple(args)  # type: ignore[return-value]


def _inline(draft: Draft, region: Node, body: Node, args: tuple[Any, ...]) -> None:
    module = draft.module.get_submodule(str(body.target))
    results = _copy_body(draft, region, module, args)  # type: ignore[arg-type]
    _replace_uses(draft, region, results)
    draft.graph.erase_node(region)
    if not body.users:
        draft.graph.erase_node(body)


def _copy_body(draft: Draft, region: Node, module: GraphModule, args: tuple[Any, ...]) -> Any:
    """Copy the body's nodes before the region; returns the body's output in terms of the copies."""
    values = iter(args)
    copies: dict[Node, Any] = {}
    with draft.graph.inserting_before(region):
        for node in module.graph.nodes:
            if node.op == "placeholder":
                copies[node] = next(values)
            elif node.op == "output":
                return torch.fx.map_arg(node.args[0], copies.__getitem__)
            else:
                copies[node] = draft.graph.node_copy(node, copies.__getitem__)
                _adopt(draft, module, copies[node])
    return None


def _adopt(draft: Draft, module: GraphModule, node: Node) -> None:
    """Move the submodule that a copied get_attr reads (a nested region's body) to the outer module."""
    if node.op == "get_attr":
        child = module.get_submodule(str(node.target))
        node.target = f"inlined_{node.name}"
        draft.module.add_module(node.target, child)


def _replace_uses(draft: Draft, region: Node, results: Any) -> None:
    if isinstance(results, Node):
        region.replace_all_uses_with(results)
        return
    for use in list(region.users):
        if use.target is operator.getitem:
            use.replace_all_uses_with(results[use.args[1]])
            draft.graph.erase_node(use)
