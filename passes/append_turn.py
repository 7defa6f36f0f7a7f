"""Pass `append-turn`: turns a captured program into the one for a further turn on a kept cache."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch.fx import Node

from fluxc import kernels
from fluxc.ir.graph import Draft, argument
from fluxc.ir.kv import add_inputs, of_layer, remove_unread
from fluxc.ir.layers import attention_nodes
from fluxc.ir.pass_base import Note, Pass
from fluxc.signature import APPEND_INPUTS


@dataclasses.dataclass(frozen=True)
class AppendTurn(Pass):
    """Attend over the cache and the turn's own keys, then write those to their slots.

    1. It attends first: in a ring, the turn's tokens take the slots of tokens that its first rows still see.
    2. Ring or full is a value of `sinks` and `windows`, which differ between the requests of one call.

        %out = attention(%q, %k, %v)    =>    %out = append_attention(%q, %k, %v, %cache, %page_table[a], %lens[a],
                                                                      %start, %sinks[a], %windows[a])
                                              kv_write(%cache, %k, %v, %slots[a])

    Raises UnsupportedAttentionError for layers that one cache cannot hold, and for programs that read whole lengths.
    """

    name: ClassVar[str] = "append-turn"
    runs_after: ClassVar[tuple[str, ...]] = ("drop-routers", "set-dtype", "place")
    stage: ClassVar[str | None] = "append"

    def rewrite(self, draft: Draft, notes: list[Note]) -> int:
        """Returns the number of attentions that read from the cache."""
        kernels.register()
        inputs = add_inputs(draft, APPEND_INPUTS[3:])
        attentions = attention_nodes(draft.graph)
        for index, node in enumerate(attentions):
            _append(draft, node, index, inputs)
        remove_unread(draft, "seq_lens")
        return len(attentions)


def _append(draft: Draft, node: Node, index: int, inputs: dict[str, Node]) -> None:
    kwargs = {name: argument(node, name) for name in ("scale", "layer", "softcap", "sink_logits")}
    q, k, v = (argument(node, name) for name in "qkv")
    cache, start = inputs["cache"], inputs["start"]
    with draft.inserting_before(node):
        pages, lens = (of_layer(draft, inputs[name], index) for name in ("page_table", "lens"))
        sinks, windows = (of_layer(draft, inputs[name], index) for name in ("sinks", "windows"))
        args = (q, k, v, cache, pages, lens, start, sinks, windows)
        out = draft.call(torch.ops.fluxc.append_attention.default, args, kwargs)
        draft.call(torch.ops.fluxc.kv_write.default, (cache, k, v, of_layer(draft, inputs["slots"], index)))
    node.replace_all_uses_with(out)
    draft.graph.erase_node(node)
